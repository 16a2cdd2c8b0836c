"""What a run reads of the frozen encoder, made before its first step."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState

from blspkd.data.alignment import CrossAttentionAligner
from blspkd.data.alignment_cache import AlignmentCache
from blspkd.data.augment import Augmentation
from blspkd.data.features import FeatureCache
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .build import Say
from .clips import Clips
from .config import TrainConfig
from .shares import in_shares


def filled_cache(
    config: TrainConfig,
    folder: Path,
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    clips: Clips,
    augmentation: Augmentation,
    say: Say,
) -> FeatureCache:
    """Encoder outputs of every clip of the run, and of the training clips' augmented copies."""
    root = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else folder / "cache"
    cache = FeatureCache(root, model, processor, augmenter=augmentation.augmenter)
    process = PartialState()

    def progress(done: int, total: int) -> None:
        if done == total or done % 512 < 16:
            say(f"encoded {done}/{total} clips{_whose(process)}")

    copies = 0 if augmentation.augmenter is None else config.data.augment.copies
    held_out = [record for records in clips.held_out.values() for record in records]
    in_shares(
        process,
        clips.train,
        lambda share: cache.fill(share, copies=copies, progress=progress),
    )
    in_shares(process, held_out, lambda share: cache.fill(share, progress=progress))
    return cache


def filled_alignments(
    config: TrainConfig,
    cache: FeatureCache,
    processor: BlspKDProcessor,
    clips: Clips,
    say: Say,
) -> AlignmentCache:
    """Where the tokens of every training clip, and of its augmented copies, end."""
    alignments = AlignmentCache(cache, processor, prompt=config.model.prompt)
    process = PartialState()

    def load_aligner() -> CrossAttentionAligner:
        return CrossAttentionAligner.load(
            config.model.encoder, dtype=torch.float32, device=cache.device
        )

    def progress(done: int, total: int) -> None:
        if done == total or done % 512 == 0:
            say(f"aligned {done}/{total} clips{_whose(process)}")

    copies = 0 if cache.augmenter is None else config.data.augment.copies
    in_shares(
        process,
        clips.train,
        lambda share: alignments.fill(share, load_aligner, copies=copies, progress=progress),
    )
    return alignments


def _whose(process: PartialState) -> str:
    return "" if process.num_processes == 1 else f" of one share in {process.num_processes}"
