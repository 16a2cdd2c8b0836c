"""The kernels read tensors in memory order; what callers hand over need not lie so."""

import pytest
import torch

from cif import cif, cif_stream
from cif.backends.triton_launch import launch_integrate, launch_integrate_backward

pytest.importorskip("triton")


def batch(device, rows, frames=12):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, frames, 4, generator=generator)
    alphas = torch.rand(rows, frames, generator=generator) + 0.5
    return hidden.to(device), alphas.to(device)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_stream_of_few_rows(device, poisoned, rows):
    hidden, alphas = batch(device, rows)
    kernels, plain = (
        cif_stream(hidden, alphas, tail="drop", backend=name)[0] for name in ("triton", "torch")
    )
    assert torch.equal(kernels.lengths, plain.lengths)
    torch.testing.assert_close(kernels.hidden_states, plain.hidden_states)


@pytest.mark.parametrize(
    "targets",
    [torch.tensor([[4, 9], [1, 9], [2, 9]])[:, 0], torch.tensor(3).expand(3)],
    ids=["a column", "expanded"],
)
def test_target_lengths_with_strides(device, poisoned, targets):
    hidden, alphas = batch(device, 3)
    assert not targets.is_contiguous()
    out = cif(hidden, alphas, target_lengths=targets.to(device), backend="triton")
    assert out.lengths.tolist() == targets.tolist()
    plain = cif(hidden, alphas, target_lengths=targets.contiguous(), backend="torch")
    torch.testing.assert_close(out.hidden_states, plain.hidden_states)


def test_a_mask_with_strides(device, poisoned):
    hidden, alphas = batch(device, 3)
    mask = (torch.arange(12) < torch.tensor([[12], [7], [1]])).to(device)
    alphas = alphas.requires_grad_()
    gradients = []
    for given in (mask, mask.t().contiguous().t()):
        out = cif(hidden, alphas, attention_mask=given, tail="keep", backend="triton")
        gradients.append(torch.autograd.grad(out.hidden_states.square().sum(), alphas)[0])
    assert torch.equal(*gradients)


def test_a_layout_with_strides(device, poisoned):
    hidden = torch.randn(6, 4, device=device)
    ends = torch.arange(1, 7, device=device) << 39
    layout = (ends - (1 << 39), ends, torch.full((6,), 3, device=device))
    units = torch.ones(3, device=device)
    strided = [torch.stack([t, t], dim=1)[:, 0] for t in (*layout, units)]
    starts, ends, limits, unit = strided
    out = launch_integrate(hidden, starts, ends, unit, torch.float32)
    torch.testing.assert_close(out, hidden.view(3, 2, 4).mean(1))
    grad = torch.randn(3, 4, device=device)
    expected = launch_integrate_backward(grad, hidden, *layout, None, units)
    got = launch_integrate_backward(grad, hidden, starts, ends, limits, None, unit)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)
