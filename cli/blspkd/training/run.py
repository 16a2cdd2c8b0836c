"""One training run, from a configuration to a model and its figures."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments, set_seed

from blspkd.data.batches import ClipDataset, Collator, join_responses, keep_usable
from blspkd.data.builtin import resolve_manifest
from blspkd.data.features import FeatureCache
from blspkd.data.manifest import Record, read_manifest
from blspkd.model.bases import load_feature_extractor, load_tokenizer
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .callbacks import ProgressLine, RunLog, StopOnInterrupt
from .config import TrainConfig
from .folder import (
    BEFORE_NAME,
    LOG_NAME,
    SUMMARY_NAME,
    last_checkpoint,
    open_folder,
    write_config,
    write_json,
)
from .held_out import HeldOut
from .schedule import check_schedule
from .trainer import BlspKDTrainer

Say = Callable[[str], None]


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


@dataclass(frozen=True)
class Clips:
    """The records of a run.

    Attributes:
        train: to train on.
        held_out: by name.
        dropped: how many were left out of either, and why.
    """

    train: list[Record]
    held_out: dict[str, list[Record]]
    dropped: Counter[str]


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
    check_schedule(config.losses)
    folder = open_folder(config, resume=resume, force=force)
    if force and not resume:
        _clear(folder)
    processor = make_processor(config)
    clips = read_clips(config, processor, folder, overfit=overfit)
    say(describe_clips(clips))
    set_seed(config.seed)
    model = build_model(config)
    say(describe_parameters(model))
    write_config(folder, config)

    cache = None
    if config.data.cache_features:
        cache = _filled_cache(config, folder, model, processor, clips, say)
    collator = Collator(
        processor,
        full_window=config.model.full_window,
        share_prompt=config.optim.share_prompt and not config.optim.gradient_checkpointing,
    )

    def dataset(records: list[Record]) -> ClipDataset:
        return ClipDataset(records, processor, prompt=config.model.prompt, cache=cache)

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
        train_dataset=dataset(clips.train),
        # its own evaluate() does not read it, but Trainer will not evaluate without one
        eval_dataset=next(iter(held_out.sets.values()), None),
        data_collator=collator,
        callbacks=[RunLog(folder / LOG_NAME), ProgressLine(), stop],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.interrupted:
        return RunResult(folder, before, {}, interrupted=True)

    trainer.save_model(str(folder))
    trainer.save_state()
    say("measuring the held-out clips")
    trained = trainer.accelerator.unwrap_model(trainer.model)
    after = {**held_out.measure(trained), **held_out.answer(trained)}
    write_json(folder / SUMMARY_NAME, {"before": before, "after": after})
    return RunResult(folder, before, after, interrupted=False)


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


def build_model(config: TrainConfig) -> BlspKDForConditionalGeneration:
    """A fresh model of the configuration."""
    section = dataclasses.asdict(config.model)
    dtype = getattr(torch, section.pop("dtype"))
    trust_remote_code = section.pop("trust_remote_code")
    model = BlspKDForConditionalGeneration.from_parts(
        BlspKDConfig(**section), dtype=dtype, trust_remote_code=trust_remote_code
    )
    if config.optim.gradient_checkpointing:
        options = {"use_reentrant": False}
        model.language_model.gradient_checkpointing_enable(options)
        if config.model.train_encoder:
            model.speech_encoder.encoder.gradient_checkpointing_enable(options)
    return model


def read_clips(
    config: TrainConfig, processor: BlspKDProcessor, folder: Path, *, overfit: int = 0
) -> Clips:
    """Read the manifests, and leave out what cannot be used.

    Raises:
        ValueError: if nothing is left to train on, or a held-out clip is also a training clip.
    """
    if not config.data.train:
        raise ValueError("data.train is not set: give a manifest, as `blspkd prepare` writes it")
    dropped = Counter[str]()

    def usable(reference: str, limit: int | None) -> list[Record]:
        records = read_manifest(resolve_manifest(reference, folder / "data"))[:limit]
        kept, why = keep_usable(
            records,
            processor,
            prompt=config.model.prompt,
            max_duration=config.data.max_duration,
            max_text_tokens=config.data.max_text_tokens,
        )
        if not kept:
            raise ValueError(f"{reference}: no usable clip is left; dropped: {dict(why)}")
        dropped.update(why)
        return kept

    train_records = usable(config.data.train, overfit or config.data.limit)
    if config.data.responses is not None:
        train_records = join_responses(train_records, Path(config.data.responses))
    wants_responses = config.losses.response_kl.weight > 0 or config.losses.response_ce.weight > 0
    if wants_responses and not any(record.response for record in train_records):
        raise ValueError(
            f"{config.data.train}: no clip has a response, which the response losses need; "
            "let `blspkd respond` write them, or set losses.response_kl=0"
        )
    if overfit:
        return Clips(train_records, {"training clips": train_records}, dropped)
    held_out = {
        name: usable(path, config.data.eval_limit) for name, path in config.data.eval.items()
    }
    trained = {record.audio.resolve() for record in train_records}
    for name, records in held_out.items():
        shared = [record for record in records if record.audio.resolve() in trained]
        if shared:
            raise ValueError(
                f"data.eval.{name}: {len(shared)} of its clips are also in data.train, such as "
                f"{shared[0].audio}; hold them out"
            )
    return Clips(train_records, held_out, dropped)


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """The configuration in transformers' terms."""
    optim = config.optim
    if config.tensorboard:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": config.seed,
        "per_device_train_batch_size": optim.batch_size,
        "gradient_accumulation_steps": optim.gradient_accumulation,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "num_train_epochs": optim.epochs,
        "max_steps": -1 if optim.max_steps is None else optim.max_steps,
        "bf16": optim.bf16,
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "eval_strategy": "steps" if config.eval_steps and config.data.eval else "no",
        "eval_steps": config.eval_steps,
        "save_strategy": "no" if config.save_steps is None else "steps",
        "save_steps": config.save_steps or 0,
        "save_total_limit": config.keep_checkpoints,
        "report_to": ["tensorboard"] if config.tensorboard else "none",
        "dataloader_num_workers": config.num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    taken = sorted(set(given) & set(config.trainer))
    if taken:
        raise ValueError(f"trainer.{taken[0]} is set by a field of its own: leave it out there")
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in config.trainer:
        if name not in known:
            raise ValueError(f"trainer.{name} is no field of transformers.TrainingArguments")
    return TrainingArguments(**given, **config.trainer)


def describe_clips(clips: Clips) -> str:
    """How much there is, and what was left out."""
    hours = sum(record.duration or 0.0 for record in clips.train) / 3600
    responses = sum(record.response is not None for record in clips.train)
    parts = [f"{len(clips.train)} training clips ({hours:.2f} h), {responses} with a response"]
    parts += [f"{len(records)} held-out: {name}" for name, records in clips.held_out.items()]
    parts += [f"dropped {count}: {why}" for why, count in clips.dropped.items()]
    return "; ".join(parts)


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


def _filled_cache(
    config: TrainConfig,
    folder: Path,
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    clips: Clips,
    say: Say,
) -> FeatureCache:
    """Encoder outputs of every clip of the run."""
    root = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else folder / "cache"
    cache = FeatureCache(root, model, processor)
    records = [*clips.train, *(r for records in clips.held_out.values() for r in records)]

    def progress(done: int, total: int) -> None:
        if done == total or done % 512 < 16:
            say(f"encoded {done}/{total} clips")

    cache.fill(records, progress=progress)
    return cache


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
    write_json(path, before)
    return before


def _clear(folder: Path) -> None:
    """Empty a folder that is to be started over in, if it is a run's."""
    if not (folder / "train.yaml").exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is no run's folder (it has no train.yaml): not emptying it")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
