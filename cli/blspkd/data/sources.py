"""Corpora as people have them: each layout becomes a stream of records, faults among them.

A source yields `Record` for a clip and `Dropped` for what cannot become one; audio is not opened
here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blspkd.data.manifest import ManifestError, Record, parse_line, read_lines

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif"})

LAYOUTS = (
    "a manifest (.jsonl with audio and text), a Common Voice table (.tsv with path and sentence), "
    "or a folder: LibriSpeech (*.trans.txt), Common Voice (one .tsv, clips/), LJSpeech "
    "(metadata.csv, wavs/) or audio files with a .txt of the same name beside each"
)


@dataclass(frozen=True)
class Dropped:
    """A clip that was left out.

    Attributes:
        reason: The kind of fault, for counting.
        message: Which clip, and what is wrong with it.
    """

    reason: str
    message: str


def read_source(source: Path) -> Iterator[Record | Dropped]:
    """Read a corpus of any known layout.

    Raises:
        ValueError: The source does not exist or has no known layout.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder; expected {LAYOUTS}")
    if source.is_file():
        if source.suffix == ".tsv":
            return _read_common_voice(source)
        if source.suffix in (".jsonl", ".json"):
            return _read_manifest(source)
        raise ValueError(f"{source}: not a known kind of corpus; expected {LAYOUTS}")
    if transcripts := sorted(source.rglob("*.trans.txt")):
        return _read_librispeech(transcripts)
    if (source / "metadata.csv").is_file():
        return _read_ljspeech(source / "metadata.csv")
    if tables := sorted(source.glob("*.tsv")):
        if len(tables) > 1:
            names = ", ".join(table.name for table in tables)
            raise ValueError(
                f"{source}: holds several tables ({names}), which share clips; name one: "
                f"{tables[0]}"
            )
        return _read_common_voice(tables[0])
    audio = sorted(p for p in source.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if any(path.with_suffix(".txt").is_file() for path in audio):
        return _read_pairs(source, audio)
    raise ValueError(f"{source}: no corpus found in this folder; expected {LAYOUTS}")


def _read_manifest(path: Path) -> Iterator[Record | Dropped]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            # whether the audio is there and sound is found out when it is opened
            yield parse_line(line, path=path, number=number, check_audio=False)
        except ManifestError as error:
            yield Dropped(error.reason, str(error))


def _read_librispeech(transcripts: list[Path]) -> Iterator[Record | Dropped]:
    for transcript in transcripts:
        lines = _read_text(transcript).splitlines()
        for number, line in enumerate(lines, start=1):
            name, _, text = line.strip().partition(" ")
            if name:
                yield _record(
                    _with_suffix(transcript.parent / name), text, name, transcript, number
                )


def _read_common_voice(table: Path) -> Iterator[Record | Dropped]:
    clips = table.parent / "clips"
    folder = clips if clips.is_dir() else table.parent
    lines = _read_text(table).split("\n")
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"path", "sentence"} - set(rows.fieldnames or [])
    if missing:
        raise ValueError(
            f"{table}:1: no column {' and no column '.join(sorted(missing))}; expected a Common "
            "Voice table with path and sentence"
        )
    for row in rows:
        if not row["path"] or row["sentence"] is None:
            where = f"{table}:{rows.line_num}"
            yield Dropped("broken line", f"{where}: expected path and sentence")
            continue
        audio = folder / row["path"]
        audio = audio if audio.suffix else audio.with_suffix(".mp3")
        lang = row.get("locale") or None
        yield _record(audio, row["sentence"], audio.stem, table, rows.line_num, lang=lang)


def _read_ljspeech(table: Path) -> Iterator[Record | Dropped]:
    for number, line in enumerate(_read_text(table).splitlines(), start=1):
        if not line.strip():
            continue
        name, *texts = line.split("|")
        if not texts:
            yield Dropped("broken line", f"{table}:{number}: expected ID|TEXT|NORMALISED TEXT")
            continue
        spoken = texts[1] if len(texts) > 1 and texts[1].strip() else texts[0]
        audio = table.parent / "wavs" / name
        audio = audio if audio.suffix in AUDIO_SUFFIXES else _with_suffix(audio, default=".wav")
        yield _record(audio, spoken, Path(name).stem, table, number)


def _read_pairs(source: Path, audio: list[Path]) -> Iterator[Record | Dropped]:
    for path in audio:
        transcript = path.with_suffix(".txt")
        if not transcript.is_file():
            yield Dropped("missing transcript", f"{path}: no {transcript.name} beside it")
            continue
        name = "-".join(path.relative_to(source).with_suffix("").parts)
        try:
            yield _record(path, _read_text(transcript), name, transcript, 1)
        except ValueError as error:
            yield Dropped("not text", str(error))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error


def _record(
    audio: Path, text: str, name: str, where: Path, number: int, *, lang: str | None = None
) -> Record | Dropped:
    text = " ".join(text.split())
    if not text:
        return Dropped("empty transcript", f"{where}:{number}: {json.dumps(name)} has no words")
    return Record(audio=audio, text=text, id=name, lang=lang)


def _with_suffix(stem: Path, *, default: str = ".flac") -> Path:
    """Find the audio file of a name given without its ending (which may hold dots)."""
    for suffix in (default, ".flac", ".wav", ".mp3", ".ogg", ".opus"):
        path = stem.parent / (stem.name + suffix)
        if path.is_file():
            return path
    return stem.parent / (stem.name + default)
