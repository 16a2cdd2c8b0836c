"""Low precision, three ways: the truth in float64, plain torch in the low precision, and ours."""

import pytest
import torch

from cif import CIF, cif

# How much further from the truth than plain torch ours may be, relative to the largest value.
TOLERANCE = {
    torch.float32: 1e-6,  # one more rounding: the weight's, from 40 bits to 24
    torch.float16: 0.0,  # ours is rounded once, at the end; plain torch sums rounded products
    torch.bfloat16: 0.0,
}


def dense(hidden, alphas, targets):
    """The definition as one would write it, in whatever dtype is given."""
    scaled = alphas * (targets / alphas.sum(1)).to(alphas.dtype)[:, None]
    c = scaled.cumsum(1)[:, None]
    n = torch.arange(int(targets.max()), dtype=alphas.dtype)[:, None]
    return (c.clamp(max=n + 1) - (c - scaled[:, None]).clamp(min=n)).clamp(min=0) @ hidden


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_further_from_the_truth_than_plain_torch(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(4, 300, 200).to(dtype)
    alphas = (torch.rand(4, 300) * 0.2).to(dtype)
    targets = torch.tensor([20, 25, 30, 33])

    def run(function, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves, targets)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape, dtype=torch.float64).to(dtype).to(out.dtype))
        return out.detach().double(), *(leaf.grad.double() for leaf in leaves)

    truth = run(dense, hidden.double(), alphas.double())
    plain = run(dense, hidden, alphas)
    ours = run(lambda h, a, n: cif(h, a, target_lengths=n).hidden_states, hidden, alphas)
    for name, t, p, o in zip(("out", "dh", "dalpha"), truth, plain, ours, strict=True):
        error, allowed = (o - t).abs().max(), (p - t).abs().max() + TOLERANCE[dtype] * t.abs().max()
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
        # and in itself: the result cannot be finer than its own dtype
        assert error <= 4 * torch.finfo(dtype).eps * t.abs().max(), f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, alpha_dtype):
    hidden = torch.randn(2, 9, 3).to(dtype).requires_grad_()
    alphas = torch.rand(2, 9).to(alpha_dtype).requires_grad_()
    for tail in ("round", "threshold"):
        out = cif(hidden, alphas, tail=tail)
        assert out.hidden_states.dtype == dtype
        assert out.fire_times.dtype == torch.float32
        assert out.lengths.dtype == torch.int64
        assert out.attention_mask.dtype == torch.bool
        double = torch.float64 in (dtype, alpha_dtype)
        assert out.alpha_sum.dtype == (torch.float64 if double else torch.float32)
        (out.hidden_states.double().sum() + out.alpha_sum.double().sum()).backward()
        assert hidden.grad.dtype == dtype
        assert alphas.grad.dtype == alpha_dtype


def test_half_precision_loses_no_token_in_long_rows():
    alphas = torch.full((1, 4000), 0.1).bfloat16()  # a bfloat16 sum would stop growing at 32
    out = cif(torch.ones(1, 4000, 2).bfloat16(), alphas, tail="drop")
    assert out.lengths.tolist() == [int(4000 * alphas[0, 0].double())]
    torch.testing.assert_close(out.alpha_sum, alphas.double().sum(1).float())


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_autocast_changes_nothing_in_the_function(backend):
    torch.manual_seed(0)
    hidden, alphas = torch.randn(2, 50, 8), torch.rand(2, 50)
    plain = cif(hidden, alphas, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cif(hidden, alphas, backend=backend)
    for a, b in zip(plain[:5], cast[:5], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("head", ["last_channel", "conv"])
def test_autocast_keeps_the_layers_alphas_in_float32(head):
    torch.manual_seed(0)
    layer, hidden = CIF(8, alpha_head=head), torch.randn(2, 50, 8)
    plain = layer(hidden, target_lengths=torch.tensor([4, 6]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(hidden, target_lengths=torch.tensor([4, 6]))
    assert out.alphas.dtype == out.alpha_sum.dtype == torch.float32
    assert out.lengths.tolist() == [4, 6]
    torch.testing.assert_close(out.alphas, plain.alphas, rtol=0, atol=5e-3)
    if head == "last_channel":  # nothing lies between the input and alpha that autocast could touch
        assert torch.equal(out.alphas, plain.alphas)
