"""How alike two lists of texts are: word errors, BLEU, chrF, ROUGE-L, equality.

Pure functions of texts; each returns what it says for the whole list, in the unit it says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jiwer
import numpy as np
import sacrebleu
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from blspkd.data.manifest import Record

ENGLISH = ("en", "eng", "english")


@dataclass(frozen=True)
class WordErrors:
    """Word errors of one text, or of many.

    Attributes:
        errors: Substitutions, deletions and insertions.
        words: Words of the reference.
    """

    errors: int
    words: int


@lru_cache(maxsize=2)
def _normalizer(english: bool) -> Callable[[str], str]:
    # no table of British and American spellings: it comes with a tokenizer, and what is measured
    # must not depend on which one is at hand
    make: Any = EnglishTextNormalizer if english else BasicTextNormalizer  # untyped in transformers
    normalizer: Callable[[str], str] = make({}) if english else make()
    return normalizer


def normalize(text: str, lang: str | None = None) -> str:
    """Write a text as recognisers are compared: lower case, no punctuation, numbers in digits.

    Args:
        text: Any text.
        lang: Its language; None is English. Other languages lose case and punctuation alone.
    """
    english = lang is None or lang.lower().split("-")[0] in ENGLISH
    text = re.sub(r"\.{2,}", " ", text)  # the English normaliser would leave a word "."
    return " ".join(_normalizer(english)(text).split())


def word_errors(reference: str, hypothesis: str, lang: str | None = None) -> WordErrors:
    """Count the word errors of one text, both sides normalised.

    A reference without words counts each word of the hypothesis as an insertion.
    """
    expected, got = normalize(reference, lang), normalize(hypothesis, lang)
    if not expected:
        return WordErrors(errors=len(got.split()), words=0)
    found = jiwer.process_words(expected, got)
    return WordErrors(
        errors=found.substitutions + found.deletions + found.insertions,
        words=len(expected.split()),
    )


def each_word_errors(records: Sequence[Record], texts: Sequence[str]) -> list[WordErrors]:
    """Count the word errors of each text against its record's transcript."""
    _check_lengths(records, texts)
    pairs = zip(records, texts, strict=True)
    return [word_errors(record.text, text, record.lang) for record, text in pairs]


def word_error_rate(counts: Sequence[WordErrors]) -> float:
    """Word error rate of a corpus: all errors over all words of the references; may exceed 1."""
    return sum(one.errors for one in counts) / max(1, sum(one.words for one in counts))


def bleu(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Corpus BLEU in 0..100 (sacrebleu, 13a tokens, one reference).

    A corpus in which no hypothesis has four words is scored up to the order it has, else equal
    texts would score 0; any other corpus gets the usual figure.
    """
    _check_lengths(references, hypotheses)
    scorer = sacrebleu.BLEU(effective_order=True)
    return float(scorer.corpus_score(list(hypotheses), [list(references)]).score)


def chrf(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Corpus chrF2 in 0..100 (sacrebleu)."""
    _check_lengths(references, hypotheses)
    return float(sacrebleu.corpus_chrf(list(hypotheses), [list(references)]).score)


def rouge_l(reference: str, hypothesis: str) -> float:
    """ROUGE-L F1 in 0..1 over lower-case words without punctuation; 1 for two empty texts."""
    expected, got = normalize(reference, "any").split(), normalize(hypothesis, "any").split()
    if not expected or not got:
        return float(expected == got)
    common = [0] * (len(got) + 1)
    for word in expected:
        diagonal = 0
        for column, other in enumerate(got, start=1):
            above = common[column]
            common[column] = diagonal + 1 if word == other else max(above, common[column - 1])
            diagonal = above
    # 2PR / (P + R) with P = common / len(got) and R = common / len(expected)
    return 2 * common[-1] / (len(expected) + len(got))


def mean_rouge_l(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Mean ROUGE-L F1 in 0..1."""
    _check_lengths(references, hypotheses)
    return float(np.mean([rouge_l(r, h) for r, h in zip(references, hypotheses, strict=True)]))


def same_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of exactly equal texts in 0..1, space around them aside."""
    _check_lengths(references, hypotheses)
    pairs = zip(references, hypotheses, strict=True)
    return float(np.mean([r.strip() == h.strip() for r, h in pairs]))


def contains_answer(accepted: Sequence[str], answer: str) -> bool:
    """Whether one of the accepted texts stands in an answer, case and punctuation aside.

    Whole words in a row: "art" does not stand in "the artist".
    """
    words = f" {' '.join(normalize(answer, 'any').split())} "
    return any(f" {' '.join(normalize(one, 'any').split())} " in words for one in accepted)


def _check_lengths(first: Sequence[object], second: Sequence[object]) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"expected as many references as hypotheses, got {len(first)} and {len(second)}"
        )
    if not first:
        raise ValueError("expected at least one text, got none")
