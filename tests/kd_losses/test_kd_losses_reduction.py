"""Reductions: accumulation over ragged micro-batches, empty batches, chunks, permutations."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from kd_losses import (
    cif_quantity_loss,
    kl_div_with_logits,
    linear_cross_entropy,
    linear_kl_div,
)

B, L, H, V = 5, 6, 4, 13
LENGTHS = [6, 1, 0, 3, 5]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, TEACHER = randn(V, H, seed=1), randn(B, L, H, seed=2)
MASK = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
TARGET = torch.where(MASK, torch.arange(L) % V, -100)


def shared(h, rows, **options):
    return linear_kl_div(h[rows], WEIGHT, TEACHER[rows], mask=MASK[rows], **options)


def general(h, rows, **options):
    return linear_kl_div(h[rows], WEIGHT, TEACHER[rows], WEIGHT.clone(), mask=MASK[rows], **options)


def trainable(h, rows, **options):
    weight = WEIGHT.clone().requires_grad_()
    return linear_kl_div(h[rows], weight, TEACHER[rows], WEIGHT, mask=MASK[rows], **options)


def on_logits(h, rows, **options):
    return kl_div_with_logits(
        h[rows] @ WEIGHT.T, TEACHER[rows] @ WEIGHT.T, mask=MASK[rows], **options
    )


def cross_entropy(h, rows, **options):
    return linear_cross_entropy(h[rows], WEIGHT, TARGET[rows], **options)


def trainable_cross_entropy(h, rows, **options):
    weight = WEIGHT.clone().requires_grad_()
    return linear_cross_entropy(h[rows], weight, TARGET[rows], **options)


LOSSES = [shared, general, trainable, on_logits, cross_entropy, trainable_cross_entropy]
ALL = slice(None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulation_over_ragged_micro_batches_equals_one_batch(loss, as_tensor):
    whole = randn(B, L, H).requires_grad_()
    expected = loss(whole, ALL)
    expected.backward()
    parts = randn(B, L, H).requires_grad_()
    count = torch.tensor(sum(LENGTHS)) if as_tensor else sum(LENGTHS)
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        value = loss(parts, rows, num_items=count)
        value.backward()
        total += value.detach()
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(parts.grad, whole.grad)
    # what it protects from: the mean of the micro-batches' means is another number
    means = [loss(parts, rows).item() for rows in (slice(0, 2), slice(2, 3), slice(3, 5))]
    assert abs(sum(means) / 3 - expected.item()) > 1e-3


def test_accumulation_of_the_quantity_loss():
    alpha_sum = randn(B).abs().requires_grad_()
    lengths = torch.tensor(LENGTHS)
    expected = cif_quantity_loss(alpha_sum, lengths)
    parts = [
        cif_quantity_loss(alpha_sum[rows], lengths[rows], num_items=B)
        for rows in (slice(0, 1), slice(1, 5))
    ]
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_agree(loss):
    h = randn(B, L, H)
    none = loss(h, ALL, reduction="none")
    torch.testing.assert_close(loss(h, ALL, reduction="sum"), none.sum())
    torch.testing.assert_close(loss(h, ALL), none.sum() / sum(LENGTHS))
    torch.testing.assert_close(loss(h, ALL, num_items=7.0), none.sum() / 7)
    if "cross_entropy" in loss.__name__:
        assert none.shape == TARGET.shape
        assert torch.equal(none != 0, MASK)
    else:
        assert none.shape == (sum(LENGTHS),)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_selected_gives_a_zero_that_is_connected(loss, reduction):
    h = randn(B, L, H).requires_grad_()
    value = loss(h, slice(2, 3), reduction=reduction)
    assert value.item() == 0
    value.backward()
    assert torch.equal(h.grad, torch.zeros_like(h))
    assert loss(h, slice(2, 3), num_items=0).item() == 0
    assert loss(h, slice(2, 3), num_items=torch.tensor(0)).item() == 0


def test_nothing_selected_gives_a_trainable_head_a_zero_gradient():
    h, weight = randn(1, L, H).requires_grad_(), randn(V, H).requires_grad_()
    nothing = torch.zeros(1, L, dtype=torch.bool)
    linear_kl_div(h, weight, TEACHER[:1], mask=nothing).backward()
    linear_cross_entropy(h, weight, torch.full((1, L), -100)).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(h.grad, torch.zeros_like(h))


def test_an_empty_batch_of_the_quantity_loss():
    alpha_sum = torch.zeros(0, requires_grad=True)
    value = cif_quantity_loss(alpha_sum, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize("loss", LOSSES[:3] + LOSSES[4:])
@pytest.mark.parametrize("chunk_size", [1, 4, 15, 1000])
def test_the_chunk_size_does_not_matter(loss, chunk_size):
    values, gradients = [], []
    for size in (chunk_size, None):
        h = randn(B, L, H).requires_grad_()
        value = loss(h, ALL, chunk_size=size)
        value.backward()
        values.append(value)
        gradients.append(h.grad)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("teacher_weight", [None, WEIGHT.clone()], ids=["shared", "two heads"])
def test_permutations(teacher_weight):
    h, teacher = randn(B, H), randn(B, H, seed=5)
    rows, words = torch.tensor([3, 0, 4, 1, 2]), torch.randperm(V)
    expected = linear_kl_div(h, WEIGHT, teacher, teacher_weight, reduction="none")
    by_rows = linear_kl_div(h[rows], WEIGHT, teacher[rows], teacher_weight, reduction="none")
    torch.testing.assert_close(by_rows, expected[rows])
    by_words = linear_kl_div(
        h,
        WEIGHT[words],
        teacher,
        None if teacher_weight is None else teacher_weight[words],
        reduction="none",
    )
    torch.testing.assert_close(by_words, expected)


def test_a_constant_added_to_the_logits_changes_nothing():
    h, teacher = randn(B, H), randn(B, H, seed=5)
    expected = linear_kl_div(h, WEIGHT, teacher, reduction="none")
    got = linear_kl_div(
        h,
        WEIGHT,
        teacher,
        WEIGHT,
        linear_bias=torch.full((V,), 40.0, dtype=torch.float64),
        teacher_linear_bias=torch.full((V,), -7.0, dtype=torch.float64),
        reduction="none",
    )
    torch.testing.assert_close(got, expected)
    logits, teacher_logits = h @ WEIGHT.T, teacher @ WEIGHT.T
    got = kl_div_with_logits(logits + 40, teacher_logits - 7, reduction="none")
    torch.testing.assert_close(got, expected)


class LargestResult(TorchFunctionMode):
    """Remembers the element count of the largest tensor that a torch function returned."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not isinstance(result, torch.nn.Parameter):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("kind", ["shared", "general", "cross entropy"])
def test_logits_exist_for_one_chunk_only_and_one_tensor_is_kept(kind):
    n, width, words, chunk = 64, 4, 500, 8
    h = randn(n, width).requires_grad_()
    teacher, weight = randn(n, width, seed=1), randn(words, width, seed=2)
    mask = torch.arange(n) % 2 == 0
    kept = []
    with (
        LargestResult() as largest,
        saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        rows = h[mask]
        kept.clear()  # the selection's own indices
        if kind == "cross entropy":
            loss = linear_cross_entropy(
                rows, weight, torch.arange(n // 2), reduction="sum", chunk_size=chunk
            )
        else:
            loss = linear_kl_div(
                rows,
                weight,
                teacher[mask],
                None if kind == "shared" else weight.clone(),
                reduction="sum",
                chunk_size=chunk,
            )
    # the teacher's and the student's share one buffer, of rows a little longer than the vocabulary
    assert largest.elements <= (1 if kind == "cross entropy" else 2) * chunk * (words + 31)
    assert max(kept) == n // 2 * width
    loss.backward()
