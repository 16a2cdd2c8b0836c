"""transformers' Trainer with BLSP-KD's objective and its meters."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState

from blspkd.data.batches import ClipDataset, Collator, LengthGroupedSampler
from blspkd.model.objective import loss_items
from blspkd.model.parts import Part, part_of
from kd_losses import response_mask

from .config import TrainConfig
from .schedule import objective_at, parts_at, weights_at

Figures = dict[str, float]


class BlspKDTrainer(Trainer):
    """Trains a :class:`BlspKDForConditionalGeneration`.

    Every loss is summed over its items and divided by how many there are in the whole optimiser
    step, over all micro-batches and processes, so that accumulation and data parallelism leave
    the gradient as one big batch would give it.

    Args:
        config: the run.
        measure_held_out: called with the model at each evaluation; gives the figures to log.
        **kwargs: as :class:`transformers.Trainer`; ``train_dataset`` is a :class:`ClipDataset`,
            ``data_collator`` a :class:`Collator`.
    """

    def __init__(
        self, config: TrainConfig, measure_held_out: Callable[[Any], Figures], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.run_config = config
        self.measure_held_out = measure_held_out
        self.step_items: dict[str, Tensor] = {}
        self.loss_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self.steps_since_log = 0
        self.clips_since_log = 0
        self.last_log = time.monotonic()

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end of the run, from its start or from a checkpoint.

        Where the checkpoint holds the last step, its weights are taken and that is all: Trainer
        would take one step more, in which no loss counts.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            last = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
            if state.global_step >= last:
                unwrapped: Any = self.accelerator.unwrap_model(self.model)
                unwrapped.take_weights(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of clips of like length, in an order that seed and epoch decide."""
        dataset, collator = self.train_dataset, self.data_collator
        assert isinstance(dataset, ClipDataset)
        assert isinstance(collator, Collator)
        sampler = LengthGroupedSampler(
            dataset.lengths(),
            self.args.train_batch_size * self.args.world_size,
            seed=self.run_config.seed,
        )
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self.args.train_batch_size,
            sampler=sampler,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one step; counts each loss's items over them all."""
        samples = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        totals: dict[str, Tensor] = {}
        self._draw_free_running(samples)
        for batch in samples:
            counts = loss_items(batch["speech_mask"], batch["labels"], batch.get("free_running"))
            for name, count in counts.items():
                totals[name] = totals.get(name, torch.zeros((), device=device)) + count.to(device)
        self.step_items = {
            name: self.accelerator.reduce(total, reduction="sum") for name, total in totals.items()
        }
        return samples, self.step_items.get("quantity")

    def _draw_free_running(self, batches: list[Any]) -> None:
        """Choose the clips that are cut at their predicted length; the same if run again."""
        section, progress = self.run_config.losses.predicted_length, self._progress()
        fraction = section.fraction * section.share_at(progress)
        if not fraction or not weights_at(self.run_config.losses, progress).reads_response:
            return
        seed = (self.run_config.seed, self.state.global_step, self.args.process_index)
        generator = np.random.default_rng(seed)
        for batch in batches:
            labels = batch["labels"]
            drawn = torch.from_numpy(generator.random(len(labels)) < fraction).to(labels.device)
            batch["free_running"] = drawn & response_mask(labels).any(dim=1)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch, in which the parts learn that are trained at this point of the run."""
        shares = parts_at(self.run_config, self._progress())
        unwrapped: Any = self.accelerator.unwrap_model(model)
        unwrapped.train_parts(shares)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        for group, rate in zip(
            self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True
        ):
            # frozen parts have no gradients, so their rate is not used
            group["lr"] = rate * shares.get(group["part"], 1.0)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective of this point of the run, on one micro-batch."""
        objective = objective_at(self.run_config.losses, self._progress())
        output = model(**inputs, objective=objective, num_items=self.step_items)
        for name, value in output.losses.items():
            self.loss_sums[name] = self.loss_sums[name].to(value.device) + value
        self.clips_since_log += len(inputs["input_ids"])
        if self.accelerator.sync_gradients:
            self.steps_since_log += 1
        # data parallelism averages gradients; the sums were divided by the counts of all processes
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss by itself, and the clips trained on per second."""
        if "loss" in logs and self.steps_since_log:
            for name, total in self.loss_sums.items():
                summed = self.accelerator.reduce(total, reduction="sum")
                logs[f"loss/{name}"] = float(summed) / self.steps_since_log
            now = time.monotonic()
            clips = self.clips_since_log * self.accelerator.num_processes
            logs["clips_per_second"] = clips / max(1e-9, now - self.last_log)
            self._start_window()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Figures:
        """Measure the held-out clips."""
        figures = self.measure_held_out(self.accelerator.unwrap_model(self.model))
        named = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        self._start_window()
        return named

    def _progress(self) -> float:
        """Fraction of the optimiser steps done."""
        return self.state.global_step / max(1, self.state.max_steps)

    def _start_window(self) -> None:
        """Start counting anew: what held-out clips took is not training time."""
        self.loss_sums.clear()
        self.steps_since_log = self.clips_since_log = 0
        self.last_log = time.monotonic()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; no weight decay on vectors, a learning rate of its own for each part."""
        if self.optimizer is None:
            target = self.model if model is None else model
            assert target is not None
            groups = _parameter_groups(target, self.run_config)
            self.optimizer = torch.optim.AdamW(
                groups, lr=self.args.learning_rate, betas=(0.9, 0.98), fused=True
            )
        return self.optimizer


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trained parameters by part and weight decay; the part is named in the group."""
    optim = config.optim
    own: dict[str, float | None] = {
        "plora": optim.plora_learning_rate,
        "encoder": optim.encoder_learning_rate,
    }
    groups: dict[tuple[Part, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = optim.weight_decay if parameter.ndim > 1 else 0.0
        groups[part_of(name), decay].append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.learning_rate if own.get(part) is None else own[part],
            "weight_decay": decay,
            "part": part,
        }
        for (part, decay), parameters in groups.items()
    ]
