"""Speak a text: one sentence a line in, a synthetic speech corpus out.

Sentences are cut into clauses of 3 to 15 words (`--max-words` has longer ones for training), each
clause is spoken once by one of the given flite, espeak-ng and Piper voices (with a little variety
in rate and pitch) and written as 16 kHz mono FLAC, beside three manifests: `train.jsonl`,
`test-sentences.jsonl` (unseen sentences, voices of the training set) and `test-voice.jsonl` (the
same unseen sentences, one unseen voice).

    python recipes/speak.py sentences.txt corpus --clips 2000 --jobs 2

A file's name says what was said, by whom and how, so a run that was broken off goes on where it
stopped, and a larger `--clips` later keeps what exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile
import soxr
from voices import check_voices, synthesise

SAMPLING_RATE = 16_000  # Hz, what Whisper hears
MIN_WORDS, MAX_WORDS = 3, 15
DEFAULT_VOICES = (
    "flite:slt",
    "flite:rms",
    "flite:kal16",
    "espeak-ng:en-us",
    "espeak-ng:en-us+f3",
    "espeak-ng:en-gb-x-rp+f4",
    "espeak-ng:en-gb+m3",
)
SPELLED_OUT = {"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor", "Gen": "General", "Maj": "Major"}
# what these stand for depends on the sentence, so that voice and transcript might differ
AMBIGUOUS = frozenset(
    {"st", "jr", "sr", "vs", "etc", "inc", "co", "col", "sgt", "lt", "capt", "gov"}
)


@dataclass(frozen=True)
class Clip:
    """One clause and the way it is to be spoken.

    Attributes:
        spoken: The clause as the synthesiser reads it (case kept: acronyms are spelled).
        text: The transcript: lower case, words and apostrophes only.
        voice: `engine:name`; see `voices.py`.
        rate: Speed relative to the voice's own (1.0: unchanged).
        pitch: Pitch relative to the voice's own.
    """

    spoken: str
    text: str
    voice: str
    rate: float
    pitch: float

    @property
    def id(self) -> str:
        """A name that is the same exactly when what is said, by whom and how is the same."""
        name = Path(self.voice).name  # a Piper voice sounds the same wherever its file lies
        what = f"{self.spoken}|{name}|{self.rate}|{self.pitch}".encode()
        voice = re.sub(r"[^A-Za-z0-9]+", "-", name)
        return f"{voice}-{hashlib.sha256(what).hexdigest()[:12]}"

    @property
    def path(self) -> Path:
        """Where it lies, below the corpus's folder (256 subfolders keep listings short)."""
        return Path("clips", self.id[-2:], f"{self.id}.flac")


def split_clauses(sentence: str, max_words: int = MAX_WORDS) -> list[tuple[str, str]]:
    """Cut a sentence into `(spoken, transcript)` clauses of 3 to 15 words.

    Punctuation decides first; what is still too long is cut into even parts; what is too short
    joins its neighbour. A part with a digit, a foreign letter or an ambiguous abbreviation is
    left out. With `max_words` above 15, neighbours are then spoken in one go, with a comma between
    them, as long as they fit.
    """
    sentence = sentence.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    for short, full in SPELLED_OUT.items():
        sentence = re.sub(rf"\b{short}\.?(?=\s)", full, sentence)
    sentence = re.sub(r"\b([A-Za-z])\.", r"\1 ", sentence)  # initials: "J. F." -> "J F"
    sentence = re.sub(r"(?<=\w)-(?=\w)", " ", sentence)
    segments: list[list[str]] = []
    for part in re.split(r'[,;:.!?()\[\]"\u2014\u2013]+|-{1,}', sentence):
        words = [word for word in (raw.strip("'") for raw in part.split()) if word]
        odd = any(not re.fullmatch(r"[A-Za-z]+(?:'[A-Za-z]+)*", word) for word in words)
        if odd or any(word.lower() in AMBIGUOUS for word in words):
            segments.append([])  # a gap: its neighbours must not be joined over it
        else:
            segments.extend(_even_parts(words))
    clauses: list[list[str]] = []
    open_clause: list[str] = []
    for words in [*segments, []]:
        too_short = min(len(open_clause), len(words)) < MIN_WORDS
        if words and open_clause and too_short and len(open_clause) + len(words) <= MAX_WORDS:
            open_clause = open_clause + words
            continue
        clauses.append(open_clause)
        open_clause = words
    spoken = [" ".join(w) if MIN_WORDS <= len(w) <= MAX_WORDS else "" for w in clauses]
    return [(one, one.lower().replace(",", "")) for one in _joined(spoken, max_words) if one]


def _joined(clauses: Sequence[str], max_words: int) -> Iterator[str]:
    """Put what fits into `max_words` together, but nothing over a gap (an empty clause)."""
    open_clause = ""
    for clause in clauses:
        both = f"{open_clause}, {clause}"
        if max_words > MAX_WORDS and open_clause and clause and len(both.split()) <= max_words:
            open_clause = both
            continue
        yield open_clause
        open_clause = clause
    yield open_clause


def _even_parts(words: list[str]) -> Iterator[list[str]]:
    parts = -(-len(words) // MAX_WORDS)
    for index in range(parts):
        yield words[len(words) * index // parts : len(words) * (index + 1) // parts]


def plan_corpus(
    sentences: Sequence[str],
    *,
    clips: int,
    held_out_sentences: int,
    test_clips: int,
    voice_clips: int,
    voices: Sequence[str],
    held_out_voice: str,
    seed: int,
    more: Sequence[str] = (),
    max_words: int = MAX_WORDS,
) -> dict[str, list[Clip]]:
    """Decide every clip of the three splits; the same arguments give the same plan.

    Returns:
        Clips by split. No clause of a held-out sentence is in `train`, no clause occurs twice
        in a split, and both test splits draw on the same sentences. `more` sentences are only ever
        trained on. `max_words` is of `train` alone.
    """
    unique = list(dict.fromkeys(" ".join(line.split()) for line in sentences if line.strip()))
    random.Random(seed).shuffle(unique)
    held_out = _unique_clauses(unique[:held_out_sentences], taken=set())
    taken = {text for _, text in held_out}
    sentences = [*unique[held_out_sentences:], *more]
    if max_words > MAX_WORDS:  # what is held out may be part of something longer
        sentences = [s for s in sentences if taken.isdisjoint(t for _, t in split_clauses(s))]
    train = _unique_clauses(sentences, taken=taken, max_words=max_words)
    random.Random(seed + 1).shuffle(held_out)
    random.Random(seed + 2).shuffle(train)
    wanted = {"train": clips, "test-sentences": test_clips, "test-voice": voice_clips}
    for split, count in wanted.items():
        have = len(train if split == "train" else held_out)
        if count > have:
            raise click.UsageError(
                f"{split}: {count} clips wanted, but the text gives {have} distinct clauses; ask "
                "for fewer, give more sentences or change --held-out-sentences"
            )
    return {
        "train": _cast(train[:clips], voices, seed),
        "test-sentences": _cast(held_out[:test_clips], voices, seed),
        "test-voice": _cast(held_out[:voice_clips], [held_out_voice], seed),
    }


def _unique_clauses(
    sentences: Sequence[str], *, taken: set[str], max_words: int = MAX_WORDS
) -> list[tuple[str, str]]:
    clauses: dict[str, str] = {}
    for sentence in sentences:
        for spoken, text in split_clauses(sentence, max_words):
            if text not in taken:
                clauses.setdefault(text, spoken)
    return [(spoken, text) for text, spoken in clauses.items()]


def _cast(clauses: Sequence[tuple[str, str]], voices: Sequence[str], seed: int) -> list[Clip]:
    clips = []
    for index, (spoken, text) in enumerate(clauses):
        voice = voices[index % len(voices)]
        variety = random.Random(f"{seed}|{voice}|{text}")
        rate, pitch = round(variety.uniform(0.9, 1.12), 3), round(variety.uniform(0.9, 1.1), 3)
        clips.append(Clip(spoken, text, voice, rate, pitch))
    return clips


def speak(clip: Clip, root: Path) -> float:
    """Write one clip as 16 kHz mono FLAC unless it exists.

    Returns:
        Its duration in seconds.
    """
    target = root / clip.path
    if target.exists():
        return float(soundfile.info(target).duration)
    with tempfile.TemporaryDirectory() as scratch:
        wav = Path(scratch, "clip.wav")
        synthesise(clip.spoken, clip.voice, wav, rate=clip.rate, pitch=clip.pitch)
        samples, rate = soundfile.read(wav, dtype="float32", always_2d=True)
    mono = soxr.resample(samples.mean(axis=1), rate, SAMPLING_RATE)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    soundfile.write(
        partial, np.clip(mono, -1.0, 1.0), SAMPLING_RATE, format="FLAC", subtype="PCM_16"
    )
    os.replace(partial, target)
    return len(mono) / SAMPLING_RATE


def write_split(name: str, clips: Sequence[Clip], root: Path, *, jobs: int) -> None:
    """Speak all clips of a split, then write its manifest."""
    rows: list[dict[str, Any]] = []
    hours = 0.0
    start = last = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:  # the work is in the synthesiser's processes
        for clip, duration in zip(clips, pool.map(lambda c: speak(c, root), clips), strict=True):
            hours += duration / 3600
            rows.append(manifest_row(clip, duration))
            if time.monotonic() - last > (1 if sys.stderr.isatty() else 60):
                last = time.monotonic()
                speed = len(rows) / (last - start)
                click.echo(f"{name}: {len(rows)}/{len(clips)} clips, {speed:.1f}/s", err=True)
    write_manifest(root / f"{name}.jsonl", rows)
    click.echo(f"{root / f'{name}.jsonl'}: {len(rows)} clips, {hours:.2f} h")


def manifest_row(clip: Clip, duration: float) -> dict[str, Any]:
    """What a manifest says of a spoken clip, which lasts so many seconds."""
    return {
        "audio": clip.path.as_posix(),
        "text": clip.text,
        "id": clip.id,
        "duration": round(duration, 3),
        "voice": clip.voice,
    }


def write_manifest(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All of it, or, when interrupted, what was there before."""
    partial = path.with_name(f".{path.name}.partial")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


@click.command(context_settings={"show_default": True})
@click.argument(
    "texts",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--clips", default=2000, type=click.IntRange(1), help="Training clips.")
@click.option("--test-clips", default=300, type=click.IntRange(0), help="Unseen sentences.")
@click.option("--voice-clips", default=150, type=click.IntRange(0), help="Unseen voice.")
@click.option("--held-out-sentences", default=400, type=click.IntRange(0))
@click.option(
    "--voices",
    default=",".join(DEFAULT_VOICES),
    help="Comma-separated, taken in turn; a voice named twice speaks twice as often.",
)
@click.option("--held-out-voice", default="flite:awb")
@click.option(
    "--max-words",
    default=MAX_WORDS,
    type=click.IntRange(MAX_WORDS),
    help="Of a training clip: above 15, neighbouring clauses are joined while they fit.",
)
@click.option("--seed", default=0)
@click.option("--jobs", default=1, type=click.IntRange(1), help="Synthesisers at a time.")
def main(
    texts: tuple[Path, ...], out: Path, voices: str, held_out_voice: str, jobs: int, **plan: int
) -> None:
    """Speak the sentences of all TEXTS (one a line) into the folder OUT.

    What is held out is taken from the first of them, so that the test sets stay the same whatever
    text is added to the training.
    """
    cast = [voice.strip() for voice in voices.split(",") if voice.strip()]
    if held_out_voice in cast:
        raise click.UsageError(f"--held-out-voice {held_out_voice!r} is also one of --voices")
    check_voices([*cast, held_out_voice])
    first, *others = (text.read_text(encoding="utf-8").splitlines() for text in texts)
    more = [line for lines in others for line in lines]
    splits = plan_corpus(
        first,
        more=more,
        voices=cast,
        held_out_voice=held_out_voice,
        **plan,
    )
    for name in ("test-sentences", "test-voice", "train"):
        if splits[name]:
            write_split(name, splits[name], out, jobs=jobs)


if __name__ == "__main__":
    main()
