"""A run's configuration in transformers' terms."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .config import TrainConfig

_OPTIMISER = "the optimiser is AdamW with betas 0.9 and 0.98, set by the fields of optim"
_LOADER = "batches are made by length, of every clip"
_MEASURES = "held-out clips are measured by blspkd's own evaluation"
IGNORED = {
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), _OPTIMISER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "adafactor"), _OPTIMISER),
    **dict.fromkeys(("group_by_length", "length_column_name"), _LOADER),
    **dict.fromkeys(("train_sampling_strategy", "dataloader_drop_last"), _LOADER),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_persistent_workers"), _LOADER),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps"), _MEASURES),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics"), _MEASURES),
    **dict.fromkeys(("batch_eval_metrics", "eval_do_concat_batches"), _MEASURES),
    "label_smoothing_factor": "the losses are set by the fields of losses",
    "gradient_checkpointing": "give optim.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "give optim.gradient_checkpointing",
    "resume_from_checkpoint": "give --resume",
}
"""Fields of TrainingArguments that would be accepted and do nothing here, and what does it."""


def check_trainer_fields(config: TrainConfig) -> None:
    """Refuse fields in ``trainer`` that are unknown, set elsewhere, or without effect here."""
    taken = sorted(set(_given(config, Path())) & set(config.trainer))
    if taken:
        raise ValueError(f"trainer.{taken[0]} is set by a field of its own: leave it out there")
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in config.trainer:
        if name in IGNORED:
            raise ValueError(
                f"trainer.{name}: expected a field that has an effect here, got "
                f"{config.trainer[name]!r}: {IGNORED[name]}; leave it out"
            )
        if name not in known:
            raise ValueError(f"trainer.{name} is no field of transformers.TrainingArguments")


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """The configuration in transformers' terms."""
    if config.tensorboard:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    given = _given(config, folder)
    # which parameters get gradients changes along the run; Trainer would not look when activations
    # are recomputed, which is for the reentrant kind that is not used here
    return TrainingArguments(**{"ddp_find_unused_parameters": True, **given, **config.trainer})


def _given(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What the configuration's own fields say."""
    optim = config.optim
    return {
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
