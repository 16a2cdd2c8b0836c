"""Models whose values are on the meta device: offloaded by accelerate, or not loaded yet."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch

from plora import PLoRAConfig, PLoRALinear, apply_plora, load_plora, save_plora

IDS = torch.arange(3, 11).view(2, 4)


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device="cpu")


def test_what_is_offloaded_already_is_refused_and_left_alone(llama, randomised, tmp_path):
    save_plora(randomised(llama), tmp_path)
    expected = llama(input_ids=IDS).logits
    model = offloaded(copy.deepcopy(llama))
    for put in (
        lambda: apply_plora(model, PLoRAConfig(r=2)),
        lambda: load_plora(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"as offloading .* does; apply or load PLoRA first"):
            put()
    assert not any(isinstance(module, PLoRALinear) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_offloading_afterwards_keeps_the_adapter(llama, randomised, span, tmp_path):
    model, mask = randomised(llama), span(4, (1, 3), (0, 2))
    save_plora(model, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=IDS, plora_mask=mask).logits
        model = offloaded(model)
        assert model.model.layers[0].self_attn.q_proj.lora_A.is_meta
        assert torch.equal(model(input_ids=IDS, plora_mask=mask).logits, expected)
    with pytest.raises(ValueError, match="before the model is offloaded"):
        load_plora(model, tmp_path)
    with pytest.raises(ValueError, match="before the model is offloaded"):
        save_plora(model, tmp_path)


def test_a_model_that_is_not_loaded_yet_can_be_adapted(llama, randomised, tmp_path):
    save_plora(randomised(llama), tmp_path)
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    model = apply_plora(empty, PLoRAConfig(r=4, lora_alpha=6, lora_dropout=0.0))
    with pytest.raises(ValueError, match="to_empty"):
        load_plora(model, tmp_path)
    load_plora(model.to_empty(device="cpu"), tmp_path)
