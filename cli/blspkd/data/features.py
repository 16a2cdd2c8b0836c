"""Encoder outputs, computed once and kept on disk: worth it whenever the encoder is frozen.

Shapes: T encoder frames, D encoder width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .manifest import Record


class FeatureCache:
    """One safetensors file per clip under ``folder``.

    A file's name holds the encoder's fingerprint, whether padding was encoded, and the audio
    file's path, size and time of change, so that nothing stale is ever read.

    Args:
        folder: where the files go.
        model: whose encoder it is.
        processor: makes the mel features.
    """

    def __init__(
        self,
        folder: Path,
        model: BlspKDForConditionalGeneration,
        processor: BlspKDProcessor,
    ) -> None:
        if model.config.train_encoder:
            raise ValueError(
                "cached features need a frozen encoder: set data.cache_features=false or "
                "model.train_encoder=false"
            )
        key = f"{model.config.encoder_fingerprint}-{int(model.config.full_window)}"
        self.folder = folder / key
        self.model = model
        self.processor = processor

    def path(self, record: Record) -> Path:
        """The file that holds a record's encoder output, whether it exists or not."""
        stat = record.audio.stat()
        identity = f"{record.audio.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        return self.folder / name[:2] / f"{name}.safetensors"

    def load(self, record: Record) -> Tensor:
        """(T, D) float16, as :meth:`fill` left it."""
        return load_file(self.path(record))["encoded"]

    @torch.no_grad()
    def fill(
        self,
        records: Sequence[Record],
        *,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode what is missing.

        Args:
            records: the clips.
            batch_size: clips encoded at once.
            progress: called with (clips done, clips to do).

        Returns:
            How many clips were encoded.
        """
        missing = [record for record in records if not self.path(record).exists()]
        missing.sort(key=lambda record: record.duration or 0.0)
        device = self.model.embedding_weight().device
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            mels = [self.processor.features(record.audio) for record in part]
            batch = self.processor.pad_features(mels, full_window=self.model.config.full_window)
            hidden, mask = self.model.encode(
                batch["input_features"].to(device), batch["feature_attention_mask"].to(device)
            )
            for record, states, real in zip(part, hidden, mask, strict=True):
                self._store(record, states[real].half().cpu())
            if progress is not None:
                progress(start + len(part), len(missing))
        return len(missing)

    def _store(self, record: Record, encoded: Tensor) -> None:
        path = self.path(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"encoded": encoded.contiguous()}, unfinished)
        os.replace(unfinished, path)
