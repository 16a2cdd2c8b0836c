"""What an evaluation must reach: `--fail-under METRIC=VALUE`."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .meters import Meters
from .tasks import LOWER_IS_BETTER, OWN_METRICS, ROWS, SELF_METRICS, Task

if TYPE_CHECKING:
    from .evaluate import Evaluation

EXIT_BELOW = 3
"""Exit code of a command whose result fell short."""
METERS = tuple(
    field.name for field in fields(Meters) if field.name not in ("clips", "length_error")
)
"""The meters that have a better and a worse."""


@dataclass(frozen=True)
class Threshold:
    """A bound on one figure.

    Attributes:
        row: "text", "cascade" or "speech"; None for a meter.
        metric: Its name in metrics.json.
        value: The worst that passes; the most for word error rates and KL, else the least.
    """

    row: str | None
    metric: str
    value: float

    def passed_by(self, value: float) -> bool:
        """Whether a value is good enough; NaN never is."""
        if self.metric in LOWER_IS_BETTER:
            return value <= self.value
        return value >= self.value

    def __str__(self) -> str:
        name = self.metric if self.row is None else f"{self.row}/{self.metric}"
        sign = "<=" if self.metric in LOWER_IS_BETTER else ">="
        return f"{name} {sign} {self.value:g}"


def parse_threshold(pair: str, task: Task) -> Threshold:
    """Read METRIC=VALUE, where METRIC is a meter, a metric of the row "speech", or ROW/METRIC.

    Raises:
        ValueError: No such metric in this task, or no such number.
    """
    name, equals, text = pair.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not equals or math.isnan(value):
        raise ValueError(f"--fail-under: expected METRIC=NUMBER, got {pair!r}")
    row_metrics = (*OWN_METRICS[task], "transcript_wer", *SELF_METRICS)
    row, slash, metric = name.rpartition("/")
    if slash and row in ROWS and metric in row_metrics:
        return Threshold(row, metric, value)
    if name in row_metrics:
        return Threshold("speech", name, value)
    if name in METERS:
        return Threshold(None, name, value)
    known = (*row_metrics, *METERS)
    near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise ValueError(f"--fail-under: task {task} has no metric {name!r}; {hint}")


def shortfalls(thresholds: list[Threshold], found: Evaluation) -> list[str]:
    """One line for each threshold that was missed, or could not be measured."""
    lines = []
    for threshold in thresholds:
        if threshold.row is None:
            value = found.meters.get(threshold.metric)
        else:
            value = {str(row): score for row, score in found.scores.items()}.get(
                threshold.row, {}
            ).get(threshold.metric)
        if value is None:
            lines.append(f"missed: {threshold}: it was not measured")
        elif not threshold.passed_by(value):
            lines.append(f"missed: {threshold}, got {value:.4g}")
    return lines
