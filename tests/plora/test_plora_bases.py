"""Layers that only say their features, and those of quantisation packages: wrapped, never read."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_mask, plora_state_dict

WIDTH = 64  # the least that 4-bit blocks take


class Sequence(nn.Module):
    """A decoder of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs_embeds):
        return self.second(torch.relu(self.first(inputs_embeds)))


def torchao_int8(model):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def bitsandbytes(kind, **options):
    def replace(model):
        package = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        for name in ("first", "second"):
            layer = getattr(package.nn, kind)(WIDTH, WIDTH, **options)
            layer.load_state_dict(getattr(model, name).state_dict())
            setattr(model, name, layer.to("cpu"))
        return model

    return replace


class OnlyFeatures(nn.Module):
    """A layer whose weight is packed into a buffer of integers, as GPTQ's and AWQ's are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max() / 127)
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) * self.scale).T


def packed(model):
    model.first, model.second = OnlyFeatures(model.first), OnlyFeatures(model.second)
    return model


KINDS = {
    "packed": packed,
    "torchao int8": torchao_int8,
    "bitsandbytes 8 bit": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes 4 bit": bitsandbytes("Linear4bit", quant_type="nf4"),
}


@pytest.fixture(params=sorted(KINDS))
def quantised(request):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # what the packages say of themselves on a machine without a GPU
        warnings.simplefilter("ignore")
        return KINDS[request.param](Sequence()).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["all-linear", ["first", "second"]])
def test_quantised_layers_are_adapted_without_being_read(quantised, target):
    base = copy.deepcopy(quantised)
    config = PLoRAConfig(r=4, lora_dropout=0.0, target_modules=target)
    model = apply_plora(quantised, config)
    x, mask = torch.randn(2, 5, WIDTH), torch.rand(2, 5) < 0.5
    plain = base(x)
    with plora_mask(mask):
        assert torch.equal(model(x), plain)
    for layer in (model.first, model.second):
        nn.init.normal_(layer.lora_B, std=0.2)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    plain = base.train()(x)  # bitsandbytes goes another way while training
    with plora_mask(mask):
        found = model.train()(x)
    assert torch.equal(found[~mask], plain[~mask])

    def add(layer, hidden):
        update = config.scaling * hidden @ layer.lora_A.T @ layer.lora_B.T
        return layer.base_layer(hidden) + mask[..., None] * update

    truth = add(model.second, torch.relu(add(model.first, x)))
    # 8-bit kernels round each row of their input, by how it is called
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found[mask], plain[mask])
    found.square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    assert len(plora_state_dict(model)) == 4


@pytest.mark.filterwarnings("ignore")
def test_dora_on_them_is_refused_and_changes_nothing(quantised):
    before = list(dict(quantised.named_modules()))
    with pytest.raises(TypeError, match=r"use_dora: .* quantised"):
        apply_plora(quantised, PLoRAConfig(r=2, use_dora=True))
    assert list(dict(quantised.named_modules())) == before


def test_a_container_that_says_features_is_no_layer():
    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 4, 4
            self.inner = nn.Linear(4, 4)

        def forward(self, inputs_embeds):
            return self.inner(inputs_embeds)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = Container()

        def forward(self, inputs_embeds):
            return self.outer(inputs_embeds)

    model = apply_plora(Model(), PLoRAConfig(r=2))
    assert isinstance(model.outer.inner, PLoRALinear)
    assert isinstance(model.outer, Container)
