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
    # cross entropy selects the rows that have a target, which breaks the graph
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


def test_masks_may_break_the_graph_but_not_the_numbers():
    torch._dynamo.reset()

    def step(h, w, t, mask, target):
        kl = linear_kl_div(h, w, t, mask=mask, teacher_mask=mask.flip(1))
        return kl + linear_cross_entropy(h, w, target)

    mask = torch.tensor([[True, False, True], [True, True, False]])
    target = torch.where(mask, 2, -100)
    h, t = torch.randn(2, 3, H, requires_grad=True), torch.randn(2, 3, H)
    w = torch.randn(V, H)
    results = []
    for function in (torch.compile(step, backend="aot_eager"), step):
        value = function(h, w, t, mask, target)
        results.append((value, *torch.autograd.grad(value, h)))
    torch.testing.assert_close(*results)


def test_the_operator_says_what_it_returns():
    from kd_losses.frozen_head import _compute_whole

    h, w, t = torch.randn(N, H), torch.randn(V, H), torch.randn(N, H)
    for kind, extras in (
        ("forward_kl", []),
        ("forward_kl+cross_entropy", [IDS, torch.ones(N, 2)]),
    ):
        for with_gradient in (False, True):
            torch.library.opcheck(
                _compute_whole,
                (h, t, w, *(None,) * 5, extras, kind, 1.0, 1.0, 4, with_gradient, "torch"),
                test_utils=("test_schema", "test_faketensor"),
            )
