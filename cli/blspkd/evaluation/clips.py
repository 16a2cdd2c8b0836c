"""Audio files that belong to no manifest, and the answers to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blspkd.data.manifest import Record
from blspkd.model.audio import SAMPLING_RATE, is_silent, load_audio
from blspkd.model.decoding import GREEDY, Decoding
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor
from blspkd.model.prompts import Messages, as_messages, check_prompt

from .answers import answer_from_speech, nearest_embedding_transcripts


@dataclass(frozen=True)
class LooseClip:
    """An audio file that was found to be usable.

    Attributes:
        path: Where it is.
        messages: The chat around it.
        duration: Seconds.
        silent: It holds no sound that could be speech.
    """

    path: Path
    messages: Messages
    duration: float
    silent: bool


def read_clips(paths: Sequence[Path], *, prompt: str) -> list[LooseClip]:
    """Check audio files, before any weights are loaded.

    Args:
        paths: The files.
        prompt: The user turn, with `{speech}` in it.

    Raises:
        AudioError: A file cannot be used.
        ValueError: The prompt does not say where the speech goes.
    """
    check_prompt(prompt)
    return list(_read_each(paths, as_messages(prompt)))


def _read_each(paths: Sequence[Path], messages: Messages) -> Iterator[LooseClip]:
    for path in paths:
        waveform = load_audio(path)
        yield LooseClip(path, messages, len(waveform) / SAMPLING_RATE, is_silent(waveform))


def answer_clips(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    clips: Sequence[LooseClip],
    *,
    decoding: Decoding = GREEDY,
    batch_size: int = 8,
    seed: int = 0,
) -> list[str]:
    """Answer clips.

    Args:
        model: The speech LLM.
        processor: The model's.
        clips: See `read_clips`.
        decoding: How words are chosen.
        batch_size: Clips at a time.
        seed: Of what is drawn at random.
    """
    torch.manual_seed(seed)
    return answer_from_speech(
        model,
        processor,
        _records(clips),
        [clip.messages for clip in clips],
        decoding=decoding,
        batch_size=batch_size,
    )


def transcribe_clips(
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    clips: Sequence[LooseClip],
    *,
    batch_size: int = 8,
) -> list[str]:
    """What was heard in clips, see `nearest_embedding_transcripts`; empty where no speech was.

    Args:
        model: The speech LLM, with a CFormer.
        processor: The model's.
        clips: See `read_clips`.
        batch_size: Clips at a time.
    """
    return nearest_embedding_transcripts(model, processor, _records(clips), batch_size=batch_size)


def _records(clips: Sequence[LooseClip]) -> list[Record]:
    return [Record(audio=clip.path, text="", id=str(clip.path)) for clip in clips]
