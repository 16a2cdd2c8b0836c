"""The update cut in two against the plain formula: results, gradients, and what must not change."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_mask
from plora.backends.torch_backend import add_up_
from plora.bases import is_untouched
from plora.rows import Rows, find_runs
from plora.taken import Taken
from plora.update import expand, shrink

# Relative to the largest value: how much further from float64 than plain torch the update may be.
TOLERANCE = {
    torch.float64: 1e-13,  # the order of the sums differs
    torch.float32: 1e-6,
    torch.float16: 1e-3,  # rounded once less here, once more there
    torch.bfloat16: 8e-3,
}


def plain(x, weight, rows, a, b, scaling):
    """The formula by autograd's own operations."""
    out = x @ weight.mT
    update = scaling * (x[rows] @ a.to(x.dtype).mT @ b.to(x.dtype).mT)
    return out.index_add(0, rows, update)


def ours(x, weight, rows, a, b, scaling, *, in_place=True, runs=True):
    rows = Rows.of(rows) if runs else Rows(rows)
    alias, low = shrink(x, rows, a, dtype=x.dtype, in_place=in_place)
    return expand(F.linear(alias, weight), rows, low, b, scaling=scaling, in_place=in_place)


def problem(dtype=torch.float64, positions=23, width=12, out=9, rank=4):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    x, a, b = draw(positions, width).to(dtype), draw(rank, width).to(adapter), draw(out, rank)
    leaves = [t.requires_grad_() for t in (x, a, b.to(adapter))]
    return leaves, draw(out, width).to(dtype), draw(positions, out).to(dtype)


ROWS = {
    "one run": torch.arange(5, 18),
    "all": torch.arange(23),
    "two runs": torch.cat([torch.arange(0, 9), torch.arange(12, 21)]),
    "scattered": torch.tensor([0, 2, 3, 7, 11, 12, 20, 22]),
    "one": torch.tensor([22]),
    "none": torch.arange(0),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("in_place", [True, False])
def test_as_exact_as_the_plain_formula(rows, dtype, in_place):
    leaves, weight, upstream = problem(dtype)
    results = []
    for function, cast in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        inputs = [t.detach().to(torch.promote_types(cast, t.dtype)) for t in leaves]
        inputs[0] = leaves[0].detach().to(cast)
        inputs = [t.requires_grad_() for t in inputs]
        extra = {"in_place": in_place} if function is ours else {}
        x, a, b = inputs
        out = function(x, weight.to(cast), ROWS[rows], a, b, 1.5, **extra)
        results.append((out, *torch.autograd.grad(out, inputs, upstream.to(cast))))
    for name, mine, other, true in zip(("out", "dx", "da", "db"), *results, strict=True):
        assert mine.dtype == other.dtype, name
        scale = true.abs().max()
        allowed = (other.double() - true).abs().max() + TOLERANCE[dtype] * scale
        assert (mine.double() - true).abs().max() <= allowed, name


def test_long_runs_take_a_product_each(monkeypatch):
    sizes = []
    add = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *a, **k: sizes.append(len(self)) or add(self, *a, **k)
    )
    low, weight = torch.randn(300, 2).bfloat16(), torch.randn(2, 5).bfloat16()
    long = torch.cat([torch.arange(10, 140), torch.arange(200, 370)])
    for index, expected in ((long, [130, 170]), (long[:150], []), (long[:40], [40])):
        matrix, start = torch.zeros(400, 5).bfloat16(), len(sizes)
        add_up_(matrix, Rows.of(index), low[: len(index)], weight, 1.5)
        assert sizes[start:] == expected
        wanted = torch.zeros(400, 5)
        wanted[index] = 1.5 * (low[: len(index)].float() @ weight.float())
        torch.testing.assert_close(matrix.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "offset"), [(16, 0), (16, 8), (16, 3), (15, 0)])
def test_scattered_rows_of_16_bits_are_added_to_and_the_others_stay(dtype, width, offset):
    """Rows of a multiple of 16 bytes are moved as a whole, others element by element."""
    torch.manual_seed(0)
    index = torch.tensor([0, 2, 5, 6, 9, 11])
    matrix = torch.randn(12 * width + offset).to(dtype)[offset:].view(12, width)
    matrix[1, :3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    before, low, weight = matrix.clone(), torch.randn(6, 4).to(dtype), torch.randn(4, width)
    add_up_(matrix, Rows(index), low, weight.to(dtype), 1.5)
    wanted = before.float()
    wanted[index] += 1.5 * (low.float() @ weight.to(dtype).float())
    torch.testing.assert_close(matrix[index].float(), wanted[index], rtol=0.02, atol=0.05)
    others = torch.tensor([1, 3, 4, 7, 8, 10])
    assert torch.equal(matrix[others].view(torch.int16), before[others].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_other_rows_are_the_base_s_bitwise_in_both_passes(rows, dtype):
    (x, a, b), weight, upstream = problem(dtype)
    off = torch.ones(23, dtype=torch.bool)
    off[ROWS[rows]] = False
    out = ours(x, weight, ROWS[rows], a, b, 1.5)
    (dx,) = torch.autograd.grad(out, x, upstream)
    base = F.linear(x, weight)
    (base_dx,) = torch.autograd.grad(base, x, upstream)
    assert torch.equal(out[off], base[off])
    assert torch.equal(dx[off], base_dx[off])


@pytest.mark.parametrize("rows", ["one run", "scattered", "none"])
def test_second_derivatives(rows):
    (x, a, b), weight, _ = problem(positions=23, width=3, out=2, rank=2)

    def function(x, a, b):
        return ours(x, weight, ROWS[rows], a, b, 1.5).tanh()

    assert torch.autograd.gradcheck(function, (x, a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, a, b), fast_mode=True)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 200)), st.integers(0, 30), st.integers(0, 120))
def test_runs_are_the_rows(some, start, count):
    index = torch.tensor(sorted({*some, *range(start, start + count)}), dtype=torch.int64)
    matrix = torch.arange(201 * 2).view(201, 2)
    rows = Rows.of(index)
    assert torch.equal(rows.take(matrix), matrix[index])
    if rows.runs is not None:
        listed = [row for first, stop in rows.runs for row in range(first, stop)]
        assert listed == index.tolist()
        assert len(rows.runs) <= 16


def test_one_run_is_always_found_and_many_short_ones_are_not():
    assert find_runs(torch.arange(7, 8)) == ((7, 8),)
    assert find_runs(torch.cat([torch.arange(20), torch.arange(30, 50)])) == ((0, 20), (30, 50))
    assert find_runs(torch.arange(0, 60, 2)) is None


class Pair(nn.Module):
    """Two layers that read the same tensor, as gate and up do."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, inputs_embeds, between=None):
        first = self.first(inputs_embeds)
        if between is not None:
            between(inputs_embeds)
        return first * self.second(inputs_embeds)


def pair(*layers, **fields):
    torch.manual_seed(0)
    layers = layers or (nn.Linear(8, 6), nn.Linear(8, 6))
    model = apply_plora(Pair(*layers), PLoRAConfig(**{"r": 2, "lora_dropout": 0.0, **fields}))
    for layer in model.modules():
        if isinstance(layer, PLoRALinear):
            nn.init.normal_(layer.lora_B)
    return model


MASK = torch.tensor([[False, True, True, True, False]] * 3)


def dense(model, x, mask=MASK):
    result = 1.0
    for layer in (model.first, model.second):
        update = x @ layer.lora_A.mT @ layer.lora_B.mT * layer.updates["default"].scaling
        result = result * (layer.base_layer(x) + mask[..., None] * update)
    return result


def test_layers_that_read_one_tensor_share_its_rows(monkeypatch):
    model, taken = pair(), []
    take = Rows.take
    monkeypatch.setattr(Rows, "take", lambda self, m: taken.append(m.shape[-1]) or take(self, m))
    x = torch.randn(3, 5, 8, requires_grad=True)
    with plora_mask(MASK):
        out = model(inputs_embeds=x)
    assert taken == [8]
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    upstream = torch.randn_like(out)
    for mine, other in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(dense(model, x), leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_tensor_that_was_changed_in_between_is_read_again():
    model = pair().double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with plora_mask(MASK):
        out = model(inputs_embeds=x.clone().requires_grad_() * 1, between=lambda t: t.mul_(2))

    def half(layer, x):
        update = x @ layer.lora_A.mT @ layer.lora_B.mT * layer.updates["default"].scaling
        return layer.base_layer(x) + MASK[..., None] * update

    torch.testing.assert_close(out, half(model.first, x) * half(model.second, 2 * x))


def test_nothing_is_kept_of_an_input_that_is_gone():
    taken, rows = Taken(), Rows.of(torch.arange(2))
    x = torch.randn(4, 3, requires_grad=True) * 2
    chosen = weakref.ref(taken.take(x, rows, torch.float32))
    assert chosen() is taken.take(x, rows, torch.float32)
    del x
    assert chosen() is None


@pytest.mark.parametrize("kind", ["forward hook", "backward hook", "own forward", "subclass"])
def test_who_looks_at_the_base_layer_sees_what_it_made(kind):
    """Its output and its input's gradient are then left as they are."""

    class Noisy(nn.Linear):
        def forward(self, x):
            kept["output"] = super().forward(x)
            return kept["output"]

    kept = {}
    layer = Noisy(8, 6) if kind == "subclass" else nn.Linear(8, 6)
    model = pair(layer, nn.Linear(8, 6))
    if kind == "forward hook":
        layer.register_forward_hook(lambda m, args, output: kept.update(output=output))
    elif kind == "backward hook":
        layer.register_full_backward_hook(lambda m, dx, dy: kept.update(dx=dx[0]))
    elif kind == "own forward":
        method = layer.forward
        layer.forward = lambda x: kept.update(output=method(x)) or kept["output"]
    assert not is_untouched(layer)
    assert is_untouched(nn.Linear(2, 2))
    assert is_untouched(Conv1D(2, 2))
    x = torch.randn(3, 5, 8, requires_grad=True)
    with plora_mask(MASK):
        out = model(inputs_embeds=x)
    out.sum().backward()
    if "output" in kept:
        assert torch.equal(kept["output"], F.linear(x, layer.weight, layer.bias))
    else:
        update = x @ model.second.lora_A.mT @ model.second.lora_B.mT * 8
        d_first = model.second.base_layer(x) + MASK[..., None] * update
        torch.testing.assert_close(kept["dx"], d_first @ layer.weight)
    expected = torch.autograd.grad(dense(model, x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("follow", ["add_", "relu_"])
def test_the_output_can_be_changed_in_place(follow):
    x = torch.randn(3, 5, 8, requires_grad=True)

    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 6)

        def forward(self, inputs_embeds):
            out = self.first(inputs_embeds)
            return out.add_(1) if follow == "add_" else F.relu(out, inplace=True)

    torch.manual_seed(0)
    model = apply_plora(Changed(), PLoRAConfig(r=2, lora_dropout=0.0))
    nn.init.normal_(model.first.lora_B)
    with plora_mask(MASK):
        out = model(inputs_embeds=x)
    update = x @ model.first.lora_A.mT @ model.first.lora_B.mT * 8
    expected = model.first.base_layer(x) + MASK[..., None] * update
    expected = expected + 1 if follow == "add_" else expected.relu()
    torch.testing.assert_close(out, expected)
    for mine, other in zip(
        torch.autograd.grad(out.square().sum(), [x, model.first.lora_A]),
        torch.autograd.grad(expected.square().sum(), [x, model.first.lora_A]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_two_backward_passes_through_one_graph_are_the_same():
    model = pair()
    x = torch.randn(3, 5, 8, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with plora_mask(MASK):
        loss = model(inputs_embeds=x).square().sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_base_layer_that_learns_too_gets_its_gradient():
    model = pair()
    model.requires_grad_(True)
    x = torch.randn(3, 5, 8, requires_grad=True)
    leaves = [x, *model.parameters()]
    with plora_mask(MASK):
        mine = torch.autograd.grad(model(inputs_embeds=x).square().sum(), leaves)
    other = torch.autograd.grad(dense(model, x).square().sum(), leaves)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_keeps_a_byte_for_each_element_and_its_gradient_is_that_of_what_was_dropped():
    torch.manual_seed(0)
    rows, p = Rows.of(torch.arange(2, 8)), 0.5
    x, a = torch.randn(10, 4).double().requires_grad_(), torch.randn(3, 4).double().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alias, low = shrink(x, rows, a, dtype=x.dtype, dropout=p, in_place=True)
    (keep,) = (t for t in kept if t.dtype == torch.bool)
    assert keep.shape == (6, 4)
    torch.testing.assert_close(low, (x[2:8] * keep * 2) @ a.mT)
    (alias.square().sum() + low.square().sum()).backward()
    y, c = x.detach().requires_grad_(), a.detach().requires_grad_()
    (y.square().sum() + ((y[2:8] * keep * 2) @ c.mT).square().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(a.grad, c.grad)
