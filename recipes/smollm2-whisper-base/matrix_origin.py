"""What a run is made of: code, machine, data, time, and the runs that it went on from."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from matrix_plan import settings

from blspkd.training.build import make_processor
from blspkd.training.clips import read_clips
from blspkd.training.config import TrainConfig
from blspkd.training.effort import earlier_stages, effort
from blspkd.training.folder import read_document


def origin(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What a result file says of its run beside what was measured.

    Args:
        config: As it was trained.
        folder: Where it was trained.
    """
    document = read_document(folder)
    train = read_clips(config, make_processor(config), folder).train
    return {
        "settings": settings(config),
        "commit": document["commit"],
        "versions": document["versions"],
        "device": _device(),
        "threads": torch.get_num_threads(),
        **effort(folder),
        "earlier_stages": earlier_stages(folder),
        "train_clips": len(train),
        "train_hours": sum(record.duration or 0.0 for record in train) / 3600,
        "train_texts": len({record.text for record in train}),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
