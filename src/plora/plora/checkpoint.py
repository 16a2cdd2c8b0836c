"""A and B on disk, in PEFT's files and names so that its tools read them; safetensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plora.bases import is_conv1d
from plora.config import DEFAULT, PLoRAConfig
from plora.decoder import find_scope
from plora.swap import Model, apply_plora, plora_layers, remove_plora, require_scope

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
PLORA_CONFIG_FILE = "plora_config.json"
CARD_FILE = "README.md"

_PREFIX = "base_model.model."
_FORMAT = 1


def plora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, under PEFT's names.

    Args:
        model: A model with PLoRA. Paths count from this model, so load into the same one.

    Returns:
        ``base_model.model.<path>.lora_A.weight`` (r, K) and ``...lora_B.weight`` (N, r) to detached
        tensors that share memory with the model's.

    Raises:
        ValueError: The model has no PLoRA.
    """
    require_scope(model)
    return {name: parameter.detach() for name, parameter in _parameters(model).items()}


def load_plora_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy values into the A and B of `model`; their dtype and device stay.

    Args:
        model: A model with PLoRA.
        state_dict: As `plora_state_dict` returns it; it has to have every name, and no other.

    Raises:
        ValueError: The model has no PLoRA, or names or shapes differ. Nothing is changed then.
    """
    require_scope(model)
    parameters = _parameters(model)
    missing, unexpected = parameters.keys() - state_dict.keys(), state_dict.keys() - parameters
    if missing or unexpected:
        what = f"{min(missing)!r} is missing" if missing else f"{min(unexpected)!r} is unexpected"
        raise ValueError(
            f"state_dict: {what} ({len(missing)} missing, {len(unexpected)} unexpected); it "
            "belongs to another base model or other target_modules"
        )
    for name, parameter in parameters.items():
        if state_dict[name].shape != parameter.shape:
            raise ValueError(
                f"state_dict: {name!r} expected shape {tuple(parameter.shape)}, got "
                f"{tuple(state_dict[name].shape)}; it belongs to another base model or rank"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state_dict[name])


def save_plora(model: nn.Module, directory: str | Path) -> None:
    """Write A and B, and what is needed to apply them, into `directory`.

    ``adapter_model.safetensors`` and ``adapter_config.json`` are a LoRA adapter as PEFT reads it;
    ``plora_config.json`` says that it is meant for masked positions only. A model card is written
    if there is no README.md yet.

    Args:
        model: A model with PLoRA.
        directory: Created if need be; the files of an earlier save are replaced.

    Raises:
        ValueError: The model has no PLoRA.
    """
    _, scope = require_scope(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = {name: value.cpu().contiguous() for name, value in plora_state_dict(model).items()}
    save_file(state_dict, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / PEFT_CONFIG_FILE, _peft_config(model, scope.configs[DEFAULT]))
    _write_json(folder / PLORA_CONFIG_FILE, {"format": _FORMAT, **scope.configs[DEFAULT].to_dict()})
    if not (folder / CARD_FILE).exists():
        (folder / CARD_FILE).write_text(_card(model, scope.configs[DEFAULT]), encoding="utf-8")


def load_plora(model: Model, directory: str | Path) -> Model:
    """Apply what `save_plora` wrote to `model`, in place.

    Args:
        model: The base model, or one that has PLoRA of the same rank and targets already, whose A
            and B are then replaced.
        directory: Where the files are.

    Returns:
        `model` itself.

    Raises:
        ValueError: A file is missing or damaged, or the files belong to another base model. A model
            that had no PLoRA before has none then.
    """
    folder = Path(directory)
    for name in (PLORA_CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"directory: {folder} has no {name}; expected what save_plora wrote")
    config = _read_config(folder / PLORA_CONFIG_FILE)
    try:
        state_dict = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(
            f"directory: {folder / WEIGHTS_FILE} is damaged ({error}); save it again"
        ) from error
    found = find_scope(model)
    if found is None:
        return _apply_and_load(model, config, state_dict)
    present = found[1].configs[DEFAULT]
    if (present.r, present.scaling) != (config.r, config.scaling):
        raise ValueError(
            f"model: expected PLoRA with r={config.r} and lora_alpha={config.lora_alpha:g} as in "
            f"{folder}, got r={present.r} and lora_alpha={present.lora_alpha:g}; call "
            "remove_plora(model) first"
        )
    load_plora_state_dict(model, state_dict)
    return model


def _apply_and_load(model: Model, config: PLoRAConfig, state_dict: Mapping[str, Tensor]) -> Model:
    apply_plora(model, config)
    try:
        load_plora_state_dict(model, state_dict)
    except ValueError:
        remove_plora(model)
        raise
    return model


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{_PREFIX}{path}.{name}.weight": getattr(layer, name)
        for path, layer in plora_layers(model).items()
        for name in ("lora_A", "lora_B")
    }


def _peft_config(model: nn.Module, config: PLoRAConfig) -> dict[str, Any]:
    layers = plora_layers(model)
    generates = hasattr(model, "prepare_inputs_for_generation")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if generates else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _peft_targets(model, set(layers)),
        "bias": "none",
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in layers.values()),
    }


def _peft_targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Last names of the adapted paths if PEFT would find just these layers by them, else paths."""
    short = {path.rpartition(".")[2] for path in adapted}
    found = {
        path
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in short and ".base_layer." not in f"{path}."
    }
    return sorted(short if found == adapted else adapted)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_config(path: Path) -> PLoRAConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what a file that is not UTF-8 raises
        raise ValueError(f"directory: {path} is no JSON ({error}); save it again") from error
    version = values.pop("format", None) if isinstance(values, dict) else None
    if version != _FORMAT:
        raise ValueError(
            f"directory: {path} expected format {_FORMAT}, got {version!r}; it was written by "
            "another version of this package"
        )
    return PLoRAConfig.from_dict(values)


def _card(model: nn.Module, config: PLoRAConfig) -> str:
    base = getattr(model, "name_or_path", None) or type(model).__name__
    return f"""---
library_name: plora
---

# Partial LoRA adapter for {base}

Rank {config.r}, scale {config.scaling:g}. Load it with `plora.load_plora(model, directory)`. It is
meant for the positions that `plora_mask` marks, and for no others.

PEFT reads the same files, but it adapts every token: the text positions of the model, which Partial
LoRA leaves as they were, change as well. Merging it into the weights does the same.
"""
