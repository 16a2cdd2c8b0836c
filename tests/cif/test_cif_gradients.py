"""Gradients: finite differences, autograd through the definition, and where there are none."""

import pytest
import torch

from cif import cif

MODES = [
    {"target_lengths": torch.tensor([4, 0, 9])},
    {"tail": "round"},
    {"tail": "threshold", "tail_threshold": 0.05},
    {"tail": "drop"},
    {"tail": "keep"},
]


def dense(hidden, alphas, count, threshold):
    """The definition, differentiated by autograd."""
    c = alphas.cumsum(0)[None]
    n = threshold * torch.arange(count, dtype=alphas.dtype)[:, None]
    return ((c.clamp(max=n + threshold) - (c - alphas).clamp(min=n)).clamp(min=0)) @ hidden


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0.4, 3.0], ids=["one a frame", "several a frame"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_finite_differences(mode, size, masked):
    torch.manual_seed(3)
    hidden = torch.randn(3, 8, 2, dtype=torch.float64, requires_grad=True)
    alphas = (torch.rand(3, 8, dtype=torch.float64) * size + 0.01).requires_grad_()
    mask = torch.rand(3, 8) > 0.3 if masked else None

    def outputs(hidden, alphas):
        out = cif(hidden, alphas, attention_mask=mask, threshold=0.9, **mode)
        return out.hidden_states, out.alpha_sum

    # the prefix is rounded to 2**-40, which a step of 1e-6 turns into 1e-6 of slope
    assert torch.autograd.gradcheck(outputs, (hidden, alphas), eps=1e-6, atol=3e-5)


@pytest.mark.parametrize("target", [None, 7])
def test_closed_form_is_autograd_through_the_definition(target):
    torch.manual_seed(4)
    hidden = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    alphas = (torch.rand(40, dtype=torch.float64) * 0.9).requires_grad_()
    if target is None:
        out = cif(hidden[None], alphas[None], threshold=1.1, tail="drop").hidden_states[0]
        scaled = alphas
    else:
        targets = torch.tensor([target])
        out = cif(hidden[None], alphas[None], threshold=1.1, target_lengths=targets)
        out = out.hidden_states[0]
        scaled = alphas * (1.1 * target / alphas.sum())
    expected = dense(hidden, scaled, len(out), 1.1)
    cotangent = torch.randn_like(out)
    mine = torch.autograd.grad(out, (hidden, alphas), cotangent)
    theirs = torch.autograd.grad(expected, (hidden, alphas), cotangent)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("targets", [None, torch.tensor([3, 2])])
def test_rows_with_nothing_to_integrate_have_no_gradient(targets):
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    alphas = torch.tensor([[0.0] * 4, [0.5] * 4], requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4])
    out = cif(hidden, alphas, attention_mask=mask, target_lengths=targets)
    out.hidden_states.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(2, 4, 3))
    assert torch.equal(alphas.grad, torch.zeros(2, 4))


def test_alpha_sum_is_differentiable_by_itself_and_stops_at_the_mask():
    alphas = torch.rand(2, 5, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    out = cif(
        torch.randn(2, 5, 3), alphas, attention_mask=mask, target_lengths=torch.tensor([9, 1])
    )
    out.alpha_sum.sum().backward()
    assert torch.equal(alphas.grad, mask.float())
    torch.testing.assert_close(out.alpha_sum, (alphas * mask).sum(1))
    assert not out.fire_times.requires_grad


def test_negative_alpha_counts_as_zero():
    hidden = torch.randn(1, 4, 2)
    alphas = torch.tensor([[0.6, -3.0, 0.9, 0.5]], requires_grad=True)
    out = cif(hidden, alphas)
    assert torch.equal(out.hidden_states, cif(hidden, alphas.clamp(min=0)).hidden_states)
    (out.hidden_states.sum() + out.alpha_sum.sum()).backward()
    assert alphas.grad[0, 1] == 0


@pytest.mark.parametrize("frozen", ["hidden", "alphas"])
def test_one_input_may_be_without_gradient(frozen):
    torch.manual_seed(0)
    leaves = {"hidden": torch.randn(2, 9, 3), "alphas": torch.rand(2, 9)}
    full = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    part = {name: leaf.clone().requires_grad_(name != frozen) for name, leaf in leaves.items()}
    for inputs in (full, part):
        cif(inputs["hidden"], inputs["alphas"]).hidden_states.square().sum().backward()
    assert part[frozen].grad is None
    (other,) = set(leaves) - {frozen}
    assert torch.equal(part[other].grad, full[other].grad)


def test_double_backward_is_refused():
    hidden = torch.randn(1, 6, 2, requires_grad=True)
    out = cif(hidden, torch.rand(1, 6)).hidden_states
    (grad,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="dense"):
        grad.sum().backward()


# Triton's interpreter computes with NumPy, which warns of what a GPU does in silence.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", [{"target_lengths": torch.tensor([3])}, {"tail": "drop"}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
def test_what_stands_in_a_frame_without_weight_stays_there(device, backend, mode, value):
    if backend == "triton":
        pytest.importorskip("triton")
    elif device == "cuda":
        pytest.skip("the CPU has tried it")
    torch.manual_seed(6)
    hidden, alphas = torch.randn(1, 8, 4, device=device), torch.rand(1, 8, device=device) + 0.1
    alphas[:, 3] = 0.0

    def gradients(frames):
        frames, weights = frames.requires_grad_(), alphas.clone().requires_grad_()
        out = cif(frames, weights, backend=backend, **mode)
        return torch.autograd.grad(out.hidden_states.square().sum(), (frames, weights))

    clean = gradients(hidden.clone())
    spoiled = hidden.clone()
    spoiled[:, 3] = value
    d_hidden, d_alphas = gradients(spoiled)
    assert torch.equal(d_hidden, clean[0])
    others = torch.arange(8, device=device) != 3
    torch.testing.assert_close(d_alphas[:, others], clean[1][:, others])
    assert d_alphas.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_spoiled_frame_that_was_read_is_not_hidden(device, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    hidden, alphas = torch.randn(1, 8, 4, device=device), torch.rand(1, 8, device=device) + 0.1
    hidden[:, 3] = float("nan")
    alphas = alphas.requires_grad_()
    out = cif(hidden, alphas, tail="keep", backend=backend).hidden_states
    assert out.isnan().any()
    (gradient,) = torch.autograd.grad(out.sum(), alphas)
    assert gradient.isnan().any()
