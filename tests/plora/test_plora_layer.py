"""One adapted layer against the dense formula, and the guarantees of the untouched rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_disabled, plora_mask


class Sequence(nn.Module):
    """The smallest decoder: linear layers over ``inputs_embeds``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs_embeds):
        return self.layers(inputs_embeds)


def adapted(*layers: nn.Module, **fields: object) -> Sequence:
    model = apply_plora(Sequence(*layers), PLoRAConfig(**{"r": 3, "lora_dropout": 0.0, **fields}))
    for layer in model.layers:
        nn.init.normal_(layer.lora_B)
    return model


def linear(kind: str, features_in: int, features_out: int) -> nn.Module:
    if kind == "Conv1D":
        layer = Conv1D(features_out, features_in)
        nn.init.normal_(layer.bias)
        return layer
    return nn.Linear(features_in, features_out, bias=kind == "Linear")


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    kind=st.sampled_from(["Linear", "no bias", "Conv1D"]),
    alpha=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 2**31 - 1),
)
def test_it_equals_the_dense_formula(batch, length, kind, alpha, seed):
    torch.manual_seed(seed)
    model = adapted(linear(kind, 5, 4), lora_alpha=alpha).double()
    layer = model.layers[0]
    x, mask = torch.randn(batch, length, 5).double(), torch.rand(batch, length) < 0.5
    weight = layer.weight if kind == "Conv1D" else layer.weight.T
    truth = x @ weight + (0 if layer.bias is None else layer.bias)
    truth = truth + mask[..., None].double() * (alpha / 3) * (x @ layer.lora_A.T @ layer.lora_B.T)
    with plora_mask(mask):
        ours = model(inputs_embeds=x)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_off_rows_are_the_base_layers_bitwise(dtype):
    torch.manual_seed(0)
    model = adapted(nn.Linear(40, 30).to(dtype))
    x, mask = torch.randn(3, 17, 40, dtype=dtype), torch.rand(3, 17) < 0.5
    with plora_mask(mask):
        out = model(inputs_embeds=x)
    expected = model.layers[0].base_layer(x)
    assert out.dtype == dtype
    assert torch.equal(out[~mask], expected[~mask])
    assert (out[mask] != expected[mask]).any(-1).all()


def test_a_and_b_stay_float32_and_are_cast_to_the_input():
    torch.manual_seed(0)
    model = adapted(nn.Linear(64, 48).bfloat16())
    layer = model.layers[0]
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x, mask = torch.randn(2, 9, 64).bfloat16(), torch.ones(2, 9, dtype=torch.bool)
    with plora_mask(mask):
        out = model(inputs_embeds=x)
    a, b = layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    expected = layer.base_layer(x) + (x @ a.T @ b.T) * layer.updates["default"].scaling
    # bfloat16 sums in an order of its own: three roundings of values up to about 100
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.5)
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_autocast_gives_the_base_layers_dtype():
    model = adapted(nn.Linear(8, 6))
    x, mask = torch.randn(2, 3, 8), torch.tensor([[True, False, False]] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        with plora_mask(mask):
            out = model(inputs_embeds=x)
        expected = model.layers[0].base_layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:, 1:], expected[:, 1:])


def test_gradients_numerically():
    torch.manual_seed(0)
    model = adapted(nn.Linear(4, 3), nn.Linear(3, 4)).double()
    mask = torch.tensor([[True, False, True], [False, True, False]])
    x = torch.randn(2, 3, 4).double().requires_grad_()

    def function(x, *_):
        with plora_mask(mask):
            return model(inputs_embeds=x)

    parameters = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_dropout_acts_on_masked_rows_while_training_only():
    torch.manual_seed(0)
    model = adapted(nn.Linear(200, 8), lora_dropout=0.5)
    layer = model.layers[0]
    with torch.no_grad():  # B A counts the features that are left, at scale 1 / (1 - 0.5)
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1 / 3 / layer.updates["default"].scaling)
    x = torch.ones(1, 4, 200)
    mask = torch.tensor([[True, True, False, False]])
    base = layer.base_layer(x)
    with plora_mask(mask):
        torch.testing.assert_close(
            model.eval()(inputs_embeds=x)[:, :2] - base[:, :2], torch.full((1, 2, 8), 200.0)
        )
        out = model.train()(inputs_embeds=x)
    assert torch.equal(out[:, 2:], base[:, 2:])
    kept = (out - base)[0, :2, 0] / 2
    assert ((kept > 70) & (kept < 130)).all()  # 100 expected, standard deviation 7
    assert kept[0] != kept[1]


def test_random_numbers_are_drawn_for_masked_rows_only():
    model = adapted(nn.Linear(20, 8), lora_dropout=0.5).train()
    x = torch.randn(2, 5, 20)
    states = []
    for rows in (0, 3):
        mask = torch.zeros(2, 5, dtype=torch.bool)
        mask[0, :rows] = True
        torch.manual_seed(0)
        with plora_mask(mask):
            model(inputs_embeds=x)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert not torch.equal(states[1], torch.get_rng_state())


def test_initialisation_is_lora_s():
    torch.manual_seed(0)
    layer = PLoRALinear(nn.Linear(64, 32), PLoRAConfig(r=8, lora_alpha=4))
    assert layer.lora_A.shape == (8, 64)
    assert layer.lora_B.shape == (32, 8)
    assert layer.updates["default"].scaling == 0.5
    assert not layer.lora_B.any()
    bound = 1 / 64**0.5  # Kaiming uniform, a = sqrt(5), fan in 64
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound


def test_flattened_positions_are_understood():
    class Flat(Sequence):
        def forward(self, inputs_embeds):
            return self.layers(inputs_embeds.flatten(0, 1)).unflatten(0, inputs_embeds.shape[:2])

    torch.manual_seed(0)
    plain = adapted(nn.Linear(5, 4))
    flat = apply_plora(Flat(nn.Linear(5, 4)), PLoRAConfig(r=3, lora_dropout=0.0))
    flat.load_state_dict(plain.state_dict())
    x, mask = torch.randn(2, 6, 5), torch.rand(2, 6) < 0.5
    with plora_mask(mask):
        torch.testing.assert_close(flat(inputs_embeds=x), plain(inputs_embeds=x))


def test_a_layer_that_does_not_see_the_sequence_raises():
    class Pooled(Sequence):
        def forward(self, inputs_embeds):
            return self.layers(inputs_embeds.mean(1))

    model = apply_plora(Pooled(nn.Linear(5, 4)), PLoRAConfig(r=3))
    with (
        plora_mask(torch.ones(2, 6, dtype=torch.bool)),
        pytest.raises(ValueError, match="positions of the decoder pass"),
    ):
        model(inputs_embeds=torch.randn(2, 6, 5))


def test_a_bare_call_raises_where_an_update_could_be_lost():
    model = adapted(nn.Linear(5, 4)).eval()
    x = torch.randn(2, 5)
    layer = model.layers[0]
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(ValueError, match="outside of one"):
        layer(x)
    with plora_disabled(model):
        assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(ValueError, match="outside of one"), torch.no_grad():
        layer.train()(x)


def test_only_linear_layers_can_be_wrapped():
    with pytest.raises(TypeError, match="got Embedding"):
        PLoRALinear(nn.Embedding(3, 4), PLoRAConfig())
