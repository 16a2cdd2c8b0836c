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

from plora.config import DEFAULT, PLoRAConfig
from plora.decoder import find_scopes
from plora.peft_format import from_peft, parameters_of, to_peft
from plora.swap import Model, apply_plora, remove_plora, require_scope

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
PLORA_CONFIG_FILE = "plora_config.json"
CARD_FILE = "README.md"

_FORMAT = 1


def plora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, under PEFT's names.

    Args:
        model: A model with PLoRA, or a wrapper around it. Paths count from the model given to
            `apply_plora`, so load into that one.

    Returns:
        ``base_model.model.<path>.lora_A.weight`` (r, K) and ``...lora_B.weight`` (N, r), with DoRA
        also ``...lora_magnitude_vector`` (N,), to detached tensors that share memory with the
        model's. Of several modalities: ``...lora_A.<modality>.weight`` and so on.

    Raises:
        ValueError: The model has no PLoRA, or this process holds flat pieces of A and B.
    """
    given, _ = require_scope(model)
    parameters = parameters_of(given)
    _check_whole(parameters)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def load_plora_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy values into the A and B of `model`; their dtype and device stay.

    Args:
        model: A model with PLoRA.
        state_dict: As `plora_state_dict` returns it; it has to have every name, and no other.

    Raises:
        ValueError: The model has no PLoRA, or names or shapes differ, or its A and B are on the
            meta device, where values are lost. Nothing is changed then.
    """
    given, _ = require_scope(model)
    parameters = parameters_of(given)
    _check_present(parameters)
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

    ``adapter_model.safetensors`` and ``adapter_config.json`` are a LoRA adapter as PEFT reads it,
    of several modalities one in a folder each, named like it; ``plora_config.json`` says that they
    are meant for masked positions only. A model card is written if there is no README.md yet.

    A model that is sharded over processes (``fully_shard``) is put together: call this in all of
    them, and the first one writes.

    Args:
        model: A model with PLoRA, or a wrapper around it, such as that of torch.compile.
        directory: Created if need be; the files of an earlier save are replaced.

    Raises:
        ValueError: The model has no PLoRA, or A and B are on the meta device, or flat pieces.
    """
    model, scope = require_scope(model)
    _check_present(parameters_of(model))
    _check_whole(parameters_of(model))
    folder = Path(directory)
    whole = {modality: _whole(parameters_of(model, modality)) for modality in scope.configs}
    sharded = any(hasattr(one, "full_tensor") for one in parameters_of(model).values())
    if sharded and torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for modality, config in scope.configs.items():
        place = _folder(folder, modality)
        place.mkdir(exist_ok=True)
        values = whole[modality]
        save_file(values, place / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_json(place / PEFT_CONFIG_FILE, to_peft(model, config, modality))
    dicts = {modality: config.to_dict() for modality, config in scope.configs.items()}
    said = dicts[DEFAULT] if set(dicts) == {DEFAULT} else {"modalities": dicts}
    _write_json(folder / PLORA_CONFIG_FILE, {"format": _FORMAT, **said})
    if not (folder / CARD_FILE).exists():
        (folder / CARD_FILE).write_text(_card(model, scope.configs), encoding="utf-8")


def load_plora(model: Model, directory: str | Path) -> Model:
    """Apply what `save_plora`, or PEFT, wrote to `model`, in place.

    A folder of PEFT without ``plora_config.json`` is read as one modality without a name: the same
    A and B, on the masked positions only.

    Args:
        model: The base model, or one that has PLoRA of the same ranks and targets already, whose A
            and B are then replaced.
        directory: Where the files are.

    Returns:
        `model` itself.

    Raises:
        ValueError: A file is missing or damaged, or the files belong to another base model, or say
            what Partial LoRA cannot do. A model that had no PLoRA before has none then.
    """
    folder = Path(directory)
    configs = _read_configs(folder)
    state_dict: dict[str, Tensor] = {}
    for modality in configs:
        values = _read_weights(_folder(folder, modality) / WEIGHTS_FILE)
        state_dict |= {_with_modality(name, modality): value for name, value in values.items()}
    if not find_scopes(model):
        return _apply_and_load(model, configs, state_dict)
    present, expected = _strengths(require_scope(model)[1].configs), _strengths(configs)
    if present != expected:
        raise ValueError(
            f"model: expected PLoRA with {expected} as in {folder}, got {present}; call "
            "remove_plora(model) first"
        )
    load_plora_state_dict(model, state_dict)
    return model


def _apply_and_load(
    model: Model, configs: Mapping[str, PLoRAConfig], state_dict: Mapping[str, Tensor]
) -> Model:
    apply_plora(model, configs)
    try:
        load_plora_state_dict(model, state_dict)
    except ValueError:
        remove_plora(model)
        raise
    return model


def _check_present(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(
                f"model: expected A and B with values, got {name!r} on the meta device; load and "
                "save before the model is offloaded (accelerate), or after "
                "model.to_empty(device=...) and loading the base model"
            )


def _check_whole(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if name.endswith(".weight") and parameter.ndim != 2:  # a magnitude is flat anyhow
            raise ValueError(
                f"model: expected whole matrices A and B, got {name!r} of shape "
                f"{tuple(parameter.shape)}, a piece of a sharded one; put them together around "
                "this call: FullyShardedDataParallel.summon_full_params(model) or "
                "deepspeed.zero.GatheredParameters(parameters)"
            )


def _whole(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values on the CPU, gathered from all processes where they are sharded."""
    found = {}
    for name, parameter in parameters.items():
        value: Any = parameter.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = value.cpu().contiguous()
    return found


def _folder(folder: Path, modality: str) -> Path:
    return folder if modality == DEFAULT else folder / modality


def _with_modality(name: str, modality: str) -> str:
    """The name, in a file of one modality, as it is among all of them."""
    if modality == DEFAULT:
        return name
    stem, _, last = name.rpartition(".")
    return f"{stem}.{modality}.{last}" if last == "weight" else f"{name}.{modality}"


def _strengths(configs: Mapping[str, PLoRAConfig]) -> str:
    """What A, B and their scale have to agree in, in words."""
    said = []
    for modality, one in configs.items():
        name = "" if modality == DEFAULT else f"{modality}: "
        words = f"{name}r={one.r} and lora_alpha={one.lora_alpha:g}"
        for field in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
            value = getattr(one, field)
            words += f" and {field}={value}" if value else ""
        said.append(words)
    return "; ".join(sorted(said))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what a file that is not UTF-8 raises
        raise ValueError(f"directory: {path} is no JSON ({error}); save it again") from error
    return values if isinstance(values, dict) else {}


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"directory: {path.parent} has no {path.name}; expected what save_plora or PEFT wrote, "
            "in safetensors"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"directory: {path} is damaged ({error}); save it again") from error


def _read_configs(folder: Path) -> dict[str, PLoRAConfig]:
    path = folder / PLORA_CONFIG_FILE
    if not path.is_file():
        if not (folder / PEFT_CONFIG_FILE).is_file():
            raise ValueError(
                f"directory: {folder} has no {PLORA_CONFIG_FILE}, nor an {PEFT_CONFIG_FILE}; "
                "expected what save_plora or PEFT wrote"
            )
        return {DEFAULT: from_peft(_read_json(folder / PEFT_CONFIG_FILE))}
    values = _read_json(path)
    version = values.pop("format", None)
    if version != _FORMAT:
        raise ValueError(
            f"directory: {path} expected format {_FORMAT}, got {version!r}; it was written by "
            "another version of this package"
        )
    dicts = values.get("modalities", {DEFAULT: values})
    return {modality: PLoRAConfig.from_dict(one) for modality, one in dicts.items()}


def _card(model: nn.Module, configs: Mapping[str, PLoRAConfig]) -> str:
    base = getattr(model, "name_or_path", None) or type(model).__name__
    return f"""---
library_name: plora
---

# Partial LoRA adapter for {base}

{_strengths(configs)}. Load it with `plora.load_plora(model, directory)`. It is meant for the
positions that `plora_mask` marks, and for no others.

PEFT reads the same files, but it adapts every token: the text positions of the model, which Partial
LoRA leaves as they were, change as well. Merging it into the weights does the same.
"""
