"""The pretrained parts: where they are, how they are loaded, how they are told apart."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

BUILT_IN = "blspkd:"


def resolve(reference: str) -> str:
    """A folder or hub id that transformers can load.

    ``blspkd:tiny/llm`` names a folder inside this package; anything else is returned as it is.

    Raises:
        ValueError: if the reference is empty, or names no file of this package.
    """
    if not reference:
        raise ValueError("no pretrained model given: expected a path or a hub id")
    if reference.startswith(BUILT_IN):
        folder = Path(str(files("blspkd"))) / reference[len(BUILT_IN) :]
        if not folder.is_dir():
            raise ValueError(f"{reference!r} names no folder of this installation ({folder})")
        return str(folder)
    looks_local = reference.startswith((".", "/", "~")) or reference.count("/") > 1
    path = Path(reference).expanduser()
    if path.is_dir():
        return str(path)
    if looks_local:
        raise ValueError(
            f"no model at {reference!r}: the folder does not exist, seen from {Path.cwd()}; tell "
            "where it is now, by --encoder or --language-model (in a recipe, model.encoder or "
            "model.language_model)"
        )
    return reference


def load_encoder(
    reference: str, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> WhisperEncoder:
    """The encoder half of a Whisper checkpoint, in eval mode.

    Args:
        reference: see :func:`resolve`.
        dtype: of the weights.
        trust_remote_code: run code that the checkpoint brings along.

    Raises:
        ValueError: if the checkpoint is no Whisper model or lacks encoder weights.
    """
    source = resolve(reference)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if config.model_type != "whisper":
        raise ValueError(
            f"the speech encoder must be a Whisper model; {reference!r} is {config.model_type!r}"
        )
    loaded: Any = WhisperModel.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    missing = [key for key in info["missing_keys"] if "encoder." in key and "decoder." not in key]
    if missing:
        raise ValueError(
            f"{reference!r} lacks {len(missing)} encoder weights (first: {missing[0]}): it is no "
            "complete Whisper checkpoint"
        )
    encoder: WhisperEncoder = model.get_encoder().eval()
    return encoder


def load_transcriber(
    reference: str, *, dtype: torch.dtype
) -> WhisperForConditionalGeneration | None:
    """The whole Whisper model, for the cascade; None if the checkpoint has no decoder."""
    loaded: Any = WhisperForConditionalGeneration.from_pretrained(
        resolve(reference), dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    if any("decoder." in key for key in info["missing_keys"]):
        return None
    transcriber: WhisperForConditionalGeneration = model.eval()
    return transcriber


def load_language_model(
    reference: str, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model, in eval mode. Arguments as :func:`load_encoder`."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        resolve(reference),
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    model.eval()
    return model


def load_tokenizer(reference: str, *, trust_remote_code: bool = False) -> Any:
    """The language model's tokenizer; its padding token is set if it had none."""
    tokenizer = AutoTokenizer.from_pretrained(
        resolve(reference), trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_feature_extractor(reference: str) -> Any:
    """The speech encoder's feature extractor."""
    return AutoFeatureExtractor.from_pretrained(resolve(reference))


def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights.

    It covers the name and shape of every tensor and the signs of up to 256 of its values: casting
    to another floating dtype leaves it as it is, training changes it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 256)
        digest.update((flat[::step][:256] > 0).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
