"""What a run would do, without doing it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from blspkd.data.batches import ClipDataset, Collator
from blspkd.model.loading import place_of

from .build import Say, build_model, describe_parameters, make_processor, warn_of_slow_types
from .clips import describe_clips, read_clips
from .config import TrainConfig
from .schedule import check_schedule


def dry_run(config: TrainConfig, *, say: Say) -> str:
    """Check configuration, data and models; describe parameters, token budget and one batch.

    Args:
        config: the run.
        say: told, in a line each, what is going on.

    Returns:
        The description, several lines.
    """
    check_schedule(config)
    processor = make_processor(config)
    with TemporaryDirectory() as scratch:
        clips = read_clips(config, processor, Path(scratch))
        warn_of_slow_types(config, place_of(None), say)
        say("loading the models")
        model = build_model(config)
        dataset = ClipDataset(clips.train, processor, prompt=config.model.prompt)
        turns = [
            dataset.processor.tokenize_turn(
                record.messages or [{"role": "user", "content": config.model.prompt}],
                record.text,
                response=record.response,
            )
            for record in clips.train
        ]
        size = min(config.optim.batch_size, len(dataset))
        batch = Collator(processor, full_window=config.model.full_window)(
            [dataset[i] for i in range(size)]
        )
    spoken = sum(sum(turn.speech_mask) for turn in turns)
    tokens = sum(len(turn.input_ids) for turn in turns)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
    return "\n".join(
        [
            describe_clips(clips),
            describe_parameters(model),
            f"tokens an epoch: {tokens} in all, {spoken} of them spoken",
            f"one batch: {shapes}",
        ]
    )
