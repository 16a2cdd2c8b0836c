"""What is heard of more clips than are answered: figures that no answer has to be made for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from matrix_shared import Listener, Shared

from blspkd.data.batches import ClipDataset, Collator, batches_of
from blspkd.data.manifest import Record, read_manifest
from blspkd.evaluation.answers import nearest_embedding_transcripts
from blspkd.evaluation.evaluate import select_records
from blspkd.evaluation.meters import measure_clips
from blspkd.evaluation.metrics import each_word_errors, word_error_rate
from blspkd.evaluation.tasks import EvalConfig


def more_name(name: str) -> str:
    """What the further clips of a set are called where their transcripts are kept."""
    return f"more {name}"


def more_records(manifest: str, without: Collection[str], prompt: str) -> list[Record]:
    """The clips of a manifest, without some."""
    chosen = [record for record in read_manifest(Path(manifest)) if record.id not in without]
    return select_records(chosen, EvalConfig(task="continue"), prompt)


def measure_more(
    listener: Listener,
    shared: Shared,
    name: str,
    manifest: str,
    *,
    without: Collection[str],
    batch_size: int,
) -> dict[str, Any]:
    """The meters of a manifest's clips, and the WER of what was heard.

    Args:
        listener: The model, and the cascade's recogniser.
        shared: Keeps what that one hears.
        name: Of the set whose kind they are.
        manifest: What to hear.
        without: Ids of the clips that are measured elsewhere.
        batch_size: Clips at a time.
    """
    model, processor = listener.model, listener.processor
    records = more_records(manifest, without, model.config.prompt)
    dataset = ClipDataset(records, processor, prompt=model.config.prompt)
    collator = Collator(processor, full_window=model.config.full_window)
    batches = batches_of(dataset, collator, batch_size)
    meters = measure_clips(model, batches, device=model.embedding_weight().device)
    heard = {}
    if listener.transcriber is not None:
        heard["cascade"] = shared.heard(listener, more_name(name), records)
    if model.config.adapter_type == "cformer":
        heard["speech"] = nearest_embedding_transcripts(
            model, processor, records, batch_size=batch_size
        )
    return {
        "clips": len(records),
        "figures": meters.means().figures(),
        "wer": {
            side: word_error_rate(each_word_errors(records, transcripts))
            for side, transcripts in heard.items()
        },
    }
