"""A run's configuration in transformers' terms."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .config import TrainConfig


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
    # which parameters get gradients changes along the run; Trainer would not look when activations
    # are recomputed, which is for the reentrant kind that is not used here
    return TrainingArguments(**{"ddp_find_unused_parameters": True, **given, **config.trainer})
