"""torch.compile: one graph, the same numbers."""

import pytest
import torch

from kd_losses import (
    hidden_cosine_loss,
    linear_cross_entropy,
    linear_divergence,
    linear_kl_div,
    linear_kl_div_cross_entropy,
    linear_topk_kl_div,
)

# torch's own, where a graph goes on after a break with tensors that aren't leaves
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
N, H, V = 6, 8, 31
IDS = torch.arange(N)


def losses():
    def kl(h, w, t):
        return linear_kl_div(h, w, t, temperature=2.0)

    def two_heads(h, w, t):
        return linear_kl_div(h, w, t, w.flip(0), softcap=3.0)

    def jsd(h, w, t):
        return linear_divergence(h, w, t, divergence="jsd", reduction="none").square().sum()

    def both(h, w, t):
        return linear_kl_div_cross_entropy(h, w, t, IDS[: len(h)]).loss

    def topk(h, w, t):
        log_p, ids = (t @ w.detach().T).log_softmax(-1).topk(3)
        return linear_topk_kl_div(h, w, ids, log_p)

    def hidden(h, w, t):
        return hidden_cosine_loss(h, t) + 0 * w.sum()

    return [kl, two_heads, jsd, both, topk, hidden]


@pytest.mark.parametrize("loss", losses(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("trainable", [False, True])
def test_one_graph_with_the_same_numbers(loss, trainable):
    torch._dynamo.reset()
    # with a trainable head, cross entropy breaks the graph to select the rows that have a target
    whole = not (trainable and loss.__name__ == "both")
    compiled = torch.compile(loss, fullgraph=whole, backend="aot_eager")
    for rows in (N, N - 2):
        h, t = torch.randn(rows, H, requires_grad=True), torch.randn(rows, H)
        w = torch.randn(V, H, requires_grad=trainable)
        leaves = [h, w] if trainable else [h]
        results = []
        for function in (compiled, loss):
            value = function(h, w, t)
            results.append((value, *torch.autograd.grad(value, leaves, allow_unused=True)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


MASK = torch.tensor([[True, False, True, False], [True, True, False, False]])
TEACHER_MASK = torch.tensor([[False, True, True], [True, False, True]])


def masked_losses():
    def kl(h, w, t, mask, teacher_mask):
        return linear_kl_div(h, w, t[:, :3], mask=mask, teacher_mask=teacher_mask)

    def jsd(h, w, t, mask, teacher_mask):
        t = torch.cat([t, t], 1)
        teacher_mask = torch.cat([torch.zeros_like(teacher_mask), teacher_mask], 1)
        teacher_mask = torch.cat([teacher_mask, torch.zeros_like(mask[:, :2])], 1)
        return linear_divergence(
            h, w, t, w.flip(0), divergence="jsd", mask=mask, teacher_mask=teacher_mask,
            reduction="sum",
        )  # fmt: skip

    def one_mask(h, w, t, mask, teacher_mask):
        return linear_kl_div(h, w, t, mask=mask, num_items=7, temperature=2.0)

    def ce(h, w, t, mask, teacher_mask):
        target = torch.where(mask, 2, -100)
        each = linear_cross_entropy(h, w, target, reduction="none")
        return linear_cross_entropy(h, w, target) + each.square().sum()

    def both(h, w, t, mask, teacher_mask):
        target = torch.where(mask & mask.roll(1, 0), 2, -100)
        return sum(linear_kl_div_cross_entropy(h, w, t, target, mask=mask))

    def topk(h, w, t, mask, teacher_mask):
        log_p, ids = (t @ w.detach().T).log_softmax(-1).topk(3)
        return linear_topk_kl_div(h, w, ids, log_p, mask=mask)

    return [kl, jsd, one_mask, ce, both, topk]


@pytest.mark.parametrize("loss", masked_losses(), ids=lambda f: f.__name__)
def test_masks_stay_in_one_graph_with_the_same_numbers(loss):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    h, t, w = torch.randn(2, 4, H, requires_grad=True), torch.randn(2, 4, H), torch.randn(V, H)
    for mask, teacher_mask in (
        (MASK, TEACHER_MASK),
        (MASK.flip(0), TEACHER_MASK.flip(1)),
        (torch.zeros_like(MASK), torch.zeros_like(TEACHER_MASK)),
    ):
        results = []
        for function in (compiled, loss):
            value = function(h, w, t, mask, teacher_mask)
            results.append((value, *torch.autograd.grad(value, h)))
        torch.testing.assert_close(*results)


def test_masks_that_do_not_pair_are_found_in_a_graph_too():
    torch._dynamo.reset()
    step = torch.compile(
        lambda h, w, t, m, n: linear_kl_div(h, w, t, mask=m, teacher_mask=n),
        fullgraph=True,
        backend="aot_eager",
    )
    h, w = torch.randn(2, 4, H), torch.randn(V, H)
    with pytest.raises(ValueError, match="teacher_mask: expected as many"):
        step(h, w, h, MASK, MASK.flip(0) & MASK)


def test_the_way_round_a_mask_with_a_trainable_head():
    torch._dynamo.reset()

    def weighed(h, w, t, mask):
        losses = linear_kl_div(h, w, t, reduction="none")
        return (losses * mask.flatten()).sum() / mask.sum()

    h, t = torch.randn(2, 4, H, requires_grad=True), torch.randn(2, 4, H)
    w = torch.randn(V, H, requires_grad=True)
    value = torch.compile(weighed, fullgraph=True, backend="aot_eager")(h, w, t, MASK)
    expected = linear_kl_div(h, w, t, mask=MASK)
    for got, wanted in zip(
        torch.autograd.grad(value, (h, w)), torch.autograd.grad(expected, (h, w)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_where_masks_break_the_graph_the_numbers_stay():
    """A trainable head, a loss per position."""
    torch._dynamo.reset()

    def step(h, w, t, mask):
        each = linear_kl_div(h, w.detach(), t, mask=mask, reduction="none")
        return linear_kl_div(h, w, t, mask=mask, teacher_mask=mask.flip(1)) + each.square().sum()

    h, t = torch.randn(2, 4, H, requires_grad=True), torch.randn(2, 4, H)
    w = torch.randn(V, H, requires_grad=True)
    results = []
    for function in (torch.compile(step, backend="aot_eager"), step):
        value = function(h, w, t, MASK)
        results.append((value, *torch.autograd.grad(value, (h, w))))
    torch.testing.assert_close(*results)


def test_the_operator_says_what_it_returns():
    from kd_losses.frozen_head import _compute_whole

    h, w, t = torch.randn(N, H), torch.randn(V, H), torch.randn(N, H)
    for kind, extras in (
        ("forward_kl", []),
        ("forward_kl+cross_entropy", [IDS, IDS > 0, torch.ones(N, 2)]),
    ):
        for with_gradient in (False, True):
            torch.library.opcheck(
                _compute_whole,
                (h, t, w, kind, with_gradient, *(None,) * 6, extras, 1.0, 1.0, 4, "torch"),
                test_utils=("test_schema", "test_faketensor"),
            )
