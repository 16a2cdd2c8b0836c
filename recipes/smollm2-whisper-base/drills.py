"""Lines of words that say every token of a language model at least so often.

A corpus of a few ten thousand sentences says most tokens of a vocabulary never or once, and an
adapter cannot find a token that it has hardly heard. These lines fill the gaps: words of a word
list (Debian's `wamerican` puts one at /usr/share/dict/words), in random order, until every token
that can stand in one of its words has been said often enough, sentences included.

    python drills.py TOKENIZER drills.txt sentences.txt --at-least 4

Speak the lines like sentences, beside them. They carry no meaning: the language model has nothing
to continue, so they serve the token and quantity losses alone.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

Tokenize = Callable[[list[str]], list[list[int]]]


def clean_words(lines: Iterable[str]) -> list[str]:
    """The words of a word list that a voice reads as they are written: 2 to 14 small letters."""
    return sorted({w for w in map(str.strip, lines) if re.fullmatch(r"[a-z]{2,14}", w)})


def drill_words(
    words: Sequence[str], tokenize: Tokenize, said: Counter[int], *, at_least: int, seed: int
) -> list[str]:
    """Words that bring each of their tokens to `at_least` occurrences.

    Args:
        words: To choose from; each may be taken several times, but once in each round.
        tokenize: Ids of each of a list of texts.
        said: How often each token occurs already; it is not changed.
        at_least: How often each is wanted.
        seed: Of the order.
    """
    pieces = dict(zip(words, tokenize([" " + word for word in words]), strict=True))
    count, chosen, order = said.copy(), list[str](), random.Random(seed)
    for _ in range(at_least):
        for word in order.sample(list(words), len(words)):
            if any(count[piece] < at_least for piece in pieces[word]):
                chosen.append(word)
                count.update(pieces[word])
    order.shuffle(chosen)
    return chosen


def as_lines(words: Sequence[str], per_line: int) -> list[str]:
    """So many words a line; a rest too short to be a line joins the last one."""
    lines = [list(words[i : i + per_line]) for i in range(0, len(words), per_line)]
    if len(lines) > 1 and len(lines[-1]) < 3:
        rest = lines.pop()
        lines[-1] += rest
    return [" ".join(line) for line in lines]


@click.command(context_settings={"show_default": True})
@click.argument("tokenizer")
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("texts", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--words",
    default=Path("/usr/share/dict/words"),
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Word list, one word a line.",
)
@click.option("--at-least", default=4, type=click.IntRange(1), help="Occurrences of each token.")
@click.option("--per-line", default=8, type=click.IntRange(3, 12), help="Words a line.")
@click.option("--seed", default=0, help="Of choice and order.")
def main(
    tokenizer: str,
    output: Path,
    texts: tuple[Path, ...],
    words: Path,
    at_least: int,
    per_line: int,
    seed: int,
) -> None:
    """Write drills to OUTPUT: what the sentences of TEXTS say too seldom for TOKENIZER's tokens.

    TOKENIZER is the language model's path or hub id.
    """
    from transformers import AutoTokenizer

    coder = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(lines: list[str]) -> list[list[int]]:
        ids: list[list[int]] = coder(lines, add_special_tokens=False)["input_ids"]
        return ids

    said = Counter[int]()
    for path in texts:
        lines = [" " + line.strip().lower() for line in path.read_text().splitlines()]
        for ids in tokenize(lines):
            said.update(ids)
    choice = clean_words(words.read_text().splitlines())
    chosen = drill_words(choice, tokenize, said, at_least=at_least, seed=seed)
    lines = as_lines(chosen, per_line)
    output.write_text("".join(line + "\n" for line in lines))
    click.echo(f"{len(lines)} lines, {len(chosen)} words, of {len(choice)} words known")


if __name__ == "__main__":
    main()
