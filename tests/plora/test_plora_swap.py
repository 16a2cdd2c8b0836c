"""The configuration, and which layers it picks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from plora import PLoRAConfig, PLoRALinear, apply_plora, remove_plora


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, PLoRALinear)]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: .* got 0"),
        ({"r": 1.5}, TypeError, "r: .* got 1.5"),
        ({"r": True}, TypeError, "r: .* got True"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"target_modules": "q_proj"}, ValueError, r"such as \['q_proj'\]"),
        ({"target_modules": []}, ValueError, "empty list"),
        ({"target_modules": [""]}, ValueError, "empty name"),
        ({"target_modules": [3]}, TypeError, "got 3"),
        ({"target_modules": 3}, TypeError, "list of names"),
        ({"exclude_modules": "q_proj"}, ValueError, r"such as \['q_proj'\]"),
        ({"exclude_modules": 3}, TypeError, "list of names"),
        ({"target_modules": "(q_proj"}, ValueError, "a regular expression, got '.q_proj'"),
        ({"use_dora": 1}, TypeError, "use_dora: expected a bool"),
        ({"use_rslora": "yes"}, TypeError, "use_rslora: expected a bool"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\]: .* got 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, TypeError, r"rank_pattern\['q_proj'\]: .* 1.5"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "a mapping from names"),
        ({"rank_pattern": {"(q": 3}}, ValueError, r"regular expression, got '\(q'"),
        ({"alpha_pattern": {"q_proj": -1}}, ValueError, r"alpha_pattern\['q_proj'\]"),
        ({"alpha_pattern": {3: 1}}, TypeError, "alpha_pattern: expected names"),
        ({"layers_to_transform": 1}, ValueError, "a list of names, got 'all-linear'"),
        ({"target_modules": ["a"], "layers_to_transform": []}, ValueError, "indices of layers"),
        ({"target_modules": ["a"], "layers_to_transform": [-1]}, ValueError, "indices of layers"),
        ({"layers_pattern": "layers"}, ValueError, "layers_to_transform beside it"),
    ],
)
def test_a_bad_field_raises(fields, error, message):
    with pytest.raises(error, match=message):
        PLoRAConfig(**fields)


def test_the_configuration_survives_its_dict():
    config = PLoRAConfig(r=3, lora_alpha=7.5, target_modules=["a", "b"], exclude_modules=["c"])
    assert config.to_dict()["target_modules"] == ["a", "b"]
    assert PLoRAConfig.from_dict(config.to_dict()) == config
    assert PLoRAConfig.from_dict({}) == PLoRAConfig()
    with pytest.raises(ValueError, match="unknown field 'rank'"):
        PLoRAConfig.from_dict({"rank": 3})


def test_the_dict_holds_patterns_and_layers_too():
    config = PLoRAConfig(
        target_modules=["a"],
        use_rslora=True,
        rank_pattern={"a": 2},
        alpha_pattern={"a": 3.5},
        layers_to_transform=[0, 2],
        layers_pattern="layers",
    )
    again = PLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert config.to_dict()["rank_pattern"] == {"a": 2}


@pytest.mark.parametrize(
    ("path", "rank"),
    [
        ("model.layers.0.self_attn.q_proj", 2),
        ("model.layers.0.q_proj", 2),
        ("q_proj", 2),
        ("model.layers.0.my_q_proj", 16),
        ("model.layers.0.q_proj.inner", 16),
        ("model.layers.1.v_proj", 4),
        ("model.layers.11.v_proj", 16),
    ],
)
def test_patterns_match_whole_components_at_the_end_of_a_path(path, rank):
    config = PLoRAConfig(rank_pattern={"q_proj": 2, r"layers\.1\.v_proj": 4})
    assert config.at(path).r == rank


def test_all_linear_takes_the_decoder_and_not_the_head(base):
    inside = {
        path
        for path, module in base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and path != "lm_head"
    }
    assert set(adapted_paths(apply_plora(base, PLoRAConfig(r=2)))) == inside


def test_names_match_whole_components_at_the_end_of_a_path(llama):
    config = PLoRAConfig(r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert adapted_paths(apply_plora(llama, config)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    remove_plora(llama)
    with pytest.raises(ValueError, match=r"'_proj' matches no layer .*'down_proj'"):
        apply_plora(llama, PLoRAConfig(r=2, target_modules=["_proj"]))


def test_excluded_names_are_left_out(llama):
    config = PLoRAConfig(r=2, exclude_modules=["down_proj", "layers.0.self_attn.q_proj"])
    paths = adapted_paths(apply_plora(llama, config))
    assert len(paths) == 14 - 3
    assert not any(path.endswith(("down_proj", "0.self_attn.q_proj")) for path in paths)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["q_proj", "nope"]}, ValueError, "'nope' matches no layer"),
        ({"target_modules": ["lm_head"]}, ValueError, "inside the decoder LlamaModel"),
        ({"target_modules": ["mlp"]}, TypeError, "a LlamaMLP"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
            ValueError,
            "no linear layer is left",
        ),
    ],
)
def test_targets_that_do_not_fit_raise_and_change_nothing(llama, fields, error, message):
    before = [(name, type(module)) for name, module in llama.named_modules()]
    with pytest.raises(error, match=message):
        apply_plora(llama, PLoRAConfig(r=2, **fields))
    assert [(name, type(module)) for name, module in llama.named_modules()] == before
    assert all(p.requires_grad for p in llama.parameters())


def test_applying_twice_and_removing_twice_raise(llama):
    apply_plora(llama, PLoRAConfig(r=2))
    with pytest.raises(ValueError, match="has PLoRA already"):
        apply_plora(llama, PLoRAConfig(r=2))
    remove_plora(llama)
    with pytest.raises(ValueError, match="has no PLoRA"):
        remove_plora(llama)


def test_a_shared_layer_raises():
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'1' and '0' are one and the same"):
        apply_plora(nn.Sequential(shared, shared), PLoRAConfig(r=2))


# peft 0.21 asks transformers 5.23 for a name that it has deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_another_adapter_in_the_model_raises(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="wrapped by another adapter"):
        apply_plora(model.base_model.model, PLoRAConfig(r=2))


def test_removing_from_a_model_around_raises(llama):
    apply_plora(llama, PLoRAConfig(r=2))
    with pytest.raises(ValueError, match="not the model that PLoRA was applied to"):
        remove_plora(nn.ModuleDict({"llm": llama}))
    remove_plora(llama)


def test_frozen_parameters_stay_frozen_after_removal(llama):
    llama.model.embed_tokens.requires_grad_(False)
    before = {name: p.requires_grad for name, p in llama.named_parameters()}
    remove_plora(apply_plora(llama, PLoRAConfig(r=2)))
    assert {name: p.requires_grad for name, p in llama.named_parameters()} == before


def test_the_wrapper_takes_over_mode_device_and_attributes():
    layer = nn.Linear(4, 6, device="meta").eval()
    wrapped = PLoRALinear(layer, PLoRAConfig(r=2))
    assert not wrapped.training
    assert wrapped.lora_A.device.type == "meta"
    assert wrapped.weight is layer.weight
    assert wrapped.bias is layer.bias
    assert (wrapped.in_features, wrapped.out_features) == (4, 6)


def test_a_module_initialiser_that_goes_by_type_leaves_b_at_zero(llama):
    model = apply_plora(llama, PLoRAConfig(r=2))

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)

    model.apply(initialise)
    layers = [m for m in model.modules() if isinstance(m, PLoRALinear)]
    assert layers
    assert not torch.cat([layer.lora_B.flatten() for layer in layers]).any()
