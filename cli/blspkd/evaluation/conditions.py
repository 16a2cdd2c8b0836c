"""Clips under worse conditions: noise at a signal-to-noise ratio, other voices, a telephone line.

What is done to a clip depends on the clip's id and on nothing else, so that every model, and the
cascade, hears the very same sound. Waveforms are (S,) float32 mono, S samples at 16 kHz.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from blspkd.data.acoustics import add_noise, telephone_band, white_noise
from blspkd.data.manifest import Record
from blspkd.model.audio import load_audio

Waveform = npt.NDArray[np.float32]
Hear = Callable[[Record], Waveform]
"""A record's sound as it reaches the listener."""

Kind = Literal["noise", "babble", "telephone"]
BABBLE_VOICES = 6
"""How many other clips are mixed into a babble."""


@dataclass(frozen=True)
class Step:
    """One thing that happens to a waveform.

    Attributes:
        kind: "noise" adds white noise, "babble" a mixture of other clips of the manifest,
            "telephone" keeps 300 to 3,400 Hz.
        snr_db: Of noise and babble.
    """

    kind: Kind
    snr_db: float | None = None


@dataclass(frozen=True)
class Condition:
    """What happens to each clip, one step after the other.

    Attributes:
        name: As it was written, such as "noise:10+telephone".
        steps: See `Step`.
    """

    name: str
    steps: tuple[Step, ...]


def hear_clean(record: Record) -> Waveform:
    """The clip as it was recorded.

    Raises:
        AudioError: It cannot be read.
    """
    return load_audio(record.audio)


def parse_condition(text: str) -> Condition:
    """Read `noise:DB`, `babble:DB`, `telephone`, or several of them joined by `+`.

    Raises:
        ValueError: It is none of these.
    """
    steps = []
    for part in text.split("+"):
        kind, colon, level = part.partition(":")
        if kind not in get_args(Kind):
            raise ValueError(
                f"condition {text!r}: expected noise:DB, babble:DB or telephone, got {part!r}"
            )
        if kind == "telephone":
            if colon:
                raise ValueError(f"condition {text!r}: telephone takes no level")
            steps.append(Step("telephone"))
            continue
        try:
            snr_db = float(level)
        except ValueError:
            snr_db = math.nan
        if not math.isfinite(snr_db):
            raise ValueError(
                f"condition {text!r}: expected a signal-to-noise ratio in dB, as in {kind}:10, "
                f"got {level!r}"
            )
        steps.append(Step("noise" if kind == "noise" else "babble", snr_db))
    return Condition(text, tuple(steps))


def hear_under(condition: Condition, records: Sequence[Record]) -> Hear:
    """How clips sound under a condition.

    Args:
        condition: What happens to them.
        records: Where babble takes its voices from.

    Raises:
        ValueError: The condition has babble, and there are no two clips to make it of.
    """
    if len(records) < 2 and any(step.kind == "babble" for step in condition.steps):
        raise ValueError(
            f"condition {condition.name!r}: babble is mixed from other clips, got {len(records)} "
            "in all"
        )

    def hear(record: Record) -> Waveform:
        waveform = hear_clean(record)
        for step in condition.steps:
            if step.kind == "telephone":
                waveform = telephone_band(waveform)
                continue
            assert step.snr_db is not None
            # the same noise at every level: what differs between two of them is the level alone
            random = generator(step.kind, record.id)
            if step.kind == "noise":
                noise = white_noise(len(waveform), rng=random)
            else:
                noise = babble(len(waveform), record, records, random)
            waveform = add_noise(waveform, noise, snr_db=step.snr_db)
        return waveform.astype(np.float32)

    return hear


def babble(
    samples: int, record: Record, records: Sequence[Record], random: np.random.Generator
) -> Waveform:
    """A mixture of other clips, each as loud as the others, repeated to the length asked for.

    Args:
        samples: S, of the result.
        record: Whose own voice is left out.
        records: Whose voices are mixed.
        random: Draws which ones, and where each begins.
    """
    others = [other for other in records if other.id != record.id]
    count = min(BABBLE_VOICES, len(others))
    mixed: npt.NDArray[Any] = np.zeros(samples)
    for index in random.choice(len(others), size=count, replace=False):
        voice = hear_clean(others[index]).astype(np.float64)
        voice = np.roll(np.resize(voice, samples), random.integers(samples))
        power = float(np.mean(voice**2))
        if power > 0:
            mixed += voice / math.sqrt(power)
    return mixed.astype(np.float32)


def generator(*names: str) -> np.random.Generator:
    """Random numbers that depend on these names alone, on any machine."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
