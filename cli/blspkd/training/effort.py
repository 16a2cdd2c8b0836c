"""What a run took, and the runs that it went on from, by what stands in their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .folder import LOG_NAME, read_document


def effort(folder: Path) -> dict[str, Any]:
    """Steps, clips seen and seconds of training, by a run's log.

    The seconds are those between two lines of the log, so that what an interrupted run did twice
    counts twice; measuring the held-out clips does not count.
    """
    document = read_document(folder)
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


def earlier_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that a run began with the weights of, the first of them first, and their effort.

    It ends at weights that no run's log stands beside: those from elsewhere, a checkpoint, a folder
    that is gone, or a path that was meant from another folder than the present one.
    """
    found: dict[str, dict[str, Any]] = {}
    start = _start(folder)
    while start is not None and (Path(start) / LOG_NAME).is_file():
        if start in (str(folder), *found):
            break  # runs that overwrote one another
        found[start] = effort(Path(start))
        start = _start(Path(start))
    return dict(reversed(found.items()))


def all_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """A run's effort after that of its earlier stages; nothing for a folder without a log.

    Checkpoints and releases have none.
    """
    if not (folder / LOG_NAME).is_file():
        return {}
    return {**earlier_stages(folder), str(folder): effort(folder)}


def effort_lines(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line of text for each run."""
    return [
        f"trained in {name}: {took['steps']:,} steps, {took['clips_seen']:,} clips seen, "
        f"{took['train_seconds'] / 60:.1f} minutes"
        for name, took in stages.items()
    ]


def _start(folder: Path) -> str | None:
    start: str | None = read_document(folder)["config"]["model"].get("start_from")
    return start
