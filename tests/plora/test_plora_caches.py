"""Where a pass starts, told by caches that are not transformers' own or that were emptied."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig

from plora import PLoRAConfig, apply_plora, past, plora_mask

CONFIG = PLoRAConfig(r=2, lora_dropout=0.0)


class Decoder(nn.Module):
    """One layer, and whatever stands for a cache in its arguments and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs_embeds, past_key_values=None, state=None, gives=None):
        return SimpleNamespace(out=self.layer(inputs_embeds), **(gives or {}))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = apply_plora(Decoder(), CONFIG).eval()
    nn.init.normal_(model.layer.lora_B)
    return model


KEYS = torch.zeros(2, 1, 3, 8)  # (batch, heads, positions, width)


@pytest.mark.parametrize(
    "gives",
    [
        {"past_key_values": ((KEYS, KEYS), (KEYS, KEYS))},
        {"past_key_values": [[KEYS, KEYS]]},
        {"past_key_values": ((None, None),)},
        {"past_key_values": ()},
        {"state": {"layer": KEYS}},
    ],
    ids=["tuples", "lists", "tuples of nothing", "empty", "a dict"],
)
def test_a_pass_that_returns_one_runs_with_and_without_a_mask(model, span, gives):
    x = torch.randn(2, 4, 4)
    plain = model(x, gives=gives).out
    with plora_mask(span(4, (1, 3), (0, 2))):
        assert not torch.equal(model(x, gives=gives).out, plain)


@pytest.mark.parametrize("layers", [((KEYS, KEYS),), [[KEYS, KEYS]]], ids=["tuples", "lists"])
def test_tuples_of_keys_and_values_are_as_long_as_their_keys(model, span, layers):
    x, mask = torch.randn(2, 2, 4), span(5, (2, 4), (4, 5))
    with plora_mask(mask):
        found = model(x, past_key_values=layers).out
    with plora_mask(mask[:, 3:]):
        expected = model(x).out
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(x).out)


def test_going_on_from_a_dict_is_refused_under_a_mask_only(model, span):
    x = torch.randn(2, 2, 4)
    model(x, state={"layer": KEYS})
    with plora_mask(span(5, (2, 4), (4, 5))), pytest.raises(ValueError, match="filled elsewhere"):
        model(x, state={"layer": KEYS})


@pytest.fixture
def mamba(randomised):
    config = MambaConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.4
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    return randomised(base, exclude_modules=["dt_proj"])


@pytest.mark.parametrize("first", ["masked", "unmasked"])
@torch.no_grad()
def test_a_recurrent_cache_that_was_reset_starts_at_the_first_position(mamba, span, first):
    ids, mask = torch.arange(3, 15).view(2, 6), span(6, (1, 5), (2, 6))
    with plora_mask(mask):
        whole = mamba(input_ids=ids, use_cache=True)
    cache = whole.cache_params
    cache.reset()
    if first == "unmasked":  # what this pass writes counts from zero as well
        mamba(input_ids=ids, cache_params=cache, use_cache=True)
        with plora_mask(torch.cat([mask.new_zeros(2, 6), mask], 1)):
            found = mamba(input_ids=ids[:, :1], cache_params=cache, use_cache=True).logits
        assert past.past_length({"cache_params": cache}) == 7
        assert found.isfinite().all()
        return
    with plora_mask(mask):
        again = mamba(input_ids=ids, cache_params=cache, use_cache=True).logits
    torch.testing.assert_close(again, whole.logits)
    assert not torch.allclose(again, mamba(input_ids=ids).logits)


@torch.no_grad()
def test_what_is_counted_of_a_cache_goes_with_it(mamba):
    gc.collect()
    before = len(past._seen)
    out = mamba(input_ids=torch.arange(3, 9)[None], use_cache=True)
    assert len(past._seen) == before + 1
    del out
    gc.collect()
    assert len(past._seen) == before
