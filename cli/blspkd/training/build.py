"""The model and the processor that a configuration describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from blspkd.model.bases import load_feature_extractor, load_tokenizer
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.early_layer import check_layer
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.precision import slow_type_warning
from blspkd.model.processing import BlspKDProcessor

from .config import TrainConfig

Say = Callable[[str], None]


def make_processor(config: TrainConfig) -> BlspKDProcessor:
    """The processor of the two parts that the configuration names."""
    for name in ("encoder", "language_model"):
        if not getattr(config.model, name):
            raise ValueError(f"model.{name} is not set: give a path or a hub id")
    return BlspKDProcessor(
        load_feature_extractor(config.model.encoder),
        load_tokenizer(
            config.model.language_model, trust_remote_code=config.model.trust_remote_code
        ),
    )


def build_model(config: TrainConfig, *, say: Say = print) -> BlspKDForConditionalGeneration:
    """The model of the configuration, as it is before the first step.

    Args:
        config: the run.
        say: told what the model starts from.

    Raises:
        ValueError: if ``model.start_from`` names no model that fits.
    """
    section = dataclasses.asdict(config.model)
    start_from = section.pop("start_from")
    dtype = getattr(torch, section.pop("dtype"))
    trust_remote_code = section.pop("trust_remote_code")
    model = BlspKDForConditionalGeneration.from_parts(
        BlspKDConfig(**section), dtype=dtype, trust_remote_code=trust_remote_code
    )
    if start_from is not None:
        fresh = model.take_weights(start_from)
        say(f"starting from {start_from}" + (f"; fresh: {', '.join(fresh)}" if fresh else ""))
    if config.losses.layer_hidden.weight > 0 or config.losses.layer_kl.weight > 0:
        check_layer(model.language_model.get_decoder(), config.losses.layer)
    if config.optim.gradient_checkpointing:
        _recompute_activations(model.language_model)
        if config.model.train_encoder:
            _recompute_activations(model.speech_encoder.encoder)
    return model


def warn_of_slow_types(config: TrainConfig, device: torch.device, say: Say) -> None:
    """Say where float32 would be faster than what the configuration asks for."""
    dtype = getattr(torch, config.model.dtype)
    warnings = [slow_type_warning(dtype, device, remedy="give model.dtype=float32")]
    if config.optim.bf16:
        warnings.append(slow_type_warning(torch.bfloat16, device, remedy="give optim.bf16=false"))
    for warning in filter(None, warnings):
        say(warning)


def _recompute_activations(part: PreTrainedModel) -> None:
    """Turn on gradient checkpointing, by the name that this version of transformers wants."""
    newer = getattr(part, "activation_checkpointing_enable", None)
    (newer or part.gradient_checkpointing_enable)({"use_reentrant": False})


def describe_parameters(model: BlspKDForConditionalGeneration) -> str:
    """Trained and frozen parameters by part, in millions."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = "plora" if ".lora_" in name else name.split(".")[0]
        counts = totals.setdefault(part, [0, 0])
        counts[0 if parameter.requires_grad else 1] += parameter.numel()
    return "parameters: " + "; ".join(
        f"{part} {trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen"
        for part, (trained, frozen) in totals.items()
    )
