"""Differences between two rows of answers, with intervals from the paired bootstrap over clips.

Shapes: S runs that differ by their seed, C clips, K statistics of a clip, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sacrebleu

Statistics = npt.NDArray[np.float64]
"""(S, C, K): what each clip adds to the sums that a corpus' score is made of."""
Score = Callable[[Statistics], npt.NDArray[np.float64]]
"""Sums (..., K) to scores (...)."""

RESAMPLES = 1000


@dataclass(frozen=True)
class Gap:
    """The difference of a metric between two rows, with its uncertainty.

    Attributes:
        difference: First row less second row.
        low: Lower end of the 95 % interval of the paired bootstrap over clips.
        high: Its upper end.
    """

    difference: float
    low: float
    high: float


def ratio(sums: Statistics) -> npt.NDArray[np.float64]:
    """A part over a whole: sums (..., 2) to (...), such as word errors over words."""
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1e-12))


def bleu_score(sums: Statistics) -> npt.NDArray[np.float64]:
    """Corpus BLEU in 0..100 of summed `bleu_statistics`: (..., 10) to (...)."""
    rows = np.rint(sums).astype(int).reshape(-1, sums.shape[-1]).tolist()
    scores = [
        sacrebleu.BLEU.compute_bleu(
            row[2:6], row[6:], row[0], row[1], smooth_method="exp", effective_order=True
        ).score
        for row in rows
    ]
    return np.asarray(scores, dtype=np.float64).reshape(sums.shape[:-1])


def bleu_statistics(references: Sequence[str], hypotheses: Sequence[str]) -> Statistics:
    """What sacrebleu counts in each pair: (C, 10) lengths, matching n-grams, all n-grams.

    Raises:
        ValueError: The lists differ in length.
    """
    scorer = sacrebleu.BLEU(effective_order=True)
    counted = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        one = scorer.sentence_score(hypothesis, [reference])
        counted.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    return np.asarray(counted, dtype=np.float64).reshape(-1, 10)


def paired_gap(
    first: Statistics,
    second: Statistics,
    score: Score = ratio,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Gap:
    """Compare two rows on the same clips; several runs of a row are scored one by one and averaged.

    Each resample draws clips with replacement, the same ones for both rows and for all runs: the
    interval says how much the clips matter, not how much another seed would.

    Args:
        first: (S, C, K).
        second: (S', C, K), of the same clips in the same order.
        score: What makes a score of K sums.
        seed: Of the resampling.
        resamples: How often the clips are drawn anew.

    Raises:
        ValueError: There are no clips, or not as many in both.
    """
    count = first.shape[1]
    if second.shape[1] != count:
        raise ValueError(f"expected the same clips in both rows, got {count} and {second.shape[1]}")
    if count == 0:
        raise ValueError("expected at least one clip, got none")
    draws: npt.NDArray[Any] = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), resamples
    )

    def scores(rows: Statistics, weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        sums = np.tensordot(weights.astype(np.float64), rows, axes=(1, 1))  # (R, S, K)
        return np.asarray(score(sums).mean(axis=1))

    low, high = np.percentile(scores(first, draws) - scores(second, draws), [2.5, 97.5])
    whole = np.ones((1, count))
    difference = scores(first, whole) - scores(second, whole)
    return Gap(float(difference[0]), float(low), float(high))


def ratio_gap(
    first: Sequence[tuple[float, float]],
    second: Sequence[tuple[float, float]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Gap:
    """Compare two rows by a ratio of sums.

    Args:
        first: For each clip a part and a whole: word errors and words, or a score and 1.
        second: The same clips in the other row.
        seed: Of the resampling.
        resamples: How often the clips are drawn anew.
    """
    one, two = (np.asarray(row, dtype=np.float64).reshape(1, -1, 2) for row in (first, second))
    return paired_gap(one, two, seed=seed, resamples=resamples)


def bleu_gap(
    references: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Gap:
    """Compare two rows by corpus BLEU, from sacrebleu's own counts.

    Args:
        references: One text for each clip.
        first: The first row's.
        second: The second row's.
        seed: Of the resampling.
        resamples: How often the clips are drawn anew.
    """
    one, two = (bleu_statistics(references, row)[None] for row in (first, second))
    return paired_gap(one, two, bleu_score, seed=seed, resamples=resamples)
