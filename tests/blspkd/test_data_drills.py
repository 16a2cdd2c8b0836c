"""recipes/smollm2-whisper-base/drills.py: every token often enough, by words that can be read."""

from collections import Counter

import pytest


@pytest.fixture(scope="module")
def drills(load_recipe):
    return load_recipe("smollm2-whisper-base/drills.py")


def letter_pairs(texts):
    """A toy tokenizer: two letters a token, the blank included."""
    return [[hash(text[i : i + 2]) for i in range(0, len(text), 2)] for text in texts]


WORDS = ["ant", "bee", "cat", "antler", "beetle", "cattle", "otter"]


def test_every_token_is_said_often_enough(drills):
    chosen = drills.drill_words(WORDS, letter_pairs, Counter(), at_least=3, seed=0)
    counts = Counter(p for ids in letter_pairs([" " + w for w in chosen]) for p in ids)
    possible = {p for ids in letter_pairs([" " + w for w in WORDS]) for p in ids}
    assert set(counts) == possible
    assert min(counts.values()) >= 3


def test_what_is_said_already_is_not_drilled(drills):
    (ids,) = letter_pairs([" otter"])
    said = Counter({piece: 5 for word in WORDS for piece in letter_pairs([" " + word])[0]})
    assert drills.drill_words(WORDS, letter_pairs, said, at_least=3, seed=0) == []
    for piece in ids:
        said[piece] = 0
    before = said.copy()
    assert "otter" in drills.drill_words(WORDS, letter_pairs, said, at_least=1, seed=0)
    assert said == before


def test_the_seed_decides_the_order(drills):
    first, again, other = (
        drills.drill_words(WORDS, letter_pairs, Counter(), at_least=3, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_words_that_a_voice_would_spell_are_left_out(drills):
    lines = ["ant\n", "Ann", "a", "ant's", "étude", "UNESCO", "ant", "antidisestablishment"]
    assert drills.clean_words(lines) == ["ant"]


def test_no_line_is_too_short_to_be_a_clause(drills):
    words = list("abcdefghijklmnopqr")
    lines = drills.as_lines(words, 8)
    assert [len(line.split()) for line in lines] == [8, 10]
    assert " ".join(lines).split() == words
    assert drills.as_lines(["x"], 8) == ["x"]
