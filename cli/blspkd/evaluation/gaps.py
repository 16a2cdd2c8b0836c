"""How far one row of answers is from another, clip by clip and with intervals.

Shapes: C clips, K statistics of a clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from blspkd.data.manifest import Record

from . import metrics
from .bootstrap import Gap, Score, Statistics, bleu_score, bleu_statistics, paired_gap, ratio
from .tasks import (
    ROWS,
    Row,
    RowName,
    Task,
    accepted_answers,
    references,
    right_answers,
)

SCORES: dict[str, Score] = {"bleu": bleu_score, "self_bleu": bleu_score}
"""How a metric's statistics become its score; the others are ratios."""
AGAINST_CASCADE = (
    "wer",
    "bleu",
    "accuracy",
    "transcript_wer",
    "self_bleu",
    "self_rouge_l",
    "same_answer",
)


def score_of(metric: str) -> Score:
    """How a metric's statistics, summed over clips, become its score."""
    return SCORES.get(metric, ratio)


def row_statistics(
    task: Task, records: Sequence[Record], row: Row, own_answers: Sequence[str]
) -> dict[str, Statistics]:
    """What each clip adds to each metric of a row that is a function of sums over clips.

    Args:
        task: Decides what the answers are compared with.
        records: The clips.
        row: Answers to them, and what was recognised.
        own_answers: The language model's answers to the true transcripts.

    Returns:
        By metric (C, K): word errors and words for `wer` (task "asr") and `transcript_wer`;
        `bleu_statistics` for `bleu` (task "st") and `self_bleu`; a score and 1 for `accuracy`
        (task "qa"), `self_rouge_l` and `same_answer`.
    """

    def rows(pairs: Sequence[tuple[float, float]]) -> Statistics:
        return np.asarray(pairs, dtype=np.float64).reshape(-1, 2)

    def wer(texts: Sequence[str]) -> Statistics:
        counts = metrics.each_word_errors(records, texts)
        return rows([(one.errors, one.words) for one in counts])

    found: dict[str, Statistics] = {}
    expected = references(records, task)
    if task == "asr":
        found["wer"] = wer(row.answers)
    elif expected is not None:
        found["bleu"] = bleu_statistics(expected, row.answers)
    accepted = accepted_answers(records, task)
    if accepted is not None:
        found["accuracy"] = rows([(right, 1.0) for right in right_answers(accepted, row.answers)])
    if row.transcripts is not None:
        found["transcript_wer"] = wer(row.transcripts)
    pairs = list(zip(own_answers, row.answers, strict=True))
    found["self_bleu"] = bleu_statistics(own_answers, row.answers)
    found["self_rouge_l"] = rows([(metrics.rouge_l(own, other), 1.0) for own, other in pairs])
    found["same_answer"] = rows([(own.strip() == other.strip(), 1.0) for own, other in pairs])
    return found


def score_gaps(
    task: Task, records: Sequence[Record], rows: Mapping[RowName, Row], *, seed: int
) -> dict[str, dict[str, Gap]]:
    """How far speech is from text and from the cascade, by metric, with 95 % intervals.

    Every metric that is a function of sums over clips, see `row_statistics`; against text only
    those of the task, since the others are what they are by definition.
    """
    own_answers = rows["text"].answers
    statistics = {
        name: row_statistics(task, records, row, own_answers) for name, row in rows.items()
    }
    wanted = {"text": ("wer", "bleu", "accuracy"), "cascade": AGAINST_CASCADE}
    speech = statistics["speech"]
    gaps: dict[str, dict[str, Gap]] = {}
    for name in ROWS[:2]:
        theirs = statistics.get(name, {})
        gaps[name] = {
            metric: paired_gap(
                speech[metric][None], theirs[metric][None], score_of(metric), seed=seed
            )
            for metric in wanted[name]
            if metric in speech and metric in theirs
        }
    return {name: gap for name, gap in gaps.items() if gap}
