"""Clips without speech: how often does a listener pretend to have heard something?

The definition, the same for every row: the row *pretends* on a clip if what it believes to have
been said has at least `PRETENDED_WORDS` words, written as WER counts them. For the cascade that is
Whisper's transcript, for the speech row the text nearest to the adapter's outputs at the length
that it finds by itself. One word is let pass: without a `logprob_threshold` the adapter makes at
least one token, which spells at most a word, and a recogniser's stray "you" is no sentence. An
adapter that does not make one output per token has no transcript, and so no such rate.

Beside it stands how often the row's *answer* differs from the language model's answer to an empty
transcript. That is defined for every adapter, but far stricter: any other wording counts.

Waveforms are (S,) float32 mono, S samples at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blspkd.data.acoustics import white_noise
from blspkd.data.manifest import Record
from blspkd.model.audio import SAMPLING_RATE
from blspkd.model.decoding import Decoding
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor
from blspkd.model.prompts import as_messages

from .answers import answer_from_speech, answer_from_text, nearest_embedding_transcripts
from .cascade import Transcriber
from .conditions import Waveform, generator
from .metrics import normalize

PRETENDED_WORDS = 2
"""From how many words on a transcript of nothing counts as made up."""
LEVELS: dict[str, float | None] = {
    "silence": None,
    "noise -60 dBFS": -60.0,
    "noise -40 dBFS": -40.0,
    "noise -20 dBFS": -20.0,
}
"""Kinds of clips without speech: the level (root mean square) of their white noise."""
SECONDS = (1.0, 10.0)


@dataclass(frozen=True)
class Pretence:
    """What a row made of clips of one kind that hold no speech.

    Attributes:
        clips: How many.
        pretends: Share whose transcript has at least `PRETENDED_WORDS` words; None where the row
            has no transcripts.
        words: Mean number of words of its transcripts; None likewise.
        answers_differ: Share whose answer is not the one to an empty transcript.
    """

    clips: int
    pretends: float | None
    words: float | None
    answers_differ: float


@dataclass(frozen=True)
class NothingHeard:
    """All rows on clips without speech.

    Attributes:
        found: By row, "cascade" (if there is a decoder) and "speech", and by kind of clip.
        transcripts: By row, one for each clip in the order of `kinds`; empty without transcripts.
        kinds: Of each clip.
        empty_answer: The language model's answer to an empty transcript.
    """

    found: dict[str, dict[str, Pretence]]
    transcripts: dict[str, list[str]]
    kinds: list[str]
    empty_answer: str

    def figures(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        return {
            "pretended_words": PRETENDED_WORDS,
            "empty_answer": self.empty_answer,
            "rows": {
                row: {kind: asdict(one) for kind, one in by_kind.items()}
                for row, by_kind in self.found.items()
            },
        }


def empty_clips(count: int) -> tuple[list[Record], list[str]]:
    """Records without speech, `count` of each kind, and their kinds; no such files exist."""
    records, kinds = [], []
    for kind in LEVELS:
        for number in range(count):
            name = f"{kind} {number}"
            records.append(Record(audio=Path(f"{name}.wav"), text="", id=name))
            kinds.append(kind)
    return records, kinds


def hear_nothing(record: Record) -> Waveform:
    """The sound of one of `empty_clips`: 1 to 10 s of silence or of white noise."""
    kind = record.id.rpartition(" ")[0]
    random = generator("nothing", record.id)
    samples = int(SAMPLING_RATE * random.uniform(*SECONDS))
    level = LEVELS[kind]
    if level is None:
        return np.zeros(samples, dtype=np.float32)
    noise = white_noise(samples, rng=random)
    return np.asarray(noise * 10.0 ** (level / 20.0), dtype=np.float32)


def hear_out_nothing(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    *,
    prompt: str,
    count: int,
    transcriber: Transcriber | None,
    decoding: Decoding,
    batch_size: int = 8,
) -> NothingHeard:
    """Let speech and cascade listen to clips without speech.

    Args:
        model: The speech LLM.
        processor: The model's.
        prompt: The user turn, with `{speech}` in it.
        count: Clips of each kind.
        transcriber: Whisper, for the row "cascade"; None leaves it out.
        decoding: How words are chosen.
        batch_size: Clips at a time.
    """
    records, kinds = empty_clips(count)
    messages = [as_messages(prompt)] * len(records)
    options: dict[str, Any] = {"decoding": decoding, "batch_size": batch_size}
    (empty,) = answer_from_text(model, processor, [""], messages[:1], decoding=decoding)
    transcripts: dict[str, list[str]] = {}
    answers: dict[str, list[str]] = {}
    if transcriber is not None:
        heard = transcriber.transcribe(records, hear=hear_nothing)
        transcripts["cascade"] = heard
        answers["cascade"] = answer_from_text(model, processor, heard, messages, **options)
    if model.config.adapter_type == "cformer":
        transcripts["speech"] = nearest_embedding_transcripts(
            model, processor, records, batch_size=batch_size, hear=hear_nothing
        )
    answers["speech"] = answer_from_speech(
        model, processor, records, messages, hear=hear_nothing, **options
    )
    found = {
        row: {
            kind: _pretence(
                [a for a, k in zip(said, kinds, strict=True) if k == kind],
                [t for t, k in zip(transcripts.get(row, []), kinds, strict=False) if k == kind],
                empty,
            )
            for kind in LEVELS
        }
        for row, said in answers.items()
    }
    return NothingHeard(found, transcripts, kinds, empty)


def _pretence(answers: Sequence[str], transcripts: Sequence[str], empty: str) -> Pretence:
    words = [len(normalize(transcript).split()) for transcript in transcripts]
    made_up = [count >= PRETENDED_WORDS for count in words]
    return Pretence(
        clips=len(answers),
        pretends=sum(made_up) / len(words) if words else None,
        words=sum(words) / len(words) if words else None,
        answers_differ=sum(answer != empty for answer in answers) / len(answers),
    )
