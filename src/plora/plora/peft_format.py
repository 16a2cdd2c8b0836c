"""PEFT's names and its adapter_config.json, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from plora.bases import is_conv1d
from plora.config import DEFAULT, PLoRAConfig
from plora.layer import PLoRALinear
from plora.names import unwrapped
from plora.swap import plora_layers

PREFIX = "base_model.model."

_FIELDS = {field.name for field in fields(PLoRAConfig)}
# What would change the update, with the value that leaves it alone besides None, {} and []
_PLAIN: dict[str, Any] = {"bias": "none", "lora_bias": False, "use_qalora": False}
_REFUSED = (
    *_PLAIN,
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Initialisers after which the base model is the one that was downloaded. The others (PiSSA, OLoRA,
# CorDA, LoftQ, LoRA-GA) take something out of its weights that A and B put back.
_INITIALISERS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def parameters_of(model: nn.Module, modality: str | None = None) -> dict[str, nn.Parameter]:
    """A, B and magnitudes of every adapted layer by the names that PEFT gives them.

    Args:
        model: A model with PLoRA.
        modality: Only of this one, under the names of a file that holds one adapter; None for all,
            with the modality in the names if it has one.
    """
    found = {}
    for path, layer in plora_layers(model).items():
        for name in layer.updates if modality is None else (modality,):
            if name not in layer.updates:
                continue
            infix = f".{name}" if modality is None and name != DEFAULT else ""
            for kind, parameter in layer.trained(name).items():
                # PEFT's files say so of matrices only
                suffix = "" if kind == "lora_magnitude_vector" else ".weight"
                found[f"{PREFIX}{path}.{kind}{infix}{suffix}"] = parameter
    return found


def to_peft(model: nn.Module, config: PLoRAConfig, modality: str = DEFAULT) -> dict[str, Any]:
    """The adapter_config.json of one modality: a LoRA adapter of just the layers it adapts."""
    layers: dict[str, PLoRALinear] = {
        path: layer for path, layer in plora_layers(model).items() if modality in layer.updates
    }
    generates = hasattr(model, "prepare_inputs_for_generation")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if generates else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": _targets(model, set(layers)),
        "bias": "none",
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in layers.values()),
    }


def from_peft(values: Mapping[str, Any]) -> PLoRAConfig:
    """The configuration that an adapter_config.json of PEFT describes.

    Raises:
        ValueError: It is no LoRA, or it changes more than `PLoRAConfig` can say, such as the base
            model, by its initialiser.
    """
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"adapter_config.json: expected peft_type LORA, got {values.get('peft_type')!r}; only "
            "LoRA adapters can be read"
        )
    for name in _REFUSED:
        value = values.get(name)
        if value and value != _PLAIN.get(name):
            raise ValueError(
                f"adapter_config.json: expected {name} to be {_PLAIN.get(name)!r}, got {value!r}, "
                "which Partial LoRA has nothing for; merge or retrain that part"
            )
    initialiser = values.get("init_lora_weights")
    if initialiser not in _INITIALISERS:
        raise ValueError(
            f"adapter_config.json: expected init_lora_weights to be one of {_INITIALISERS}, got "
            f"{initialiser!r}, which changes the base model as well; let PEFT write it as a plain "
            "LoRA, by save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    # PEFT writes null, or an empty list, for what is not set
    known = {
        name: value
        for name, value in values.items()
        if name in _FIELDS and value is not None and value != []
    }
    if "layers_to_transform" not in known:
        known.pop("layers_pattern", None)
    # PEFT's own defaults, not ours
    return PLoRAConfig.from_dict({"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, **known})


def _targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Last names of the adapted paths if PEFT would find just these layers by them, else paths."""
    short = {path.rpartition(".")[2] for path in adapted}
    found = {
        path
        for path in (unwrapped(name) for name, _ in model.named_modules())
        if path.rpartition(".")[2] in short and ".base_layer." not in f"{path}."
    }
    return sorted(short if found == adapted else adapted)
