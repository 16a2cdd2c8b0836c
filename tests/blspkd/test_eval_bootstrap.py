"""Intervals of differences, against the binomial's and against sacrebleu's own bootstrap."""

import numpy as np
import pytest
from sacrebleu import BLEU
from sacrebleu.significance import PairedTest

from blspkd.evaluation import metrics
from blspkd.evaluation.bootstrap import (
    bleu_gap,
    bleu_score,
    bleu_statistics,
    paired_gap,
    ratio,
    ratio_gap,
)


def test_gap_of_ratios():
    first, second = [(1, 2), (1, 2)], [(0, 2), (0, 2)]
    gap = ratio_gap(first, second)
    # every resample gives the same: no uncertainty
    assert (gap.difference, gap.low, gap.high) == (0.5, 0.5, 0.5)
    noisy = ratio_gap([(i % 2, 1) for i in range(40)], [(0, 1)] * 40, seed=3)
    assert noisy.difference == pytest.approx(0.5)
    # binomial: 0.5 +- 1.96 * sqrt(0.25 / 40) = 0.5 +- 0.155
    assert noisy.low == pytest.approx(0.345, abs=0.05)
    assert noisy.high == pytest.approx(0.655, abs=0.05)


def test_runs_are_scored_one_by_one_and_averaged_over_the_same_clips():
    random = np.random.default_rng(0)
    errors = random.integers(0, 4, (3, 30)).astype(float)
    words = np.broadcast_to(random.integers(4, 9, 30).astype(float), (3, 30))
    first = np.stack([errors, words], axis=-1)
    gap = paired_gap(first, first[:1])
    by_hand = (errors.sum(1) / words.sum(1)).mean() - errors[0].sum() / words[0].sum()
    assert gap.difference == pytest.approx(by_hand)
    # a row less itself has no uncertainty only if both see the same clips in every resample
    alike = paired_gap(first, first[[2, 0, 1]])
    assert (alike.low, alike.high) == pytest.approx((0, 0), abs=1e-12)
    # and the mean of noisy runs is surer than one of them
    narrow, wide = gap.high - gap.low, paired_gap(first[1:2], first[:1])
    assert narrow < wide.high - wide.low


REFERENCES = [f"the {n} red boats came home at night" for n in "abcdefghijklmnop"]
FIRST = [text.replace("red", "old") for text in REFERENCES[:8]] + REFERENCES[8:]
SECOND = [text.replace("came home", "went") for text in REFERENCES]


def test_bleu_of_summed_counts_is_the_corpus_score():
    counts = bleu_statistics(REFERENCES, SECOND)
    assert counts.shape == (16, 10)
    assert bleu_score(counts.sum(0)) == pytest.approx(metrics.bleu(REFERENCES, SECOND))
    short = ["yes", "no one"]
    assert bleu_score(bleu_statistics(short, short).sum(0)) == pytest.approx(100)


def test_the_interval_of_a_bleu_difference_agrees_with_sacrebleu_s_paired_bootstrap():
    gap = bleu_gap(REFERENCES, FIRST, SECOND)
    difference = metrics.bleu(REFERENCES, FIRST) - metrics.bleu(REFERENCES, SECOND)
    assert gap.difference == pytest.approx(difference)
    assert gap.low < gap.difference < gap.high
    # the second row's score is nearly the same in every resample: what is left is the first's
    _, scores = PairedTest(
        [("second", SECOND), ("first", FIRST)],
        {"BLEU": BLEU(effective_order=True, references=[REFERENCES])},
        references=None,
        test_type="bs",
        n_samples=1000,
    )()
    baseline, system = scores["BLEU"]
    assert baseline.ci < 1
    assert (gap.high - gap.low) / 2 == pytest.approx(system.ci, rel=0.15)
    assert (system.p_value < 0.05) == (gap.low > 0)


def test_rows_of_different_clips_are_refused():
    with pytest.raises(ValueError, match="same clips"):
        paired_gap(np.ones((1, 3, 2)), np.ones((1, 4, 2)))
    with pytest.raises(ValueError, match="at least one clip"):
        paired_gap(np.ones((1, 0, 2)), np.ones((1, 0, 2)), ratio)
