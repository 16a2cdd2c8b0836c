"""The cascade's first half: a stock Whisper model writes down what it hears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from blspkd.data.manifest import Record
from blspkd.model.audio import SAMPLING_RATE
from blspkd.model.bases import load_feature_extractor, load_transcriber, resolve

from .answers import Progress
from .conditions import Hear, hear_clean


@dataclass(frozen=True)
class Transcriber:
    """A whole Whisper model with what it needs.

    Attributes:
        name: Path or hub id it was loaded from.
        model: Encoder and decoder.
        feature_extractor: Pads to 30 s, as Whisper was trained; without it the decoder loops.
        tokenizer: Turns its token ids to text.
    """

    name: str
    model: WhisperForConditionalGeneration
    feature_extractor: Any
    tokenizer: Any

    @classmethod
    def load(
        cls, reference: str, *, dtype: torch.dtype, device: torch.device
    ) -> Transcriber | None:
        """Load one.

        Args:
            reference: Path or hub id.
            dtype: Of the weights.
            device: Where it runs.

        Returns:
            None if the checkpoint has no decoder.
        """
        model: Any = load_transcriber(reference, dtype=dtype)
        if model is None:
            return None
        return cls(
            name=reference,
            model=model.to(device),
            feature_extractor=load_feature_extractor(reference),
            tokenizer=AutoTokenizer.from_pretrained(resolve(reference)),
        )

    @torch.no_grad()
    def transcribe(
        self,
        records: Sequence[Record],
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
        hear: Hear = hear_clean,
    ) -> list[str]:
        """Write down clips, greedily, in the language of each record (English if not told).

        Args:
            records: The clips.
            batch_size: How many at a time.
            progress: Told how far it is.
            hear: How the clips sound.

        Raises:
            AudioError: A clip cannot be read.
            ValueError: The model does not know a record's language.
        """
        transcripts: list[str] = []
        multilingual = bool(getattr(self.model.generation_config, "is_multilingual", False))
        for start in range(0, len(records), batch_size):
            part = records[start : start + batch_size]
            inputs = self.feature_extractor(
                [hear(record) for record in part],
                sampling_rate=SAMPLING_RATE,  # another rate than the extractor's is refused
                return_attention_mask=True,
                return_tensors="pt",
            )
            options: dict[str, Any] = {}
            if multilingual:
                options["language"] = [record.lang or "en" for record in part]
                options["task"] = "transcribe"
            tokens = self.model.generate(
                inputs.input_features.to(self.model.device, self.model.dtype),
                attention_mask=inputs.attention_mask.to(self.model.device),
                do_sample=False,
                num_beams=1,
                **options,
            )
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            transcripts += [text.strip() for text in texts]
            if progress is not None:
                progress(len(transcripts), len(records))
        return transcripts
