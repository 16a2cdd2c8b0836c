"""DoRA on the masked positions, against its formula written out with whole weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from plora import PLoRAConfig, apply_plora, plora_mask


class Sequence(nn.Module):
    """A decoder of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs_embeds):
        return self.layer(inputs_embeds)


LAYERS = {
    "Linear": lambda: nn.Linear(9, 6),
    "no bias": lambda: nn.Linear(9, 6, bias=False),
    "Conv1D": lambda: Conv1D(6, 9),
}


@pytest.fixture(params=sorted(LAYERS))
def base(request):
    torch.manual_seed(0)
    return Sequence(LAYERS[request.param]())


def adapted(base, **fields):
    config = {"r": 3, "lora_alpha": 4, "lora_dropout": 0.0, "use_dora": True, **fields}
    model = apply_plora(base, PLoRAConfig(**config))
    for parameter in (model.layer.lora_A, model.layer.lora_B):
        nn.init.normal_(parameter, std=0.3)
    model.layer.lora_magnitude_vector.data += torch.rand(6)
    return model


def truth(layer, x):
    """W' = m (W + s B A) / |W + s B A|, one length for each output feature, and y = W' x + b."""
    weight = layer.weight.T if isinstance(layer.base_layer, Conv1D) else layer.weight
    whole = weight + 4 / 3 * layer.lora_B @ layer.lora_A
    length = whole.detach().square().sum(1, keepdim=True).sqrt()
    y = x @ (layer.lora_magnitude_vector[:, None] * whole / length).T
    return y if layer.bias is None else y + layer.bias


def test_it_equals_the_formula_on_masked_positions_and_the_base_elsewhere(base):
    model = adapted(base).double()
    layer, x = model.layer, torch.randn(2, 5, 9).double().requires_grad_()
    mask = torch.rand(2, 5) < 0.5
    plain = layer.base_layer(x)
    with plora_mask(mask):
        found = model(x)
    expected = torch.where(mask[..., None], truth(layer, x), plain)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[~mask], plain[~mask])
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    assert len(wanted) == 4
    ours = torch.autograd.grad(found.square().sum(), wanted)
    theirs = torch.autograd.grad(expected.square().sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert one.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_at_the_start_it_is_the_base_layer_bitwise(base, dtype):
    model = apply_plora(base.to(dtype), PLoRAConfig(r=3, use_dora=True, lora_dropout=0.0))
    x = torch.randn(2, 5, 9).to(dtype)
    assert model.layer.lora_magnitude_vector.dtype == torch.float32
    with plora_mask(torch.ones(2, 5, dtype=torch.bool)):
        assert torch.equal(model(x), model.layer.base_layer(x))


def test_a_row_of_zeros_is_learnt_by_the_plain_update(base):
    weight = base.layer.weight.T if isinstance(base.layer, Conv1D) else base.layer.weight
    weight.data[1] = 0
    model = apply_plora(base, PLoRAConfig(r=3, use_dora=True, lora_dropout=0.0))
    x, mask = torch.randn(2, 5, 9), torch.ones(2, 5, dtype=torch.bool)
    with plora_mask(mask):
        found = model(x)
    assert torch.equal(found, model.layer.base_layer(x))
    found.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.isfinite().all() for grad in grads)
    # as LoRA's own: the gradient of the outputs, times A x, and no length to train
    low = x.view(-1, 9) @ model.layer.lora_A.T
    wanted = 2 * found.view(-1, 6)[:, 1] @ low * model.layer.updates["default"].scaling
    torch.testing.assert_close(model.layer.lora_B.grad[1], wanted)
    assert model.layer.lora_magnitude_vector.grad[1] == 0


def test_an_empty_mask_gives_zero_gradients(base):
    model = adapted(base).train()
    with plora_mask(torch.zeros(2, 5, dtype=torch.bool)):
        model(torch.randn(2, 5, 9)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 3
    assert not any(grad.any() for grad in grads)


def test_dropout_acts_on_both_terms_while_training(base):
    model = adapted(base, lora_dropout=0.5)
    x, mask = torch.randn(1, 4, 9), torch.ones(1, 4, dtype=torch.bool)
    layer = model.layer
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x.view(4, 9), 0.5).view(1, 4, 9)
    torch.manual_seed(5)
    with plora_mask(mask):
        found = model.train()(x)
        torch.testing.assert_close(model.eval()(x), truth(layer, x))
    bias = 0 if layer.bias is None else layer.bias
    weight = layer.weight.T if isinstance(layer.base_layer, Conv1D) else layer.weight
    # the change is that of the dropped input; the base layer saw all of it
    expected = layer.base_layer(x) + truth(layer, dropped) - bias - dropped @ weight.T
    torch.testing.assert_close(found, expected)
