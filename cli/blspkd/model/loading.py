"""A trained model from its folder, with the processor that feeds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from .bases import load_feature_extractor, load_tokenizer
from .configuration import BlspKDConfig
from .modeling import BlspKDForConditionalGeneration
from .pretrained import WEIGHTS_NAME
from .processing import BlspKDProcessor


def load_config(
    folder: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    language_model: str | None = None,
) -> BlspKDConfig:
    """Read a trained model's configuration.

    Args:
        folder: What `save_pretrained` wrote: a finished run, or a checkpoint of one.
        encoder: Where the encoder is now, if it moved.
        language_model: Where the language model is now, if it moved.

    Raises:
        ValueError: The folder holds no trained model; the message names a checkpoint within it
            where there is one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; expected a trained model, as `blspkd train` leaves it"
        )
    missing = [name for name in ("config.json", WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        checkpoints = sorted(
            folder.glob(f"checkpoint-*/{WEIGHTS_NAME}"), key=lambda path: path.stat().st_mtime
        )
        if checkpoints:
            remedy = f"the run did not finish, but {checkpoints[-1].parent} can be used"
        else:
            remedy = "expected the folder of a run, or one of its checkpoints"
        raise ValueError(f"{folder}: no trained model ({' and '.join(missing)} missing); {remedy}")
    config = BlspKDConfig.from_pretrained(str(folder))
    config.encoder = encoder or config.encoder
    config.language_model = language_model or config.language_model
    return config


def load_processor(config: BlspKDConfig, *, trust_remote_code: bool = False) -> BlspKDProcessor:
    """Make the processor that fits a model's two parts; reads no weights."""
    return BlspKDProcessor(
        load_feature_extractor(config.encoder),
        load_tokenizer(config.language_model, trust_remote_code=trust_remote_code),
    )


def load_model(
    folder: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    language_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[BlspKDForConditionalGeneration, BlspKDProcessor]:
    """Load a trained model, ready to answer, and its processor.

    Args:
        folder: What `save_pretrained` wrote: a finished run, or a checkpoint of one.
        encoder: Where the encoder is now, if it moved.
        language_model: Where the language model is now, if it moved.
        dtype: Of the frozen parts.
        device: Where it runs; None takes a GPU if there is one.
        trust_remote_code: Run code that the language model's checkpoint brings along.

    Raises:
        ValueError: The folder holds no trained model, or a part is not the one it was trained on.
    """
    config = load_config(folder, encoder=encoder, language_model=language_model)
    processor = load_processor(config, trust_remote_code=trust_remote_code)
    model = BlspKDForConditionalGeneration.from_pretrained(
        folder,
        encoder=config.encoder,
        language_model=config.language_model,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    put(model, device)
    return model, processor


def place_of(device: str | torch.device | None) -> torch.device:
    """A device by its name; for None, a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def put(model: torch.nn.Module, device: str | torch.device | None) -> None:
    """Move a model to :func:`place_of` a device."""
    model.to(place_of(device))


def quieten_transformers() -> None:
    """Keep transformers' progress bars and advice off the terminal; errors stay."""
    logging: Any = transformers_logging  # untyped
    logging.disable_progress_bar()
    logging.set_verbosity_error()
