"""What a run is made of: code, machine, data, time, and the runs that it went on from."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from matrix_plan import settings

from blspkd.training.build import make_processor
from blspkd.training.clips import read_clips
from blspkd.training.config import TrainConfig
from blspkd.training.folder import CONFIG_NAME, LOG_NAME


def origin(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What a result file says of its run beside what was measured.

    Args:
        config: As it was trained.
        folder: Where it was trained.
    """
    document = _document(folder)
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


def earlier_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that a run began with the weights of, the first of them first, and their effort."""
    start = _document(folder)["config"]["model"].get("start_from")
    if start is None or not (Path(start) / CONFIG_NAME).exists():
        return {}  # weights from elsewhere have no run to be counted
    return {**earlier_stages(Path(start)), start: effort(Path(start))}


def effort(folder: Path) -> dict[str, Any]:
    """Steps, clips seen and seconds of training, by a run's log.

    The seconds are those between two lines of the log, so that what an interrupted run did twice
    counts twice; measuring the held-out clips does not count.
    """
    document = _document(folder)
    optim = document["config"]["optim"]
    each_step = optim["batch_size"] * optim["gradient_accumulation"] * document["processes"]
    lines = [json.loads(line) for line in (folder / LOG_NAME).read_text("utf-8").splitlines()]
    seconds, before, speed = 0.0, 0, float("inf")
    for line in lines:
        if "clips_per_second" in line:
            if line["step"] <= before:  # resumed, from a checkpoint that has no line
                before = max(line["step"] - document["config"]["log_steps"], 0)
            speed = line["clips_per_second"] / each_step
            seconds += (line["step"] - before) / speed
            before = line["step"]
    steps = max((line["step"] for line in lines), default=0)
    seconds += (steps - before) / speed  # the last steps, where log_steps does not divide them
    return {"steps": steps, "clips_seen": steps * each_step, "train_seconds": seconds}


def _document(folder: Path) -> dict[str, Any]:
    """What a run says of itself: configuration, commit, versions, processes."""
    document: dict[str, Any] = yaml.safe_load((folder / CONFIG_NAME).read_text("utf-8"))
    return document


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
