"""Encoder outputs, computed once and kept on disk: worth it whenever the encoder is frozen.

Shapes: M mel bins, F mel frames, T encoder frames, D encoder width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blspkd.model.audio import load_audio
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .augment import WaveformAugmenter
from .manifest import Record


class FeatureCache:
    """One safetensors file per clip and copy under ``folder``.

    A file's name holds the encoder's fingerprint, whether padding was encoded, and the audio
    file's path, size and time of change, and for augmented copies their settings too, so that
    nothing stale is ever read. Copy 0 is the clean clip; copies depend on no run's seed.

    Args:
        folder: where the files go.
        model: whose encoder it is.
        processor: makes the mel features.
        augmenter: makes the copies beyond 0.
    """

    def __init__(
        self,
        folder: Path,
        model: BlspKDForConditionalGeneration,
        processor: BlspKDProcessor,
        *,
        augmenter: WaveformAugmenter | None = None,
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
        self.augmenter = augmenter
        self.augmentation = "" if augmenter is None else augmenter.fingerprint()

    def path(self, record: Record, copy: int = 0) -> Path:
        """The file that holds a copy's encoder output, whether it exists or not."""
        stat = record.audio.stat()
        identity = f"{record.audio.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if copy:
            identity += f"|{record.id}|{self.augmentation}|{copy}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:24]
        return self.folder / name[:2] / f"{name}.safetensors"

    def load(self, record: Record, copy: int = 0) -> Tensor:
        """(T, D) float16, as :meth:`fill` left it."""
        return load_file(self.path(record, copy))["encoded"]

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.model.embedding_weight().device

    def features(self, record: Record, copy: int = 0) -> np.ndarray:
        """(M, F) float32 mel features of a copy, from its audio file."""
        if copy == 0:
            return self.processor.features(record.audio)
        assert self.augmenter is not None
        waveform = load_audio(record.audio)
        return self.processor.features(
            self.augmenter(waveform, clip_id=record.id, draw=f"copy {copy}")
        )

    @torch.no_grad()
    def fill(
        self,
        records: Sequence[Record],
        *,
        copies: int = 0,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode what is missing.

        Args:
            records: the clips.
            copies: how many augmented copies of each, beside the clean one.
            batch_size: clips encoded at once.
            progress: called with (clips done, clips to do).

        Returns:
            How many clips were encoded, each copy counted.
        """
        if copies and self.augmenter is None:
            raise ValueError(f"{copies} augmented copies asked for, but there is no augmenter")
        missing = [
            (record, copy)
            for record in records
            for copy in range(copies + 1)
            if not self.path(record, copy).exists()
        ]
        missing.sort(key=lambda item: item[0].duration or 0.0)
        device = self.device
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            mels = [self.features(record, copy) for record, copy in part]
            batch = self.processor.pad_features(mels, full_window=self.model.config.full_window)
            hidden, mask = self.model.encode(
                batch["input_features"].to(device), batch["feature_attention_mask"].to(device)
            )
            for (record, copy), states, real in zip(part, hidden, mask, strict=True):
                self._store(self.path(record, copy), states[real].half().cpu())
            if progress is not None:
                progress(start + len(part), len(missing))
        return len(missing)

    def _store(self, path: Path, encoded: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"encoded": encoded.contiguous()}, unfinished)
        os.replace(unfinished, path)
