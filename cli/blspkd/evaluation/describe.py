"""What a model or a manifest is, without loading any weights."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, WhisperModel

from blspkd import __version__
from blspkd.data.manifest import read_manifest
from blspkd.model.bases import resolve
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.loading import load_config
from blspkd.model.pretrained import WEIGHTS_NAME


def describe_model(
    folder: Path, *, encoder: str | None = None, language_model: str | None = None
) -> dict[str, Any]:
    """What a trained model is made of.

    Args:
        folder: A run's folder, or a checkpoint.
        encoder: Where the encoder is now, if it moved.
        language_model: Where the language model is now, if it moved.

    Returns:
        The parts with their trained and frozen parameters (None where a part is not at hand),
        the options that matter, the losses if the run recorded them, and versions.

    Raises:
        ValueError: The folder holds no trained model.
    """
    config = load_config(folder, encoder=encoder, language_model=language_model)
    trained = _trained_parameters(folder / WEIGHTS_NAME)
    encoder_total = _count(config.encoder, encoder_only=True)
    language_total = _count(config.language_model, encoder_only=False)
    return {
        "folder": str(folder),
        "parts": {
            "encoder": {
                "source": config.encoder,
                "trained": trained["speech_encoder"],
                "frozen": _rest(encoder_total, trained["speech_encoder"]),
            },
            "adapter": {
                "source": config.adapter_type,
                "trained": trained["adapter"],
                "frozen": 0,
            },
            "language model": {
                "source": config.language_model,
                "trained": 0,
                "frozen": language_total,
            },
            "PLoRA": {
                "source": _plora(config),
                "trained": trained["language_model"],
                "frozen": 0,
            },
        },
        "adapter": config.adapter,
        "plora": config.plora,
        "plain_lora": config.plain_lora,
        "speech_embedding": config.speech_embedding,
        "full_window": config.full_window,
        "prompt": config.prompt,
        "losses": _recorded_losses(folder),
        "steps": _steps(folder),
        "fingerprints": {
            "encoder": config.encoder_fingerprint,
            "language_model": config.language_model_fingerprint,
        },
        "versions": {
            "saved by transformers": config.transformers_version,
            "blspkd": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def describe_manifest(path: Path) -> dict[str, Any]:
    """How many clips a manifest has, how long they are, and what stands beside them.

    Raises:
        ManifestError: It is missing or broken.
    """
    records = read_manifest(path, check_audio=False)
    durations = [record.duration for record in records if record.duration is not None]
    extra = sorted({column for record in records for column in record.extra})
    return {
        "manifest": str(path),
        "clips": len(records),
        "hours": math.fsum(durations) / 3600,
        "without_duration": len(records) - len(durations),
        "with_response": sum(bool(record.response) for record in records),
        "with_messages": sum(record.messages is not None for record in records),
        "missing_audio": sum(not record.audio.is_file() for record in records),
        "languages": sorted({record.lang for record in records if record.lang is not None}),
        "other_columns": extra,
    }


def model_text(found: Mapping[str, Any]) -> str:
    """A model's description as lines of text."""
    lines = [f"{'part':<16}{'trained':>14}{'frozen':>14}  what"]
    for name, part in found["parts"].items():
        frozen = "not at hand" if part["frozen"] is None else f"{part['frozen']:,}"
        lines.append(f"{name:<16}{part['trained']:>14,}{frozen:>14}  {part['source']}")
    lines.append("")
    lines += [
        f"{name.replace('_', ' ')}: {found[name]}"
        for name in ("speech_embedding", "full_window", "prompt", "steps")
        if found[name] is not None
    ]
    for name in ("adapter", "losses", "versions"):
        if found[name]:
            shown = {key: value for key, value in found[name].items() if not _is_off(value)}
            options = ", ".join(f"{key} {_brief(value)}" for key, value in shown.items())
            lines.append(f"{name}: {options}")
    return "\n".join(lines)


def manifest_text(found: Mapping[str, Any]) -> str:
    """A manifest's description as lines of text."""
    lines = [f"{found['clips']} clips, {found['hours']:.2f} h"]
    if found["without_duration"]:
        lines[0] += f" ({found['without_duration']} clips tell no duration)"
    without = found["clips"] - found["with_response"]
    lines.append(f"with a response: {found['with_response']}, without: {without}")
    lines.append(f"with their own messages: {found['with_messages']}")
    if found["missing_audio"]:
        lines.append(f"missing audio files: {found['missing_audio']}")
    lines += [
        f"{name.replace('_', ' ')}: {', '.join(found[name])}"
        for name in ("languages", "other_columns")
        if found[name]
    ]
    return "\n".join(lines)


def _trained_parameters(weights: Path) -> dict[str, int]:
    counts = {"speech_encoder": 0, "adapter": 0, "language_model": 0}
    with safe_open(weights, framework="pt") as archive:
        for name in archive.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
            part = name.split(".")[0]
            counts[part] = counts.get(part, 0) + math.prod(archive.get_slice(name).get_shape())
    return counts


def _count(reference: str, *, encoder_only: bool) -> int | None:
    """Parameters of a pretrained part, from its config.json alone; None if it is not at hand."""
    try:
        config = AutoConfig.from_pretrained(resolve(reference))
    except (OSError, ValueError):
        return None
    with torch.device("meta"):
        make: Any = WhisperModel if encoder_only else AutoModelForCausalLM.from_config
        module: nn.Module = make(config)
    if encoder_only:
        module = module.get_submodule("encoder")
    return sum(parameter.numel() for parameter in module.parameters())


def _rest(total: int | None, trained: int) -> int | None:
    return None if total is None else total - trained


def _plora(config: BlspKDConfig) -> str:
    if config.plora is None:
        return "none"
    options = ", ".join(f"{key} {_brief(value)}" for key, value in config.plora.items())
    return options or "defaults"


def _recorded_losses(folder: Path) -> dict[str, Any] | None:
    """The losses of the resolved training configuration, which stands in the run's folder."""
    for home in _homes(folder):
        for path in sorted(home.glob("*.yaml")):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                losses = content.get("config", content).get("losses")
                if isinstance(losses, dict):
                    return losses
    return None


def _steps(folder: Path) -> int | None:
    for home in _homes(folder):
        state = home / "trainer_state.json"
        if state.is_file():
            steps = json.loads(state.read_text(encoding="utf-8")).get("global_step")
            return int(steps) if steps is not None else None
    return None


def _homes(folder: Path) -> tuple[Path, ...]:
    checkpoint = folder.resolve().name.startswith("checkpoint-")
    return (folder, folder.resolve().parent) if checkpoint else (folder,)


def _is_off(value: Any) -> bool:
    return isinstance(value, dict) and 0 in (value.get("weight"), value.get("fraction"))


def _brief(value: Any) -> str:
    if isinstance(value, dict) and ("weight" in value or "fraction" in value):
        window = (value.get("start", 0.0), value.get("stop", 1.0))
        shown = "" if window == (0.0, 1.0) else f" from {window[0]:.0%} to {window[1]:.0%}"
        return f"{value.get('weight', value.get('fraction')):g}{shown}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return str(value)
