"""The Triton path against plain torch: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from plora import PLoRAConfig, apply_plora, plora_mask
from plora.backends import resolve, why_not_triton
from plora.backends.triton_launch import expand_, outer, shrink
from plora.backends.triton_operators import (
    _add_low_rank,
    _add_low_rank_backward,
    add_low_rank,
)
from plora.rows import Rows
from plora.update import expand as expand_update
from plora.update import shrink as shrink_update

pytest.importorskip("triton")

# Relative to the largest value: how much further from float64 than plain torch a kernel may be.
TOLERANCE = {
    torch.float32: 2e-6,  # the order of the sums differs
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
# Triton's interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place, twice.
CUT_OFF = 2**-6


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def as_good(mine, plain, true):
    assert mine.shape == true.shape
    dtype = plain.dtype
    cut = dtype == torch.bfloat16 and not mine.is_cuda
    tolerance = CUT_OFF if cut else TOLERANCE[dtype]
    mine, plain, true = (t.detach().double().cpu() for t in (mine, plain, true))
    scale = true.abs().max() if true.numel() else 0.0
    error = (mine - true).abs().max() if true.numel() else 0.0
    allowed = ((plain - true).abs().max() if true.numel() else 0.0) + tolerance * scale
    assert error <= allowed, f"{error:.2e} > {allowed:.2e}"


SHAPES = [
    (40, 37, 70, 3),  # rows, chosen, columns, rank: nothing is a multiple of a tile
    (9, 1, 1, 1),
    (700, 690, 33, 5),  # the sum over the rows is split
    (5, 4, 5000, 8),  # and that over the columns
    (64, 32, 128, 16),
    (50, 33, 129, 40),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_products_are_as_exact_as_torch_s(device, poisoned, shape, dtype):
    positions, count, columns, rank = shape
    index = torch.randperm(positions, generator=torch.Generator().manual_seed(1))[:count]
    exact = draw(positions, columns), draw(rank, columns), draw(count, rank)
    rounded = [t.to(device, dtype) for t in exact]
    matrix, weight, low = rounded
    wide = [t.double().cpu() for t in rounded]
    at = index.to(device)
    as_good(
        shrink(matrix, at, weight, 1.5),
        1.5 * (matrix[at] @ weight.mT),
        1.5 * (wide[0][index] @ wide[1].mT),
    )
    # the weight by its strides, as B is read
    flipped = weight.mT.contiguous().mT
    assert torch.equal(shrink(matrix, at, flipped, 1.5), shrink(matrix, at, weight, 1.5))
    found = outer(low, matrix, at, 1.5)
    assert found.dtype == torch.float32
    as_good(found, 1.5 * (low.mT @ matrix[at]), 1.5 * (wide[2].mT @ wide[0][index]))
    changed = matrix.clone()
    expand_(changed, at, low, weight, 1.5)
    plain = matrix.index_add(0, at, 1.5 * (low @ weight))
    as_good(changed, plain, wide[0].index_add(0, index, 1.5 * (wide[2] @ wide[1])))
    others = torch.ones(positions, dtype=torch.bool)
    others[index] = False
    assert torch.equal(changed[others.to(device)], matrix[others.to(device)])


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("columns", [0, 4])
def test_empty_axes(device, count, columns):
    matrix, index = torch.randn(5, columns, device=device), torch.arange(count, device=device)
    weight, low = torch.randn(2, columns, device=device), torch.randn(count, 2, device=device)
    torch.testing.assert_close(shrink(matrix, index, weight), matrix[index] @ weight.mT)
    torch.testing.assert_close(outer(low, matrix, index), low.mT @ matrix[index])
    expected = matrix.index_add(0, index, 2.0 * (low @ weight))
    expand_(matrix, index, low, weight, 2.0)
    torch.testing.assert_close(matrix, expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 20), st.integers(0, 99))
def test_any_shape(positions, columns, rank, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(positions, generator=generator) < 0.5).nonzero().flatten().to(device)
    matrix, weight = draw(positions, columns).float(), draw(rank, columns).float()
    matrix, weight = matrix.to(device), weight.to(device)
    low = shrink(matrix, chosen, weight)
    torch.testing.assert_close(low, matrix[chosen] @ weight.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        outer(low, matrix, chosen), low.mT @ matrix[chosen], rtol=1e-3, atol=1e-3
    )


def layer_results(backend, device, dtype, *, mask, learns=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20, dtype=dtype))
    apply_plora(model, PLoRAConfig(r=5, lora_alpha=7, lora_dropout=0.0))
    nn.init.normal_(model[0].lora_B)
    model = model.to(device).eval()
    model[0].backend = backend
    x = draw(2, 9, 24).to(device, dtype).requires_grad_(learns)
    with plora_mask(mask.to(device)):
        if not learns:
            with torch.no_grad():
                return [model(x)]
        out = model(x)
    leaves = [x, model[0].lora_A, model[0].lora_B]
    return [out, *torch.autograd.grad(out, leaves, draw(2, 9, 20).to(device, dtype))]


MASKS = {
    "scattered": torch.rand(2, 9, generator=torch.Generator().manual_seed(4)) < 0.5,
    "span": (torch.arange(9) < 4).expand(2, 9),
    "none": torch.zeros(2, 9, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("learns", [True, False])
def test_a_layer_computes_the_same_by_both_backends(device, poisoned, dtype, mask, learns):
    mine, other = (
        layer_results(name, device, dtype, mask=MASKS[mask], learns=learns)
        for name in ("triton", "torch")
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(mine, other, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
    off = ~MASKS[mask].to(device)
    assert torch.equal(mine[0][off], other[0][off])


def test_second_derivatives_fall_back_to_what_has_them(device):
    rows = Rows(torch.tensor([0, 3], device=device))
    x, a, b = (draw(*s).float().to(device).requires_grad_() for s in ((5, 4), (2, 4), (3, 2)))
    weight = draw(3, 4).float().to(device)

    def gradient_penalty(backend):
        alias, low = shrink_update(x, rows, a, dtype=x.dtype, in_place=True, backend=backend)
        out = expand_update(
            F.linear(alias, weight), rows, low, b, scaling=1.5, in_place=True, backend=backend
        )
        (dx,) = torch.autograd.grad(out.tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, a, b])

    for mine, other in zip(gradient_penalty("triton"), gradient_penalty("torch"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_operators_keep_their_contracts(device):
    output, chosen = draw(7, 6).float().to(device), draw(3, 5).float().to(device)
    index = torch.tensor([1, 2, 6], device=device)
    a, b = draw(2, 5).float().to(device), draw(6, 2).float().to(device)
    inputs = [t.clone().requires_grad_() for t in (output, chosen)]
    learned = [t.clone().requires_grad_() for t in (a, b)]
    torch.library.opcheck(_add_low_rank, (*inputs, index, *learned, 1.5))
    low = chosen @ a.mT
    torch.library.opcheck(_add_low_rank_backward, (output, chosen, index, low, a, b, 1.5))


def test_the_operator_equals_the_formula(device):
    leaves = [
        draw(*shape).float().to(device).requires_grad_()
        for shape in ((7, 6), (7, 5), (2, 5), (6, 2))
    ]
    index = torch.tensor([1, 2, 6], device=device)
    output, x, a, b = leaves
    mine = add_low_rank(output, x, index, a, b, scaling=1.5)
    plain = output.index_add(0, index, 1.5 * (x[index] @ a.mT @ b.mT))
    torch.testing.assert_close(mine, plain)
    upstream = draw(7, 6).float().to(device)
    for p, q in zip(
        torch.autograd.grad(mine, leaves, upstream),
        torch.autograd.grad(plain, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(p, q)


def test_compiles_without_graph_breaks_and_for_any_number_of_rows(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    apply_plora(model, PLoRAConfig(r=3, lora_dropout=0.0))
    nn.init.normal_(model[0].lora_B)
    model = model.to(device)
    model[0].backend = "triton"
    plain = copy.deepcopy(model)
    plain[0].backend = "torch"

    class Around(nn.Module):
        """The hooks of what is compiled are outside of the graph."""

        def __init__(self):
            super().__init__()
            self.decoder = model

        def forward(self, x):
            return self.decoder(x)

    compiled = torch.compile(Around(), fullgraph=True, dynamic=True, backend="aot_eager")
    x = draw(2, 9, 12).float().to(device).requires_grad_()
    for name in ("scattered", "span"):
        results = []
        for function, layer in ((compiled, model[0]), (plain, plain[0])):
            with plora_mask(MASKS[name]):
                out = function(x)
            leaves = [x, layer.lora_A, layer.lora_B]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_what_cannot_run_says_why(monkeypatch):
    cpu = torch.device("cpu")
    assert why_not_triton(torch.device("cuda"), torch.bfloat16, 16) is None
    assert "float64" in why_not_triton(torch.device("cuda"), torch.float64, 16)
    assert "rank" in why_not_triton(torch.device("cuda"), torch.float32, 512)
    with pytest.raises(ValueError, match=r"backend: expected one of.*got 'cuda'"):
        apply_plora(nn.Sequential(nn.Linear(2, 2)), PLoRAConfig(), backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r'on cpu, its kernels need a GPU.*backend="auto"'):
        resolve("triton", cpu, torch.float32, 2**24, 16)
    assert resolve("auto", cpu, torch.float32, 2**24, 16) == "torch"
    assert resolve("auto", torch.device("cuda"), torch.bfloat16, 2**24, 16) == "triton"
    assert resolve("auto", torch.device("cuda"), torch.bfloat16, 2**14, 16) == "torch"


@pytest.mark.gpu
def test_every_run_is_the_same(gpu):
    matrix, weight = draw(600, 900).float().to(gpu), draw(16, 900).float().to(gpu)
    index = torch.arange(0, 600, 2, device=gpu)
    low = shrink(matrix, index, weight)
    assert torch.equal(low, shrink(matrix, index, weight))
    assert torch.equal(outer(low, matrix, index), outer(low, matrix, index))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scattered", "span"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_waits_for_the_gpu_when_the_mask_is_on_the_cpu(name, backend, gpu):
    model = nn.Sequential(nn.Linear(24, 20))
    apply_plora(model, PLoRAConfig(r=4, lora_dropout=0.0)).to(gpu)
    model[0].backend = backend
    x = draw(2, 9, 24).float().to(gpu).requires_grad_()
    for _ in range(2):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with plora_mask(MASKS[name]):
                model(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
