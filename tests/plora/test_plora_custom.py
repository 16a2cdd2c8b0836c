"""Decoders of one's own: how they are called, and how they call their layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_disabled, plora_mask
from plora import unadapted_layers as unadapted

CONFIG = PLoRAConfig(r=2, lora_dropout=0.0)
MASK = torch.tensor([[True, False, True, False], [False, False, True, True]])


def adapted(base, config=CONFIG):
    torch.manual_seed(0)
    model = apply_plora(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, attention_mask=None):
        return self.layer(x)


class Positional(Plain):
    def forward(self, *args, **kwargs):
        return self.layer(args[0])


class ByKeyword(Plain):
    def forward(self, x):
        return self.layer(input=x)


class OfADict(Plain):
    def forward(self, batch):
        return self.layer(batch["x"])


@pytest.fixture
def x():
    return torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))


def check(model, hidden_states, *args, **kwargs):
    """That the masked positions, and no others, are adapted."""
    plain = model.layer.base_layer(hidden_states)
    assert torch.equal(model(*args, **kwargs), plain)
    with plora_mask(MASK):
        found = model(*args, **kwargs)
    assert torch.equal((found != plain).any(-1), MASK)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (4, 4), (3, 3)])
def test_positions_are_those_of_the_first_argument_however_it_is_given(x, shape):
    model, mask = adapted(Plain()), torch.ones(shape)
    check(model, x, x, attention_mask=mask)
    check(model, x, attention_mask=mask, x=x)
    check(model, x, x, mask)


def test_arguments_without_a_name(x):
    check(adapted(Positional()), x, x)
    check(adapted(Positional()), x, x, torch.ones(3, 3), other=torch.ones(5, 5))


def test_a_layer_called_by_keyword(x):
    check(adapted(ByKeyword()), x, x)


def test_where_no_argument_is_a_sequence_only_a_mask_raises(x):
    model = adapted(OfADict())
    assert torch.equal(model({"x": x}), model.layer.base_layer(x))
    with plora_mask(MASK), pytest.raises(ValueError, match=r"OfADict: expected input_ids .*batch"):
        model({"x": x})


@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_of_none(grad):
    model = adapted(Plain()).train(grad)
    with torch.set_grad_enabled(grad), plora_mask(MASK[:0]):
        found = model(torch.randn(0, 4, 4))
    assert found.shape == (0, 4, 4)
    if grad:
        found.sum().backward()
        assert not model.layer.lora_B.grad.any()
    with plora_mask(MASK[:0]), pytest.raises(ValueError, match="batch of 2"):
        model(torch.randn(2, 4, 4))


def test_a_layer_outside_of_a_decoder_raises_wherever_a_mask_would_be_lost(x):
    layer = PLoRALinear(nn.Linear(4, 4), CONFIG).eval()
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))
        with plora_mask(MASK):
            with pytest.raises(ValueError, match="A layer alone needs a module around it"):
                layer(x)
            with plora_disabled(adapted(Plain())), pytest.raises(ValueError, match="outside"):
                layer(x)
    model = adapted(nn.Sequential(layer.base_layer)).eval()
    with torch.no_grad(), plora_mask(MASK), plora_disabled(model):
        assert torch.equal(model[0](x), layer.base_layer(x))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pooler = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs_embeds):
        return self.layer(inputs_embeds) + self.pooler(inputs_embeds[:, 0])[:, None]


def test_what_was_left_out_stays_the_base_models_also_where_its_input_would_fit(x):
    model = adapted(Pooled())
    with torch.no_grad(), plora_mask(MASK), pytest.warns(UserWarning, match="'pooler'"):
        model(x)
    nn.init.zeros_(model.layer.lora_B)
    with torch.no_grad():
        plain = model(x[:, :1])
        with plora_mask(MASK[:, :1]):
            assert torch.equal(model(x[:, :1]), plain)
    assert set(unadapted(model)) == {"pooler"}


class Twice(nn.Module):
    """Calls one layer with the sequence, and with a start state besides, as Zaya does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs_embeds):
        start = self.layer(inputs_embeds.new_zeros(2, 1, 4))
        return self.layer(inputs_embeds) + start


def test_a_layer_of_which_one_call_fits_is_adapted_there_in_all_passes(x):
    model = adapted(Twice())
    with plora_mask(MASK):
        with pytest.warns(UserWarning, match="layers are not adapted"):
            first = model(x)
        assert torch.equal(model(x), first)
    assert torch.equal((first != model(x)).any(-1), MASK)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.router = nn.Linear(4, 4), Router(4, 4)

    def forward(self, inputs_embeds):
        return self.layer(inputs_embeds) * self.router(inputs_embeds)[0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_first_pass_that_leaves_a_layer_out_can_be_recomputed(x, use_reentrant):
    grads = []
    for checkpointing in (False, True):
        model, inputs = adapted(Routed()).train(), x.clone().requires_grad_()

        def call(hidden_states, model=model):
            return model(hidden_states, plora_mask=MASK)

        with pytest.warns(UserWarning, match="'router'"):
            out = (
                checkpoint(call, inputs, use_reentrant=use_reentrant)
                if checkpointing
                else call(inputs)
            )
        out.square().sum().backward()
        grads.append(model.layer.lora_B.grad)
    assert torch.equal(*grads)


class Dropped(nn.Module):
    """The second layer runs in some passes only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs_embeds, both=True):
        x = self.first(inputs_embeds)
        return self.second(x) if both else x


def test_a_layer_that_the_first_pass_did_not_call_is_adapted_once_it_is(x):
    model = adapted(Dropped())
    with plora_mask(MASK):
        with pytest.warns(UserWarning, match="did not call it"):
            model(x, both=False)
        nn.init.zeros_(model.first.lora_B)
        found = model(x)
    with plora_disabled(model):
        assert torch.equal((found != model(x)).any(-1), MASK)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.outside = nn.Linear(8, 8)

    def forward(self, inputs_embeds):
        return self.outside(self.inside(inputs_embeds))


def test_layers_whose_weight_is_read_in_evaluation_mode_only_are_left_out_or_refused():
    x = torch.randn(2, 4, 8)
    model = adapted(Encoder())
    names = {"inside.linear1", "inside.linear2", "inside.self_attn.out_proj"}
    assert set(unadapted(model)) == names
    assert all("in evaluation mode reads its weight" in why for why in unadapted(model).values())
    with plora_mask(MASK), torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x))
    with pytest.raises(ValueError, match=r"'inside.linear1': .* put it in exclude_modules"):
        apply_plora(Encoder(), PLoRAConfig(r=2, target_modules=["linear1", "outside"]))
