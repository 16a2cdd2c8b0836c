"""Metrics against numbers worked out by hand, and against direct recursion."""

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blspkd.evaluation import metrics
from blspkd.evaluation.metrics import WordErrors


def test_word_errors_are_counted_by_hand():
    # one substitution (hat -> cat), one deletion (red), one insertion (now)
    assert metrics.word_errors("where is my red hat", "where is my cat now") == WordErrors(2, 5)
    assert metrics.word_errors("a b c", "a b c d") == WordErrors(1, 3)
    assert metrics.word_errors("a b c", "") == WordErrors(3, 3)
    assert metrics.word_errors("...", "oh no") == WordErrors(2, 0)


def test_corpus_wer_weighs_words_not_clips():
    counts = [WordErrors(1, 1), WordErrors(0, 9)]
    assert metrics.word_error_rate(counts) == pytest.approx(0.1)
    assert metrics.word_error_rate([WordErrors(3, 2)]) == pytest.approx(1.5)
    assert metrics.word_error_rate([WordErrors(0, 0)]) == 0.0


def test_normalisation_ignores_how_a_text_is_written():
    assert metrics.word_errors("It's twenty-one, Mr. Brown!", "it is 21 mister brown").errors == 0
    assert metrics.normalize("No... really") == "no really"
    # German keeps its words: "it's" is only English for "it is"
    assert metrics.normalize("It's, Öl!", "de") == "it s öl"


def test_rouge_l_by_hand():
    # longest common subsequence "the cat mat" = 3; P = 3/5, R = 3/6; F = 2*3/(5+6)
    assert metrics.rouge_l("the cat sat on the mat", "the fat cat likes mat") == pytest.approx(
        6 / 11
    )
    assert metrics.rouge_l("Yes!", "yes") == 1.0
    assert metrics.rouge_l("yes", "") == 0.0
    assert metrics.rouge_l("", "") == 1.0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=7),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=7),
)
def test_rouge_l_equals_the_recursive_definition(first, second):
    @lru_cache(None)
    def common(i, j):
        if i == 0 or j == 0:
            return 0
        if first[i - 1] == second[j - 1]:
            return 1 + common(i - 1, j - 1)
        return max(common(i - 1, j), common(i, j - 1))

    length = common(len(first), len(second))
    precision, recall = length / len(second), length / len(first)
    expected = 2 * precision * recall / (precision + recall) if length else 0.0
    assert metrics.rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)


def test_bleu_by_hand():
    # precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty: 100 * (1/5) ** (1/4)
    assert metrics.bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(100 * 0.2**0.25, abs=1e-3)
    assert metrics.bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100)
    assert metrics.bleu(["yes", "no one"], ["yes", "no one"]) == pytest.approx(100)
    # precisions 2/3, 1/2 and, smoothed, half a match in one trigram
    expected = 100 * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)
    assert metrics.bleu(["a b c"], ["a b d"]) == pytest.approx(expected)
    assert metrics.chrf(["abc"], ["abc"]) == pytest.approx(100)


def test_same_rate_forgives_only_outer_space():
    assert metrics.same_rate(["a", "b", "c"], ["a ", "B", "c"]) == pytest.approx(2 / 3)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        metrics.same_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        metrics.bleu([], [])
