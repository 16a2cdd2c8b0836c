"""Layers of a decoder that do not see its sequence: left out visibly, or refused if named."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    ModernBertDecoderConfig,
)

from plora import (
    PLoRAConfig,
    PLoRALinear,
    apply_plora,
    plora_mask,
    remove_plora,
    unadapted_layers,
)
from plora.decoder import find_decoder

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


class Router(nn.Linear):
    """Scores, and what was chosen by them: not what a linear layer returns."""

    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores.argmax(-1)


class Encoder(nn.Module):
    """Of another modality, said in the way of transformers' models."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


class Mixed(nn.Module):
    """A decoder with everything in it that a mask of positions does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)
        self.router = Router(4, 3)
        self.read = nn.Linear(4, 4)
        self.grouped = nn.Linear(2, 2)
        self.encoder = Encoder()

    def forward(self, inputs_embeds):
        x = self.plain(inputs_embeds) @ self.read.weight + self.encoder(torch.ones(1, 7, 4)).sum()
        scores, _ = self.router(x)
        x = x + self.grouped(x.unflatten(-1, (2, 2))).flatten(2)
        return x * scores.sum(-1, keepdim=True) + self.pooler(x[:, 0])[:, None]


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def test_all_linear_leaves_them_out_once_and_says_so(inputs, span):
    torch.manual_seed(0)
    base = Mixed()
    model = apply_plora(copy.deepcopy(base), PLoRAConfig(r=2, lora_dropout=0.0))
    assert unadapted_layers(model) == {
        "encoder.layer": "it is inside a Encoder, which reads pixel_values"
    }
    for layer in (model.plain, model.pooler, model.router, model.read, model.grouped):
        nn.init.normal_(layer.lora_B)
    with plora_mask(span(5, (1, 3), (2, 5))):
        with pytest.warns(UserWarning, match=r"4 of 5 layers are not adapted.*unadapted_layers"):
            out = model(inputs_embeds=inputs)
        again = model(inputs_embeds=inputs)  # the warning came once: here it would be an error
    assert torch.equal(out, again)
    reasons = unadapted_layers(model)
    assert set(reasons) == {"encoder.layer", "pooler", "router", "read", "grouped"}
    assert "did not call it" in reasons["read"]
    assert "(2, 5, 2, 2)" in reasons["grouped"]
    out.sum().backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {"plain.lora_A", "plain.lora_B"}
    # only what sees the sequence was adapted
    with torch.no_grad():
        base.plain.weight += (
            model.plain.updates["default"].scaling * model.plain.lora_B @ model.plain.lora_A
        )
        masked = span(5, (0, 5), (0, 5))
        with plora_mask(masked):
            everywhere = model(inputs_embeds=inputs)
        torch.testing.assert_close(everywhere, base(inputs_embeds=inputs))


@pytest.mark.parametrize("name", ["pooler", "router", "grouped"])
def test_a_named_layer_that_does_not_fit_raises(inputs, span, name):
    model = apply_plora(Mixed(), PLoRAConfig(r=2, target_modules=[name]))
    with (
        plora_mask(span(5, (1, 3), (2, 5))),
        pytest.raises(ValueError, match="put it in exclude_modules"),
    ):
        model(inputs_embeds=inputs)


def test_excluded_layers_are_no_longer_reported(inputs, span):
    config = PLoRAConfig(r=2, exclude_modules=["pooler", "router", "read", "grouped"])
    model = apply_plora(Mixed(), config)
    with plora_mask(span(5, (1, 3), (2, 5))):
        model(inputs_embeds=inputs).sum().backward()
    assert set(unadapted_layers(model)) == {"encoder.layer"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_pass_that_raises_settles_nothing(inputs, span):
    model = apply_plora(Mixed(), PLoRAConfig(r=2))
    with plora_mask(span(5, (1, 3), (2, 5))):
        with pytest.raises(RuntimeError):
            model(inputs_embeds=inputs[..., :3])
        with pytest.warns(UserWarning, match="4 of 5 layers"):
            model(inputs_embeds=inputs)
    assert not any(layer._forward_pre_hooks for layer in model.modules() if layer is not model)


def test_a_layer_that_stops_seeing_the_sequence_later_says_so(inputs, span):
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs_embeds, pooled=False):
            x = self.first(inputs_embeds)
            return self.second(x[:, 0] if pooled else x)

    model = apply_plora(Sometimes(), PLoRAConfig(r=2))
    with plora_mask(span(5, (1, 3), (2, 5))):
        model(inputs_embeds=inputs)
        with pytest.warns(UserWarning, match="this layer does not see the sequence"):
            model(inputs_embeds=inputs, pooled=True)
        model(inputs_embeds=inputs, pooled=True)  # once: a second warning would be an error
    assert set(unadapted_layers(model)) == {"second"}


def test_a_decoder_none_of_whose_layers_fits_raises(span):
    class TimeFirst(nn.Sequential):
        def forward(self, inputs_embeds):
            return super().forward(inputs_embeds.transpose(0, 1)).transpose(0, 1)

    model = apply_plora(TimeFirst(nn.Linear(4, 4), nn.Linear(4, 4)), PLoRAConfig(r=2))
    with (
        plora_mask(span(5, (1, 3), (2, 5))),
        pytest.raises(ValueError, match="none of its 2 adapted layers"),
    ):
        model(inputs_embeds=torch.randn(2, 5, 4))


def test_a_model_without_plora_raises(llama):
    with pytest.raises(ValueError, match="has no PLoRA"):
        unadapted_layers(llama)


def test_a_head_that_calls_itself_decoder_is_not_the_decoder(span):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(ModernBertDecoderConfig(**TINY)).eval()
    assert base.get_decoder() is base.get_output_embeddings()
    assert find_decoder(base) is base.model
    assert find_decoder(base.model) is base.model


def test_where_the_decoder_is_the_whole_model_the_head_is_left_alone(span):
    config = Llama4TextConfig(
        **TINY, num_key_value_heads=1, head_dim=8, num_local_experts=2, intermediate_size_mlp=24
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    assert base.get_decoder() is base
    assert find_decoder(base) is base.model
    ids = torch.arange(3, 15).view(2, 6)
    expected = base(input_ids=ids).logits
    model = apply_plora(base, PLoRAConfig(r=2))
    assert not isinstance(model.lm_head, PLoRALinear)
    with plora_mask(span(6, (1, 3), (2, 5))):
        with pytest.warns(UserWarning, match="Llama4Router"):
            out = model(input_ids=ids).logits
        torch.testing.assert_close(out, expected, rtol=0, atol=0)  # B is zero
        hidden = model.model(input_ids=ids).last_hidden_state  # no head, the same positions
    assert hidden.shape == (2, 6, 16)
    assert torch.equal(remove_plora(model)(input_ids=ids).logits, expected)


def test_the_head_of_a_decoder_that_is_the_model_is_reported():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.head

        def forward(self, inputs_embeds):
            return self.head(self.layer(inputs_embeds)[:, -1:])

    model = apply_plora(Whole(), PLoRAConfig(r=2))
    assert unadapted_layers(model) == {"head": "it is the vocabulary head"}
    named = apply_plora(Whole(), PLoRAConfig(r=2, target_modules=["layer", "head"]))
    assert isinstance(named.head, PLoRALinear)


@pytest.fixture
def mamba() -> nn.Module:
    config = MambaConfig(
        **{k: v for k, v in TINY.items() if "attention" not in k},
        state_size=4,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted_mamba(mamba, randomised):
    model = randomised(mamba, exclude_modules=["dt_proj"])  # its weight is read, it is not called
    return model


@pytest.mark.parametrize("made_by", ["model", "caller"])
def test_positions_go_on_after_a_recurrent_cache(mamba, randomised, span, made_by):
    model = adapted_mamba(mamba, randomised)
    ids = torch.arange(3, 21).view(2, 9)
    with plora_mask(span(9, (0, 6), (3, 8))), torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = {}
        if made_by == "caller":
            cache = {"cache_params": type(model(input_ids=ids).cache_params)(config=model.config)}
        first = model(input_ids=ids[:, :5], use_cache=True, **cache)
        parts = [first.logits]
        for step in range(5, 9):
            out = model(input_ids=ids[:, step : step + 1], cache_params=first.cache_params)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
        pickle.loads(pickle.dumps(model))  # what is counted does not hinder it


def test_a_recurrent_cache_of_unknown_origin_raises(mamba, randomised, span):
    model = adapted_mamba(mamba, randomised)
    ids = torch.arange(3, 21).view(2, 9)
    with torch.no_grad():
        filled = model(input_ids=ids, use_cache=True).cache_params
        with (
            plora_mask(span(12, (0, 6), (3, 8))),
            pytest.raises(ValueError, match="filled elsewhere or copied"),
        ):
            model(input_ids=ids[:, :1], cache_params=copy.deepcopy(filled))
        model(input_ids=ids[:, :1], cache_params=copy.deepcopy(filled))  # no mask, no question
