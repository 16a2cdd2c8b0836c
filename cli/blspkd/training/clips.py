"""The clips of a run: read, checked, and what was left out of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from blspkd.data.batches import join_responses, keep_usable
from blspkd.data.builtin import resolve_manifest
from blspkd.data.manifest import Record, read_manifest
from blspkd.model.processing import BlspKDProcessor

from .config import TrainConfig
from .folder import DATA_NAME


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

    def usable(reference: str, limit: int | None, responses: str | None = None) -> list[Record]:
        records = read_manifest(resolve_manifest(reference, folder / DATA_NAME))[:limit]
        if responses is not None:
            records = join_responses(records, Path(responses))
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

    train_records = usable(config.data.train, overfit or config.data.limit, config.data.responses)
    wants_responses = config.losses.response_kl.weight > 0 or config.losses.response_ce.weight > 0
    if wants_responses and not any(record.response for record in train_records):
        raise ValueError(
            f"{config.data.train}: no clip has a response, which the response losses need; "
            "let `blspkd respond` write them, or set losses.response_kl=0"
        )
    if overfit:
        return Clips(train_records, {"training clips": train_records}, dropped)
    held_out = {
        name: usable(path, config.data.eval_limit)
        for name, path in config.data.eval.items()
        if path  # null takes a set of the recipe's away
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


def describe_clips(clips: Clips) -> str:
    """How much there is, and what was left out."""
    hours = sum(record.duration or 0.0 for record in clips.train) / 3600
    responses = sum(record.response is not None for record in clips.train)
    parts = [f"{len(clips.train)} training clips ({hours:.2f} h), {responses} with a response"]
    parts += [f"{len(records)} held-out: {name}" for name, records in clips.held_out.items()]
    parts += [f"dropped {count}: {why}" for why, count in clips.dropped.items()]
    return "; ".join(parts)
