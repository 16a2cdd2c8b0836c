"""Check every clip of a corpus and write those that can be used as a manifest."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blspkd.data.manifest import Record, write_manifest
from blspkd.data.sources import Dropped, read_source
from blspkd.model.audio import (
    MAX_DURATION,
    MIN_DURATION,
    AudioError,
    is_silent,
    load_audio,
    probe_audio,
)


@dataclass(frozen=True)
class PrepareConfig:
    """What a clip must be like to be kept.

    Attributes:
        min_duration: Seconds.
        max_duration: Seconds; a Whisper encoder hears 30.
        case: "lower" writes transcripts in lower case, "keep" leaves them as they are.
        punctuation: "strip" leaves words alone (letters, digits, apostrophes), "keep" everything.
    """

    min_duration: float = 0.5
    max_duration: float = MAX_DURATION
    case: Literal["keep", "lower"] = "keep"
    punctuation: Literal["keep", "strip"] = "keep"

    def __post_init__(self) -> None:
        if not MIN_DURATION <= self.min_duration < self.max_duration <= MAX_DURATION:
            raise ValueError(
                f"expected {MIN_DURATION:g} <= min_duration < max_duration <= {MAX_DURATION:g} s, "
                f"got min_duration={self.min_duration:g} and max_duration={self.max_duration:g}"
            )
        if self.case not in ("keep", "lower"):
            raise ValueError(f"case: expected 'keep' or 'lower', got {self.case!r}")
        if self.punctuation not in ("keep", "strip"):
            raise ValueError(f"punctuation: expected 'keep' or 'strip', got {self.punctuation!r}")

    def write_text(self, text: str) -> str:
        """A transcript as this configuration has it."""
        if self.punctuation == "strip":
            text = " ".join(re.sub(r"[^\w\s']|_", " ", text.replace("\u2019", "'")).split())
        return text.lower() if self.case == "lower" else text


@dataclass
class PrepareSummary:
    """What became of a corpus.

    Attributes:
        kept: Clips in the manifest.
        seconds: Their total duration.
        capitals: How many of them have a transcript all in capitals.
        dropped: Clips left out, by reason.
        examples: The first message for each reason.
    """

    kept: int = 0
    seconds: float = 0.0
    capitals: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Clips that the source named."""
        return self.kept + self.dropped.total()

    def count(self, item: Record | Dropped) -> None:
        """Take one clip into account."""
        if isinstance(item, Dropped):
            self.dropped[item.reason] += 1
            self.examples.setdefault(item.reason, item.message)
        else:
            self.kept += 1
            self.seconds += item.duration or 0.0
            self.capitals += item.text.isupper()


def prepare(
    source: Path,
    out: Path,
    *,
    config: PrepareConfig | None = None,
    jobs: int = 1,
    progress: Callable[[Iterable[Record | Dropped], int], Iterable[Record | Dropped]] | None = None,
) -> PrepareSummary:
    """Check a corpus and write its manifest; nothing is written if no clip is left.

    Args:
        source: A manifest or a folder of one of the layouts in `blspkd.data.sources`.
        out: The manifest to write; an existing one is replaced.
        config: What to keep.
        jobs: Files decoded at a time.
        progress: Wraps the stream of checked clips, given it and its length.

    Raises:
        ValueError: The source is missing or has no known layout, or `out` is `source`.
    """
    config = config or PrepareConfig()
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out}: would overwrite the source; name another file to write")
    items = list(_without_repeats(read_source(source)))
    summary = PrepareSummary()
    kept: list[Record] = []
    with ThreadPoolExecutor(jobs) as pool:  # libsndfile and soxr work outside the GIL
        checked: Iterable[Record | Dropped] = pool.map(lambda i: check_clip(i, config), items)
        for item in progress(checked, len(items)) if progress else checked:
            summary.count(item)
            if isinstance(item, Record):
                kept.append(item)
    if kept:
        write_manifest(out, kept)
    return summary


def check_clip(item: Record | Dropped, config: PrepareConfig) -> Record | Dropped:
    """Decode a clip and tell what is wrong with it, or return it with its duration."""
    if isinstance(item, Dropped):
        return item
    try:
        f"{item.audio}{item.id}".encode()
    except UnicodeEncodeError:
        return Dropped("file name", f"{str(item.audio)!a}: its name is not UTF-8; rename it")
    try:
        info = probe_audio(item.audio)
        waveform = load_audio(
            item.audio,
            sampling_rate=info.sampling_rate,  # as it is: resampling changes no fault
            min_duration=config.min_duration,
            max_duration=config.max_duration,
        )
    except AudioError as error:
        return Dropped(error.reason, str(error))
    if is_silent(waveform):
        return Dropped("silent", f"{item.audio}: no sound in it")
    text = config.write_text(" ".join(item.text.split()))
    if not text:
        return Dropped("empty transcript", f"{item.audio}: no word in {item.text!r}")
    return dataclasses.replace(
        item,
        text=text,
        duration=round(len(waveform) / info.sampling_rate, 3),
    )


def _without_repeats(items: Iterable[Record | Dropped]) -> Iterator[Record | Dropped]:
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Record):
            if item.id in seen:
                yield Dropped("duplicate id", f"{item.audio}: the id {item.id!r} occurs twice")
                continue
            seen.add(item.id)
        yield item
