"""What a run shows while it goes, and how it is stopped."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RunLog(TrainerCallback):
    """Writes every logged step as a line of ``log.jsonl`` in the run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ProgressLine(TrainerCallback):
    """A bar with loss and clips/s on a terminal, a line per log on anything else; on stderr."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say how it goes."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        each = " ".join(
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in logs.items()
            if name.startswith("loss/")
        )
        text = f"loss {float(logs['loss']):.3f} ({each}) {logs['clips_per_second']:.1f} clips/s"
        if self.bar is not None:
            self.bar.update(self.task, description=text)
        else:
            click.echo(f"step {state.global_step}/{state.max_steps} {text}", err=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C or SIGTERM ends the run after the step in progress, with a checkpoint.

    A second one interrupts at once, as ever. Batch systems send SIGTERM when a job's time is up.
    Of several processes all stop after the same step, whichever of them was told, and when.

    Attributes:
        interrupted: whether it happened, to any process.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.interrupted = False
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen."""
        self.previous = {one: signal.signal(one, self._interrupt) for one in self.SIGNALS}

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self._listen_no_more()
        click.echo("interrupted: writing a checkpoint after this step", err=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop, if asked to."""
        self.interrupted = _by_any(self.interrupted, args.device)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen no more."""
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())


def _by_any(flag: bool, device: torch.device) -> bool:
    """Whether a flag is up in any process; each must ask, after the same step."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    # one alone would wait for ever in the next step's exchange of gradients
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return bool(count.item())
