"""A picture of what conditions do to cascade and speech."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .robustness import Robustness

PANELS = {"transcript_wer": "WER of what was recognised", "self_rouge_l": "Self-ROUGE-L"}


def plot_conditions(robustness: Robustness, path: Path) -> None:
    """Draw two metrics by condition, a line for each row.

    Args:
        robustness: Under at least one condition.
        path: Where the PNG goes.
    """
    found = robustness.by_condition()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (metric, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for row in ("cascade", "speech"):
            points = [
                (number, score[metric])
                for number, evaluation in enumerate(found.values())
                for name, score in evaluation.scores.items()
                if name == row and metric in score
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=row)
        axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=120)
