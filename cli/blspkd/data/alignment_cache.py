"""Where the tokens of the training clips end, found once and kept beside the encoder's outputs.

Shapes: N tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from blspkd.model.processing import BlspKDProcessor

from .alignment import CrossAttentionAligner
from .features import FeatureCache
from .manifest import Record
from .turns import record_messages


class AlignmentCache:
    """One safetensors file per clip and copy, beside the file of its encoder output.

    A file's name holds that of the encoder output and the transcript with its token boundaries.

    Args:
        features: where the encoder outputs are.
        processor: cuts the transcripts into tokens.
        prompt: of records without messages of their own.
    """

    def __init__(self, features: FeatureCache, processor: BlspKDProcessor, *, prompt: str) -> None:
        self.features = features
        self.processor = processor
        self.prompt = prompt

    def path(self, record: Record, copy: int = 0) -> Path:
        """The file that holds a copy's alignment, whether it exists or not."""
        text = f"{record.text}|{self._char_ends(record)}|{record.lang}"
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        encoded = self.features.path(record, copy)
        return encoded.with_name(f"{encoded.stem}-{name}.ends.safetensors")

    def load(self, record: Record, copy: int = 0) -> Tensor:
        """(N,) float32, in encoder frames, as :meth:`fill` left it."""
        return load_file(self.path(record, copy))["token_ends"]

    def fill(
        self,
        records: Sequence[Record],
        load_aligner: Callable[[], CrossAttentionAligner],
        *,
        copies: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Align what is missing; the encoder outputs must be there.

        Args:
            records: the clips.
            load_aligner: called only if anything is missing.
            copies: how many augmented copies of each, beside the clean one.
            progress: called with (clips done, clips to do).

        Returns:
            How many clips were aligned, each copy counted.
        """
        missing = [
            (record, copy)
            for record in records
            for copy in range(copies + 1)
            if not self.path(record, copy).exists()
        ]
        if not missing:
            return 0
        aligner = load_aligner()
        for done, (record, copy) in enumerate(missing, start=1):
            ends = aligner.token_ends(
                self.features.load(record, copy),
                record.text,
                self._char_ends(record),
                language=record.lang,
            )
            path = self.path(record, copy)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"token_ends": ends}, unfinished)
            os.replace(unfinished, path)
            if progress is not None:
                progress(done, len(missing))
        return len(missing)

    def _char_ends(self, record: Record) -> list[int]:
        return self.processor.transcript_ends(record_messages(record, self.prompt), record.text)
