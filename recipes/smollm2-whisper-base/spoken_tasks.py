"""Speak questions.tsv and translations.tsv: manifests for `blspkd eval --task qa` and `--task st`.

    python recipes/smollm2-whisper-base/spoken_tasks.py real
    blspkd eval RUN real/questions.jsonl --task qa
    blspkd eval RUN real/translations.jsonl --task st

Each line is a sentence as a recogniser writes it, a tab, and what the answer is compared with: the
texts, by `|`, one of which a right answer to a question has in it; or the sentence in German. The
clips are spoken as `speak.py` speaks, and lie beside its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from speak import (  # noqa: E402  # it lies in the folder above
    DEFAULT_VOICES,
    Clip,
    manifest_row,
    speak,
    write_manifest,
)
from voices import check_voices  # noqa: E402  # likewise


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Sentences, and what stands beside them.

    Raises:
        ValueError: A line has nothing there.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        sentence, _, beside = (part.strip() for part in line.partition("\t"))
        if not sentence or not beside.strip("| "):
            raise ValueError(f"{path}:{number}: expected SENTENCE<tab>TEXT, got {line!r}")
        pairs.append((sentence, beside))
    return pairs


def question_columns(answers: str) -> dict[str, Any]:
    """The user turn is the question alone."""
    accepted = [answer.strip() for answer in answers.split("|") if answer.strip()]
    return {"answers": accepted, "messages": [{"role": "user", "content": "{speech}"}]}


def translation_columns(translation: str) -> dict[str, Any]:
    """The user turn is that of the task."""
    return {"translation": translation, "translation_lang": "de"}


TASKS = {"questions": question_columns, "translations": translation_columns}


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--texts",
    default=HERE,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the two tsv files.",
)
@click.option("--voices", default=",".join(DEFAULT_VOICES), help="Comma-separated, taken in turn.")
def main(out: Path, texts: Path, voices: str) -> None:
    """Speak both into the folder OUT, and write OUT/questions.jsonl and OUT/translations.jsonl."""
    cast = [voice.strip() for voice in voices.split(",") if voice.strip()]
    check_voices(cast)
    for name, columns in TASKS.items():
        rows = [
            {**_spoken(sentence, index, cast, out), **columns(beside)}
            for index, (sentence, beside) in enumerate(read_pairs(texts / f"{name}.tsv"))
        ]
        write_manifest(out / f"{name}.jsonl", rows)
        click.echo(f"{out / name}.jsonl: {len(rows)} clips")


def _spoken(sentence: str, index: int, cast: Sequence[str], out: Path) -> dict[str, Any]:
    clip = Clip(sentence, sentence, cast[index % len(cast)], rate=1.0, pitch=1.0)
    return manifest_row(clip, speak(clip, out))


if __name__ == "__main__":
    main()
