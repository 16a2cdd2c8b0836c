"""How figures of docs/results.md are written."""

from __future__ import annotations

from collections.abc import Sequence

from blspkd.evaluation.bootstrap import Gap

METRICS = {
    "input_kl": "input KL",
    "input_top1": "top-1 %",
    "response_kl": "response KL",
    "token_accuracy": "tokens %",
    "length_exact": "exact length %",
    "length_within_one": "within one %",
    "transcript_wer": "WER %",
    "self_rouge_l": "Self-ROUGE-L",
    "self_bleu": "Self-BLEU",
}
PERCENT = (
    "input_top1",
    "token_accuracy",
    "length_exact",
    "length_within_one",
    "transcript_wer",
    "wer",
    "accuracy",
)
NOT_RUN = "not run"


def mean(metric: str, values: Sequence[float]) -> str:
    """A metric over seeds: its mean, and half its range."""
    if not values:
        return ""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    spread = f" ± {show(metric, half)}" if len(values) > 1 else ""
    return show(metric, mean) + spread


def show(metric: str, value: float | None) -> str:
    """A metric in its unit; nothing for None."""
    if value is None:
        return ""
    if metric in PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.1f}" if metric in ("self_bleu", "bleu") else f"{value:.3f}"


def with_interval(metric: str, gap: Gap) -> str:
    """A difference in its metric's unit, with its interval."""
    scale, digits = (100, 1) if metric in PERCENT else (1, 1 if metric == "self_bleu" else 3)
    one, low, high = (f"{scale * v:+.{digits}f}" for v in (gap.difference, gap.low, gap.high))
    return f"{one} [{low}, {high}]"
