"""A trained model as a folder to give away: its own weights, small, beside what says what it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .configuration import BlspKDConfig
from .pretrained import WEIGHTS_NAME


def export_model(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    config: BlspKDConfig,
    dtype: torch.dtype,
    card: str,
) -> int:
    """Write a trained model without its optimiser, logs and paths, complete or not at all.

    Args:
        source: a finished run, or a checkpoint of one.
        destination: a folder that does not exist yet, or is empty.
        config: of the source, with the parts' names as they are where the folder is going.
        dtype: of the weights in the file; they are float32 again once loaded.
        card: what README.md says.

    Returns:
        Bytes of the folder.

    Raises:
        ValueError: if the destination holds something, or a weight does not fit ``dtype``.
    """
    destination = Path(destination).resolve()  # a link stays one, and "." has a name
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: exists already; name a folder that does not")
    weights = load_file(Path(source) / WEIGHTS_NAME)
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            weights[name] = tensor.to(dtype)
        if not weights[name].isfinite().all():
            raise ValueError(f"{name} does not fit {dtype}: it has values beyond its range")
    unfinished = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        config.save_pretrained(unfinished)
        save_file(weights, unfinished / WEIGHTS_NAME, metadata={"format": "pt"})
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        # safetensors leaves a file that nobody else may read
        shutil.copymode(unfinished / "README.md", unfinished / WEIGHTS_NAME)
        os.replace(unfinished, destination)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return sum(path.stat().st_size for path in destination.iterdir())
