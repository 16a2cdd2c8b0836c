"""The charts of docs/results.md: SVG files that change only when the figures do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.proof_results import CASCADE, Matrix

Draw = Callable[[Matrix, "Path | None"], bool]
"""Draws into a path, or into nothing for None; whether there is anything to draw."""

SHOWN = {
    "self_rouge_l": "Self-ROUGE-L",
    "response_kl": "response KL (nats)",
    "input_kl": "input KL (nats)",
    "transcript_wer": "WER",
}


def _fonts(path: Path) -> AbstractContextManager[Any]:
    import matplotlib

    # the ids within the file come from a hash with this salt, random by default
    return matplotlib.rc_context({"svg.hashsalt": path.name, "font.size": 8})


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})


def draw_matrix(matrix: Matrix, path: Path | None) -> bool:
    """Each row's figures with their 95 % intervals over clips, a panel for each metric."""
    rows = [*matrix.listed, CASCADE]
    panels: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in SHOWN:
        by_set = {
            name: {
                row: gap for row in rows if (gap := matrix.interval(row, name, metric)) is not None
            }
            for name in matrix.sets
        }
        if any(by_set.values()):
            panels[metric] = by_set
    shown = [row for row in rows if any(row in by for p in panels.values() for by in p.values())]
    if not shown:
        return False
    if path is None:
        return True
    from matplotlib.figure import Figure

    with _fonts(path):
        figure = Figure(figsize=(10, 1.2 + 0.42 * len(shown)), layout="constrained")
        axes_of = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (metric, by_set) in zip(axes_of, panels.items(), strict=True):
            for number, (name, gaps) in enumerate(by_set.items()):
                shift = 0.18 * (number - (len(by_set) - 1) / 2)
                at = [shown.index(row) + shift for row in gaps]
                middle = [gap.difference for gap in gaps.values()]
                arms = [
                    [max(0.0, gap.difference - gap.low) for gap in gaps.values()],
                    [max(0.0, gap.high - gap.difference) for gap in gaps.values()],
                ]
                axes.errorbar(middle, at, xerr=arms, fmt="o", markersize=3, label=name)
            axes.set_title(SHOWN[metric])
            axes.set_xlim(left=0)
            axes.grid(axis="x", linewidth=0.3)
        axes_of[0].set_yticks(range(len(shown)), [matrix.titles.get(r, r) for r in shown])
        axes_of[0].invert_yaxis()
        marks = axes_of[0].get_legend_handles_labels()
        figure.legend(*marks, loc="outside lower center", ncols=len(marks[1]), frameon=False)
        _save(figure, path)
    return True


def draw_robustness(matrix: Matrix, path: Path | None) -> bool:
    """WER and Self-ROUGE-L by condition, for the cascade and each row that was measured so."""
    found = [
        (row, run["robustness"]["conditions"])
        for row, runs in matrix.runs.items()
        for run in runs
        if "robustness" in run
    ]
    if not found:
        return False
    if path is None:
        return True
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, conditions in found for name in conditions))
    lines = [(matrix.titles[row], "speech", conditions) for row, conditions in found]
    lines.append((CASCADE, CASCADE, found[0][1]))
    with _fonts(path):
        figure = Figure(figsize=(9, 3), layout="constrained")
        metrics = {"transcript_wer": "WER", "self_rouge_l": "Self-ROUGE-L"}
        for axes, (metric, title) in zip(figure.subplots(1, 2), metrics.items(), strict=True):
            for label, side, conditions in lines:
                points = [
                    (names.index(name), one["rows"][side][metric])
                    for name, one in conditions.items()
                    if metric in one["rows"].get(side, {})
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.set_ylim(bottom=0)
            axes.set_title(title)
            axes.grid(linewidth=0.3)
        axes.legend()
        _save(figure, path)
    return True


def draw_scaling(matrix: Matrix, path: Path | None) -> bool:
    """Input KL and WER against hours of training speech, a line for each held-out set."""
    runs = [(row, matrix.runs[row][0]) for row in matrix.scaling if row in matrix.runs]
    if len(runs) < 2:
        return False
    if path is None:
        return True
    from matplotlib.figure import Figure

    with _fonts(path):
        figure = Figure(figsize=(9, 3), layout="constrained")
        metrics = ("input_kl", "transcript_wer")
        for axes, metric in zip(figure.subplots(1, 2), metrics, strict=True):
            for name in matrix.sets:
                points = sorted(
                    (run["train_hours"], gap.difference, gap.low, gap.high)
                    for row, run in runs
                    if (gap := matrix.interval(row, name, metric)) is not None
                )
                if points:
                    hours, middle, low, high = zip(*points, strict=True)
                    axes.plot(hours, middle, marker="o", markersize=3, label=name)
                    axes.fill_between(hours, low, high, alpha=0.15)
            axes.set_xscale("log")
            ticks = sorted({run["train_hours"] for _, run in runs})
            axes.set_xticks(ticks, [f"{one:.1f}" for one in ticks])
            axes.minorticks_off()
            axes.set_xlabel("hours of training speech")
            axes.set_ylim(bottom=0)
            axes.set_title(SHOWN[metric])
            axes.grid(linewidth=0.3)
        axes.legend()
        _save(figure, path)
    return True


CHARTS: dict[str, Draw] = {
    "matrix": draw_matrix,
    "robustness": draw_robustness,
    "scaling": draw_scaling,
}
