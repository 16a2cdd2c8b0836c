"""The cascade's first half: a stock Whisper model writes down what it hears.

It listens as Whisper's own program does (arXiv 2212.04356, section 3.8): what looks like a loop or
like a guess is heard again at a higher temperature, and what looks like no speech is left empty.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from blspkd.data.languages import language_code
from blspkd.data.manifest import Record
from blspkd.data.prepare import PrepareConfig
from blspkd.model.audio import SAMPLING_RATE
from blspkd.model.bases import load_feature_extractor, load_transcriber, resolve

from .answers import Progress
from .conditions import Hear, hear_clean

FALLBACK: dict[str, Any] = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 1.35,  # of token ids, as transformers counts it
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
}
"""When a clip is heard again, and when it holds no speech."""


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
        progress: Progress | None = None,
        hear: Hear = hear_clean,
    ) -> list[str]:
        """Write down clips, in the language of each record (English if not told).

        Greedily where that goes well, else by `FALLBACK`; its draws are the same each time.

        Args:
            records: The clips.
            progress: Told how far it is.
            hear: How the clips sound.

        Raises:
            AudioError: A clip cannot be read.
            ValueError: The model does not know a record's language.
        """
        transcripts: list[str] = []
        multilingual = bool(getattr(self.model.generation_config, "is_multilingual", False))
        device = self.model.device
        # One by one, so that what is drawn for a clip does not depend on its neighbours.
        for record in records:
            inputs = self.feature_extractor(
                [hear(record)],
                sampling_rate=SAMPLING_RATE,  # another rate than the extractor's is refused
                return_attention_mask=True,
                return_tensors="pt",
            )
            options: dict[str, Any] = {}
            if multilingual:
                options["language"] = [language_code(record.lang)]
                options["task"] = "transcribe"
            draws = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with draws, _encoding_once(self.model.get_encoder()):
                torch.manual_seed(0)
                tokens = self.model.generate(
                    inputs.input_features.to(device, self.model.dtype),
                    attention_mask=inputs.attention_mask.to(device),
                    num_beams=1,
                    **FALLBACK,
                    **options,
                )
            (text,) = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            transcripts.append(text.strip())
            if progress is not None:
                progress(len(transcripts), len(records))
        return transcripts


@contextmanager
def _encoding_once(encoder: Any) -> Iterator[None]:
    """Let a clip be encoded once: each decoding asks for it twice, the second for its no-speech."""
    encode = encoder.forward
    known: list[Any] = []

    @functools.wraps(encode)
    def remember(input_features: Tensor, **options: Any) -> Any:
        if not known or not torch.equal(known[0], input_features):
            known[:] = input_features, encode(input_features, **options)
        return copy.copy(known[1])

    encoder.forward = remember
    try:
        yield
    finally:
        del encoder.forward  # the class's own is below


def style_of(texts: Sequence[str]) -> PrepareConfig:
    """How transcripts are written: in lower case, and without punctuation, if all of them are."""
    bare = PrepareConfig(punctuation="strip")
    return PrepareConfig(
        case="lower" if all(text == text.lower() for text in texts) else "keep",
        punctuation="strip"
        if all(bare.write_text(text) == " ".join(text.split()) for text in texts)
        else "keep",
    )


def as_written(heard: Sequence[str], records: Sequence[Record]) -> list[str]:
    """What Whisper heard, written as the records' own transcripts are.

    The language model answers "how are you" otherwise than "How are you?". The row "text" reads the
    manifest's transcripts, and whoever compares the cascade with it asks what hearing costs, not
    what a capital letter does.
    """
    style = style_of([record.text for record in records])
    return [style.write_text(text) for text in heard]
