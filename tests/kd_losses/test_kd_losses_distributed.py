"""Two gloo processes, two micro-batches each, ragged masks: the same as one big batch."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kd_losses import (
    cif_quantity_loss,
    global_num_items,
    hidden_cosine_loss,
    hidden_mse_loss,
    linear_cross_entropy,
    linear_divergence,
    linear_kl_div,
    linear_kl_div_cross_entropy,
    linear_topk_kl_div,
)

B, L, H, V, RANKS = 8, 5, 4, 13, 2
# the second process has nothing at all to count in its first micro-batch
LENGTHS = torch.tensor([5, 1, 0, 3, 0, 0, 4, 2])
MASK = torch.arange(L) < LENGTHS[:, None]
TARGET = torch.where(MASK & (torch.arange(L) % 2 == 0), torch.arange(L), -100)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, TEACHER, HEAD = randn(B, L, H, seed=0), randn(B, L, H, seed=1), randn(V, H, seed=2)
TOP = (TEACHER @ HEAD.T).log_softmax(-1).topk(3)


def terms(hidden, rows, counts):
    """Every loss of some rows of the batch, divided by counts (None: by its own)."""
    tokens, targets, clips = counts
    mask, teacher, target = MASK[rows], TEACHER[rows], TARGET[rows]
    kl = {"mask": mask, "num_items": tokens}
    return {
        "kl": linear_kl_div(hidden, HEAD, teacher, **kl),
        "kl, two heads": linear_kl_div(hidden, HEAD, teacher, HEAD.flip(0), **kl),
        "jsd": linear_divergence(hidden, HEAD, teacher, divergence="jsd", **kl),
        "top-k": linear_topk_kl_div(hidden, HEAD, TOP.indices[rows], TOP.values[rows], **kl),
        "cross entropy": linear_cross_entropy(hidden, HEAD, target, num_items=targets),
        "both": linear_kl_div_cross_entropy(
            hidden, HEAD, teacher, target, target_num_items=targets, **kl
        ).loss,
        "mse": hidden_mse_loss(hidden, teacher, **kl),
        "cosine": hidden_cosine_loss(hidden, teacher, **kl),
        "quantity": cif_quantity_loss(hidden.sum((1, 2)), LENGTHS[rows], num_items=clips),
    }


def layer():
    model = nn.Linear(H, H, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(randn(H, H, seed=3))
        model.bias.copy_(randn(H, seed=4))
    return model


NAMES = list(terms(X, slice(None), (None,) * 3))


def gradients_of_one_big_batch():
    found = {}
    for name in NAMES:
        model = layer()
        loss = terms(model(X), slice(None), (None,) * 3)[name]
        loss.backward()
        found[name] = (loss.detach(), model.weight.grad)
    return found


def train_in_parts(rank, port, queue):
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    mine = slice(4 * rank, 4 * rank + 4)
    counts = (
        global_num_items(MASK[mine]),
        global_num_items(TARGET[mine] != -100),
        global_num_items(torch.ones(4, dtype=torch.bool)),
    )
    found = {}
    for name in NAMES:
        model = DistributedDataParallel(layer())
        total = torch.zeros((), dtype=torch.float64)
        for start in (0, 2):
            rows = slice(4 * rank + start, 4 * rank + start + 2)
            loss = terms(model(X[rows]), rows, counts)[name]
            # DDP averages over the processes; the parts are to be added up
            (loss * RANKS).backward()
            total += loss.detach()
        distributed.all_reduce(total)
        found[name] = (total.item(), model.module.weight.grad.tolist())
    found["head"] = sharded_head(rank)
    if rank == 0:
        queue.put(found)
    distributed.barrier()
    distributed.destroy_process_group()


def sharded_head(rank):
    """An FSDP2-sharded head: how often it is gathered, and the gradient of its own shard."""
    mesh = init_device_mesh("cpu", (RANKS,))
    calls = []
    gather = DTensor.full_tensor
    DTensor.full_tensor = lambda self, **options: calls.append(1) or gather(self, **options)
    results = []
    for trainable in (False, True):
        head = nn.Linear(H, V, bias=False, dtype=torch.float64)
        head.weight.data.copy_(HEAD)
        head.requires_grad_(trainable)
        fully_shard(head, mesh=mesh)
        student = X[rank].clone().requires_grad_()
        calls.clear()
        loss = linear_kl_div(student, head.weight, TEACHER[rank], chunk_size=2)
        gathered = len(calls)
        loss.backward()
        weight_gradient = gather(head.weight.grad).tolist() if trainable else None
        results.append((gathered, loss.item(), student.grad.tolist(), weight_gradient))
    DTensor.full_tensor = gather
    return results


@pytest.fixture(scope="module")
def in_parts():
    from torch.distributed import TCPStore

    probe = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = probe.port
    del probe
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=train_in_parts, args=(rank, port, queue)) for rank in range(RANKS)
    ]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=300)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    return found


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_on_two_processes_equals_one_big_batch(in_parts, name):
    loss, gradient = gradients_of_one_big_batch()[name]
    got_loss, got_gradient = in_parts[name]
    torch.testing.assert_close(torch.tensor(got_loss, dtype=torch.float64), loss)
    torch.testing.assert_close(torch.tensor(got_gradient, dtype=torch.float64), gradient)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_sharded_head_is_gathered_once(in_parts, trainable):
    gathered, loss, gradient, weight_gradient = in_parts["head"][trainable]
    assert gathered == 1
    student = X[0].clone().requires_grad_()
    weight = HEAD.clone().requires_grad_(trainable)
    expected = linear_kl_div(student, weight, TEACHER[0])
    expected.backward()
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), student.grad)
    if trainable:
        linear_kl_div(X[1], weight, TEACHER[1]).backward()
        # the shards hold the average over the processes, as those of FSDP's other parameters do
        got = torch.tensor(weight_gradient, dtype=torch.float64)
        torch.testing.assert_close(got, weight.grad / RANKS)


def test_counts_without_processes():
    assert global_num_items(MASK).item() == LENGTHS.sum()
    assert global_num_items(MASK).dtype == torch.int64
    with pytest.raises(TypeError, match=r"mask: .*int64; pass mask.bool\(\)"):
        global_num_items(MASK.long())
