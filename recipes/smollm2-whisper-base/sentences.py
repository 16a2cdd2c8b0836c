"""Example sentences of WordNet, one a line: short everyday English with a wide vocabulary.

WordNet's glosses hold examples in double quotes. Debian's package `wordnet-base` installs them
under `/usr/share/wordnet`; WordNet's licence allows any use that keeps its notice.

    apt-get install wordnet-base
    python recipes/smollm2-whisper-base/sentences.py /usr/share/wordnet wordnet.txt
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

PARTS_OF_SPEECH = ("adj", "adv", "noun", "verb")
MIN_WORDS, MAX_WORDS = 3, 15


def examples(lines: Iterable[str]) -> Iterator[str]:
    """What stands in double quotes in the glosses of a WordNet data file.

    A gloss follows ` | `; one with an odd number of quotes is left out, since what is inside and
    what is outside cannot be told.
    """
    for line in lines:
        gloss = line.partition(" | ")[2]
        parts = gloss.split('"')
        if len(parts) % 2:
            yield from parts[1::2]


def clean(example: str) -> str | None:
    """Words and apostrophes alone, or None where that would lose something that is spoken.

    Marks between words and quotes around them go, a hyphen becomes a space; digits, signs and
    letters with accents leave the example out, and so do fewer than 3 or more than 15 words.
    """
    words = re.sub(r"[,;:.!?()`-]+", " ", example).split()
    words = [word for word in (raw.strip("'") for raw in words) if word]
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return None
    if not all(re.fullmatch(r"[A-Za-z]+(?:'[A-Za-z]+)*", word) for word in words):
        return None
    return " ".join(words)


@click.command()
@click.argument("dictionary", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(dictionary: Path, out: Path) -> None:
    """Write the example sentences of the WordNet in the folder DICTIONARY to OUT, one a line."""
    found: dict[str, str] = {}
    seen = 0
    for part in PARTS_OF_SPEECH:
        path = dictionary / f"data.{part}"
        if not path.is_file():
            raise click.UsageError(f"{dictionary} is no WordNet: it has no file {path.name}")
        for example in examples(path.read_text(encoding="utf-8").splitlines()):
            seen += 1
            sentence = clean(example)
            if sentence is not None:
                found.setdefault(sentence.lower(), sentence)
    out.write_text("".join(f"{sentence}\n" for sentence in found.values()), encoding="utf-8")
    click.echo(f"{out}: {len(found)} sentences of {seen} examples")


if __name__ == "__main__":
    main()
