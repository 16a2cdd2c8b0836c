"""Records to batches: what is kept, how clips of like length meet, what a batch holds.

Shapes: B batch, M mel bins, F mel frames, T encoder frames, D encoder width, L text length.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from blspkd.model.audio import probe_audio
from blspkd.model.passes import shared_prompt_length
from blspkd.model.processing import BlspKDProcessor, TokenizedTurn

from .alignment_cache import AlignmentCache
from .augment import Augmentation
from .features import FeatureCache
from .manifest import Record, read_manifest
from .turns import record_messages

EpochIndex = tuple[int, int]
"""Which epoch, and which clip: so that workers, too, know what to draw."""


@dataclass(frozen=True)
class Clip:
    """One training item: its conversation, and its speech as features or as encoder outputs.

    Attributes:
        turn: the conversation as token ids.
        mel: (M, F) float32, or None.
        encoded: (T, D), or None.
        token_ends: (N,), where each transcript token ends, in encoder frames, or None.
    """

    turn: TokenizedTurn
    mel: np.ndarray | None
    encoded: Tensor | None
    token_ends: Tensor | None = None


class ClipDataset(Dataset[Clip]):
    """The records of a manifest as model inputs.

    Args:
        records: what to read; see :func:`keep_usable`.
        processor: makes features and token ids.
        prompt: of records without ``messages`` of their own.
        cache: encoder outputs made beforehand; without it, each item carries mel features.
        hear: how the clips sound, as (S,) float32 at 16 kHz; by default as they were recorded.
        augmentation: what is done to the clips in each epoch.
        alignments: where the tokens end, made beforehand from what ``cache`` holds.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: BlspKDProcessor,
        *,
        prompt: str,
        cache: FeatureCache | None = None,
        hear: Callable[[Record], np.ndarray] | None = None,
        augmentation: Augmentation | None = None,
        alignments: AlignmentCache | None = None,
    ) -> None:
        if cache is not None and hear is not None:
            raise ValueError("the cache holds clips as they were recorded: give no `hear` with it")
        if augmentation is not None and hear is not None:
            raise ValueError("augmentation decides how clips sound: give no `hear` with it")
        self.records = list(records)
        self.processor = processor
        self.prompt = prompt
        self.cache = cache
        self.hear = hear
        self.augmentation = augmentation
        self.alignments = alignments

    def __len__(self) -> int:
        """How many clips."""
        return len(self.records)

    def __getitem__(self, index: int | EpochIndex) -> Clip:
        """Read one clip, as it is in an epoch (the first, if only its number is given)."""
        epoch, position = (0, index) if isinstance(index, int) else index
        record = self.records[position]
        turn = self.processor.tokenize_turn(
            record_messages(record, self.prompt),
            record.text,
            response=record.response,
            response_finished=record.response_finished is not False,
        )
        augmentation = self.augmentation
        if self.cache is not None:
            copy = 0 if augmentation is None else augmentation.copy(record, epoch)
            encoded = self.cache.load(record, copy)
            ends = None if self.alignments is None else self.alignments.load(record, copy)
            if augmentation is not None:
                encoded = augmentation.mask_encoded(encoded, record, epoch)
            return Clip(turn, None, encoded, ends)
        if augmentation is not None:
            mel = self.processor.features(augmentation.waveform(record, epoch))
            return Clip(turn, augmentation.mask_mel(mel, record, epoch), None)
        audio = record.audio if self.hear is None else self.hear(record)
        return Clip(turn, self.processor.features(audio), None)

    def lengths(self) -> list[float]:
        """What to group clips by: their seconds, or else the length of their transcript."""
        if all(record.duration is not None for record in self.records):
            return [float(record.duration or 0.0) for record in self.records]
        return [float(len(record.text)) for record in self.records]


def join_responses(records: Sequence[Record], manifest: Path) -> list[Record]:
    """Give records the responses that another manifest has for their ids.

    Raises:
        ValueError: if it has none for any of them.
    """
    answered = {record.id: record for record in read_manifest(manifest, check_audio=False)}
    joined = [
        dataclasses.replace(
            record,
            response=answered[record.id].response,
            response_finished=answered[record.id].response_finished,
        )
        if record.id in answered
        else record
        for record in records
    ]
    if not any(record.id in answered for record in records):
        raise ValueError(f"{manifest} answers none of the training clips: no id is in both")
    return joined


def keep_usable(
    records: Sequence[Record],
    processor: BlspKDProcessor,
    *,
    prompt: str,
    max_duration: float,
    max_text_tokens: int,
) -> tuple[list[Record], Counter[str]]:
    """Leave out what cannot be trained on, and say how much and why.

    Args:
        records: of a manifest.
        processor: counts the tokens.
        prompt: of records without messages of their own.
        max_duration: seconds.
        max_text_tokens: of prompt, transcript and response together.

    Returns:
        The usable records, each with its duration, and how many were dropped for which reason.

    Raises:
        AudioError: if a clip of unknown duration has no readable header.
    """
    kept, dropped = [], Counter[str]()
    for record in records:
        if record.duration is None:
            record = dataclasses.replace(record, duration=probe_audio(record.audio).duration)
        if (record.duration or 0.0) > max_duration:
            dropped[f"longer than {max_duration:g} s"] += 1
        else:
            turn = processor.tokenize_turn(
                record_messages(record, prompt), record.text, response=record.response
            )
            if len(turn.input_ids) > max_text_tokens:
                dropped[f"more than {max_text_tokens} tokens"] += 1
            else:
                kept.append(record)
    return kept, dropped


class Collator:
    """Clips to the keyword arguments of the model's ``forward``.

    Args:
        processor: pads.
        full_window: pad mel features to the encoder's window.
        share_prompt: tell the model what the clips' prompts have in common, to read it once.
    """

    def __init__(
        self, processor: BlspKDProcessor, *, full_window: bool = False, share_prompt: bool = True
    ) -> None:
        self.processor = processor
        self.full_window = full_window
        self.share_prompt = share_prompt

    def __call__(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """Batch the clips, right-padded."""
        batch: dict[str, Any] = dict(self.processor.pad_turns([clip.turn for clip in clips]))
        if self.share_prompt:
            batch["prompt_length"] = shared_prompt_length(batch["input_ids"], batch["speech_mask"])
        mels = [clip.mel for clip in clips if clip.mel is not None]
        if mels:
            return {**batch, **self.processor.pad_features(mels, full_window=self.full_window)}
        encoded = [clip.encoded for clip in clips if clip.encoded is not None]
        ends = [clip.token_ends for clip in clips if clip.token_ends is not None]
        if ends:
            batch["token_ends"] = torch.nn.utils.rnn.pad_sequence(ends, batch_first=True)
        return {**batch, **pad_encoded(encoded)}


def pad_encoded(encoded: Sequence[Tensor]) -> dict[str, Tensor]:
    """Cached encoder outputs, each (T_b, D), to one float32 batch and its mask."""
    lengths = torch.tensor([len(one) for one in encoded])
    states = torch.nn.utils.rnn.pad_sequence([one.float() for one in encoded], batch_first=True)
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": torch.arange(states.shape[1]) < lengths[:, None],
    }


class LengthGroupedSampler(Sampler[EpochIndex]):
    """A new random order each epoch in which clips of like length stand together.

    The order depends on the seed and the epoch alone, so that a resumed run sees the same one.

    Args:
        lengths: one number per clip.
        batch_size: clips per batch.
        seed: of the orders.
    """

    MEGABATCH = 20

    def __init__(self, lengths: Sequence[float], batch_size: int, *, seed: int) -> None:
        self.lengths = torch.tensor(lengths, dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """How many clips."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[EpochIndex]:
        """Shuffle, sort within stretches of 20 batches, shuffle the batches."""
        epoch = self.epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[list[int]] = []
        for stretch in order.split(self.batch_size * self.MEGABATCH):
            ordered = stretch[self.lengths[stretch].argsort(descending=True)]
            batches += [part.tolist() for part in ordered.split(self.batch_size)]
        # only full batches may move, or the short one would shift the bounds of those after it
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        for index in torch.randperm(len(full), generator=generator).tolist():
            yield from ((epoch, clip) for clip in full[index])
        for batch in rest:
            yield from ((epoch, clip) for clip in batch)


def batches_of(
    dataset: ClipDataset, collator: Collator, batch_size: int
) -> Iterator[dict[str, Any]]:
    """A dataset's batches in their own order."""
    for start in range(0, len(dataset), batch_size):
        yield collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
