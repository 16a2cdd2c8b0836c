"""One training run, from a configuration to a model and its figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, set_seed

from blspkd.data.augment import Augmentation
from blspkd.data.batches import ClipDataset, Collator
from blspkd.data.manifest import Record
from blspkd.model.modeling import BlspKDForConditionalGeneration

from .arguments import check_trainer_fields, training_arguments
from .averaging import average_with, check_averaging, trained_weights
from .build import Say, build_model, describe_parameters, make_processor, warn_of_slow_types
from .caches import filled_alignments, filled_cache
from .callbacks import ProgressLine, RunLog, StopOnInterrupt
from .clips import describe_clips, read_clips
from .config import TrainConfig
from .folder import (
    BEFORE_NAME,
    LOG_NAME,
    SUMMARY_NAME,
    check_same_run,
    clear_folder,
    last_checkpoint,
    open_folder,
    write_config,
    write_json,
)
from .held_out import HeldOut
from .schedule import check_schedule
from .trainer import BlspKDTrainer


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        folder: the run's folder, which `blspkd generate` and `eval` take.
        before: held-out figures before the first step, by ``SET/FIGURE``.
        after: the same after the last; empty if the run was interrupted.
        interrupted: Ctrl-C ended it; a checkpoint was written.
    """

    folder: Path
    before: dict[str, float]
    after: dict[str, float]
    interrupted: bool


def train(
    config: TrainConfig, *, resume: bool = False, force: bool = False, overfit: int = 0, say: Say
) -> RunResult:
    """Train.

    Args:
        config: the run.
        resume: go on from the last checkpoint in the run's folder.
        force: start over in a folder that holds something.
        overfit: train on the first so many clips alone, and measure on them: a check that the
            model can learn at all.
        say: told, in a line each, what is going on.

    Raises:
        ValueError: for whatever is wrong with configuration or data; nothing is trained then.
    """
    check_schedule(config)
    check_averaging(config)
    check_trainer_fields(config)
    if config.losses.alignment.weight > 0 and not config.data.cache_features:
        raise ValueError(
            "losses.alignment needs the frozen encoder's outputs on disk: set "
            "data.cache_features=true"
        )
    process = PartialState(cpu=not torch.cuda.is_available())
    if not process.is_main_process:
        say = _say_nothing
    folder = _common_folder(config, process, resume=resume, force=force, overfit=overfit)
    processor = make_processor(config)
    with process.main_process_first():  # it unpacks what comes inside the package
        clips = read_clips(config, processor, folder, overfit=overfit)
    say(describe_clips(clips))
    warn_of_slow_types(config, process.device, say)
    set_seed(config.seed)
    model = build_model(config, say=say).to(process.device)
    say(describe_parameters(model))
    if process.is_main_process:
        if force and not resume:
            clear_folder(folder)  # only now: what was refused before must not cost a finished run
        write_config(folder, config, overfit=overfit)
    process.wait_for_everyone()

    augmentation = Augmentation(config.data.augment, clips.train, seed=config.seed)
    cache = None
    if config.data.cache_features:
        cache = filled_cache(config, folder, model, processor, clips, augmentation, say)
    alignments = None
    if config.losses.alignment.weight > 0:
        assert cache is not None  # refused above
        alignments = filled_alignments(config, cache, processor, clips, say)
    collator = Collator(
        processor,
        full_window=config.model.full_window,
        share_prompt=config.optim.share_prompt and not config.optim.gradient_checkpointing,
    )

    def dataset(records: list[Record], **training: Any) -> ClipDataset:
        return ClipDataset(records, processor, prompt=config.model.prompt, cache=cache, **training)

    held_out = HeldOut(
        {name: dataset(records) for name, records in clips.held_out.items()},
        collator,
        config.answer_limit,
    )
    before = _figures_before(folder, held_out, model, resume=resume, say=say)

    stop = StopOnInterrupt()
    trainer = BlspKDTrainer(
        config,
        held_out.measure,
        model=model,
        args=training_arguments(config, folder),
        train_dataset=dataset(clips.train, augmentation=augmentation, alignments=alignments),
        # its own evaluate() does not read it, but Trainer will not evaluate without one
        eval_dataset=next(iter(held_out.sets.values()), None),
        data_collator=collator,
        callbacks=[RunLog(folder / LOG_NAME), ProgressLine(), stop],
    )
    trainer.remove_callback(PrinterCallback)
    # before a checkpoint is read: in a resumed run too, these are the weights it began with
    start = trained_weights(model) if config.optim.average_with_start else {}
    checkpoint = last_checkpoint(folder) if resume else None
    trainer.train_from(checkpoint)
    if stop.interrupted:
        return RunResult(folder, before, {}, interrupted=True)

    trained = trainer.accelerator.unwrap_model(trainer.model)
    average_with(trained, start, config.optim.average_with_start)
    trainer.save_model(str(folder))
    trainer.save_state()
    say("measuring the held-out clips")
    after = {**held_out.measure(trained), **held_out.answer(trained)}
    if process.is_main_process:
        write_json(folder / SUMMARY_NAME, {"before": before, "after": after})
    return RunResult(folder, before, after, interrupted=False)


def _figures_before(
    folder: Path,
    held_out: HeldOut,
    model: BlspKDForConditionalGeneration,
    *,
    resume: bool,
    say: Say,
) -> dict[str, float]:
    """Held-out figures of the untrained model; a resumed run has them on disk."""
    path = folder / BEFORE_NAME
    if resume and path.exists():
        stored: dict[str, float] = json.loads(path.read_text())
        return stored
    say("measuring the held-out clips before training")
    before = {**held_out.measure(model), **held_out.answer(model)}
    if PartialState().is_main_process:
        write_json(path, before)
    return before


def _say_nothing(text: str) -> None:
    """What processes other than the main one have to say."""


def _common_folder(
    config: TrainConfig, process: PartialState, *, resume: bool, force: bool, overfit: int
) -> Path:
    """The run's folder, opened by the main process and named to the others."""
    found: list[str | None] = [None]
    if process.is_main_process:
        folder = open_folder(config, resume=resume, force=force)
        if resume:
            check_same_run(folder, config, overfit=overfit)
        found = [str(folder)]
    broadcast_object_list(found)
    assert found[0] is not None
    return Path(found[0])
