"""Saving and loading, and PEFT reading the same files."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

from plora import (
    PLoRAConfig,
    apply_plora,
    load_plora,
    load_plora_state_dict,
    plora_mask,
    plora_state_dict,
    save_plora,
)


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def logits(model, embeds, mask):
    with plora_mask(mask):
        return model(inputs_embeds=embeds).logits


def test_save_and_load_bring_back_the_model(base, embeds, span, randomised, tmp_path):
    model = randomised(base)
    mask = span(9, (2, 5), (4, 7))
    expected = logits(model, embeds, mask)
    save_plora(model, tmp_path / "adapter")
    fresh = load_plora(copy.deepcopy(base), str(tmp_path / "adapter"))
    saved, loaded = plora_state_dict(model), plora_state_dict(fresh)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name].double()) for name in saved)
    # the file keeps float64; a fresh A and B are float32, so this model's are widened again
    for module in fresh.modules():
        if hasattr(module, "lora_A"):
            module.double()
    load_plora(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, embeds, mask), expected)


def test_the_files_are_named_as_peft_names_them(llama, tmp_path):
    save_plora(apply_plora(llama, PLoRAConfig(r=4, target_modules=["q_proj"])), tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{x}.weight"
        for layer in (0, 1)
        for x in "AB"
    }
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["target_modules"]) == ("LORA", 4, ["q_proj"])
    values = json.loads((tmp_path / "plora_config.json").read_text())
    assert values.pop("format") == 1
    assert PLoRAConfig.from_dict(values) == PLoRAConfig(r=4, target_modules=["q_proj"])
    assert "PEFT" in (tmp_path / "README.md").read_text()


def test_an_existing_readme_is_kept(llama, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_plora(apply_plora(llama, PLoRAConfig(r=4)), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


# peft 0.21 asks transformers 5.23 for a name that it has deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "fields", [{}, {"exclude_modules": ["layers.1.mlp.down_proj", "h.1.mlp.c_proj"]}]
)
def test_peft_loads_the_files_and_an_all_ones_mask_equals_it(
    base, embeds, span, randomised, tmp_path, fields
):
    peft = pytest.importorskip("peft")
    if base.config.model_type == "deepseek_v3":
        pytest.skip("in models with experts PEFT 0.21 takes gate_proj for a name of fused experts")
    model = randomised(base, **fields)
    save_plora(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what PEFT says of missing or unknown names
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False
        ).double()
    adapters = {
        name.replace(".default.weight", ".weight"): value
        for name, value in theirs.state_dict().items()
        if "lora_" in name
    }
    ours = plora_state_dict(model)
    assert adapters.keys() == ours.keys()
    assert all(torch.equal(adapters[name], ours[name]) for name in ours)
    everywhere = span(9, (0, 9), (0, 9))
    assert torch.equal(logits(model, embeds, everywhere), theirs(inputs_embeds=embeds).logits)


def damaged(state_dict, how):
    name = next(iter(state_dict))
    if how == "is missing":
        del state_dict[name]
    elif how == "is unexpected":
        state_dict["base_model.model.other.lora_A.weight"] = torch.zeros(1)
    else:
        state_dict[name] = state_dict[name][:, :3]
    return state_dict


@pytest.mark.parametrize("how", ["is missing", "is unexpected", "expected shape"])
def test_a_state_dict_that_does_not_fit_raises_and_changes_nothing(llama, randomised, how):
    model = randomised(llama)
    before = {name: value.clone() for name, value in plora_state_dict(model).items()}
    other = damaged({name: value + 1 for name, value in before.items()}, how)
    with pytest.raises(ValueError, match=rf"{how}.* it belongs to another base model"):
        load_plora_state_dict(model, other)
    assert all(torch.equal(plora_state_dict(model)[name], before[name]) for name in before)


def test_what_was_saved_for_another_base_model_raises_and_leaves_the_base_plain(
    llama, randomised, tmp_path
):
    save_plora(randomised(llama), tmp_path)
    wide = copy.deepcopy(llama.config)
    wide.intermediate_size = 40
    other = type(llama)(wide)
    before = list(other.state_dict())
    with pytest.raises(ValueError, match="another base model"):
        load_plora(other, tmp_path)
    assert list(other.state_dict()) == before
    assert all(p.requires_grad for p in other.parameters())


def test_another_rank_in_the_model_raises(llama, randomised, tmp_path):
    save_plora(randomised(llama), tmp_path)
    with pytest.raises(ValueError, match="r=4 and lora_alpha=6"):
        load_plora(randomised(llama, r=2), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"not safetensors", "is damaged"),
        ("plora_config.json", b"{", "is no JSON"),
        ("plora_config.json", b"\xff", "is no JSON"),
        ("plora_config.json", b"[]", "expected format 1, got None"),
        ("plora_config.json", b'{"format": 2}', "expected format 1, got 2"),
        ("plora_config.json", b'{"format": 1, "rank": 2}', "unknown field 'rank'"),
    ],
)
def test_damaged_files_raise(llama, randomised, tmp_path, name, content, message):
    save_plora(randomised(llama), tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_plora(llama, tmp_path)


def test_a_missing_folder_raises(llama, tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match=r"has no plora_config\.json, nor"):
        load_plora(llama, tmp_path)


def test_a_pickled_model_still_follows_the_mask(llama, randomised, span):
    model = randomised(llama)
    ids = torch.arange(8).view(2, 4)
    again = pickle.loads(pickle.dumps(model))
    with plora_mask(span(4, (0, 2), (1, 4))):
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.equal(llama(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("function", [plora_state_dict, lambda m: load_plora_state_dict(m, {})])
def test_a_model_without_plora_raises(llama, function):
    with pytest.raises(ValueError, match="has no PLoRA"):
        function(llama)
