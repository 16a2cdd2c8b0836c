"""Writes docs/results.md, the two of toy scale beside it, and their charts, from result files.

    python -m benchmarks.proof [PLAN RESULTS_DIR DOCUMENT]

The files are what recipes/smollm2-whisper-base/matrix.py leaves; nothing here is measured, and a
row without a file says "not run". A test checks that the documents are what this writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.proof_cells import METRICS, NOT_RUN, mean, with_interval
from benchmarks.proof_charts import CHARTS
from benchmarks.proof_results import CASCADE, ROOT, Matrix, read_matrix
from benchmarks.proof_sections import (
    chart,
    drift,
    more_clips,
    origins,
    robustness,
    scaling,
    tasks,
)
from blspkd.evaluation.bootstrap import Gap
from blspkd.evaluation.tables import markdown

DOCUMENTS = {
    ROOT / "docs" / "results.md": (
        ROOT / "recipes" / "smollm2-whisper-base" / "matrix.yaml",
        ROOT / "benchmarks" / "results" / "matrix",
    ),
    ROOT / "docs" / "results-tiny.md": (
        ROOT / "recipes" / "tiny" / "matrix.yaml",
        ROOT / "benchmarks" / "results" / "matrix-tiny",
    ),
    ROOT / "docs" / "results-tiny-longer.md": (
        ROOT / "recipes" / "tiny" / "matrix-longer.yaml",
        ROOT / "benchmarks" / "results" / "matrix-tiny-longer",
    ),
}
"""Plan and result files of each document."""
COMPARED = ("self_rouge_l", "self_bleu", "response_kl", "input_kl", "transcript_wer")
DECIDING = "self_rouge_l"
BEST = "recipe"
HOW_TO_READ = """\
*Input KL* and *response KL*: nats from the language model's reading of text to its reading of
speech, after each token of the utterance and over the recorded response. *top-1*: how often both
find the same next token likeliest, after a token of the utterance. *tokens*: speech tokens that lie
nearest to their text token. *exact length*, *within one*: clips whose free-running number of tokens
is right, or one off. *WER*: of the text nearest to the adapter's outputs (of Whisper's transcript
in the cascade). *Self-ROUGE-L*, *Self-BLEU*: the answer to speech against the language model's own
answer to the true transcript. The CNN makes no token per text token, so half of this does not exist
for it. [evaluation.md](evaluation.md) has the definitions. Where a row was trained with several
seeds, its figure is their mean, and ± half their range."""


def document(matrix: Matrix, folder: str) -> str:
    """All of it.

    Args:
        matrix: What there is.
        folder: Of the result files, as the document links to it.
    """
    parts = [
        f"# {matrix.title}",
        matrix.about,
        "Made by `python -m benchmarks.proof` from the result files in "
        f"[`{folder}`]({folder}), which [`matrix.py`](../recipes/smollm2-whisper-base/matrix.py) "
        "leaves; not to be edited by hand.",
        *_statement(matrix),
        "## The matrix",
        HOW_TO_READ,
    ]
    for name, clips in matrix.sets.items():
        parts += [f"### {name}, {clips} clips", markdown(_table(matrix, name))]
    missing = [title for name, title in matrix.titles.items() if name not in matrix.runs]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    parts += [*chart(matrix, "matrix"), "## Differences", *_differences(matrix)]
    for what, heading, section in (
        ("plain_lora", "Plain LoRA in place of PLoRA", drift),
        ("more_clips", "More clips", more_clips),
        ("tasks", "Other tasks", tasks),
        ("robustness", "Robustness", robustness),
        ("scaling", "Scaling", scaling),
    ):
        if what in matrix.planned:
            parts += [f"## {heading}", *section(matrix)]
    parts += ["## Runs", *origins(matrix, folder)]
    return "\n\n".join(parts) + "\n"


def verdict(gaps: Sequence[Gap]) -> str:
    """What intervals of one difference on several sets say of it."""
    above, below = [gap.low > 0 for gap in gaps], [gap.high < 0 for gap in gaps]
    if not gaps:
        return NOT_RUN
    if all(above):
        return "holds"
    if all(below):
        return "the opposite holds"
    if any(above) and not any(below):
        return "holds on some sets, not shown on the others"
    if any(below) and not any(above):
        return "the opposite holds on some sets, nothing is shown on the others"
    return "mixed" if any(above) else "not shown: the intervals include 0"


def _statement(matrix: Matrix) -> list[str]:
    lines = [
        "The paper's claims, by Self-ROUGE-L (how like the answer to speech is to the answer "
        "to text) with 95 % intervals of the paired bootstrap over clips:",
    ]
    items = []
    for claim in matrix.claims:
        first, second = claim["first"], claim["second"]
        found = {
            name: gap
            for name in matrix.sets
            if (gap := matrix.gap(first, second, name, DECIDING)) is not None
        }
        each = "; ".join(f"{name} {with_interval(DECIDING, gap)}" for name, gap in found.items())
        pair = f"{matrix.titles[first]} less {matrix.titles[second]}"
        seeds = min(len(matrix.runs.get(row, [])) for row in (first, second))
        counted = f" Seeds: {seeds}." if found else ""
        items.append(
            f"- **{claim['claim']}**: {verdict(list(found.values()))} ({pair}"
            + (f": {each})." if each else ").")
            + counted
        )
    return [*lines, "\n".join(items)]


def _table(matrix: Matrix, name: str) -> list[list[str]]:
    cells = [["", "seeds", *METRICS.values()]]
    for row in matrix.listed:
        title = matrix.titles[row]
        runs = [run for run in matrix.runs.get(row, []) if name in run["sets"]]
        if runs:
            values = [mean(metric, matrix.seeds(row, name, metric)) for metric in METRICS]
            cells.append([title, str(len(runs)), *values])
        else:
            cells.append([title, "0", NOT_RUN, *[""] * (len(METRICS) - 1)])
    cascade = [mean(metric, matrix.seeds(CASCADE, name, metric)) for metric in METRICS]
    if any(cascade):
        cells.append(["*cascade*", "", *cascade])
    for row in matrix.adapted:
        own = [mean(metric, matrix.seeds(row, name, metric, CASCADE)) for metric in METRICS]
        if any(own):
            cells.append([f"*cascade* of {matrix.titles[row]}", "", *own])
    return cells


def _differences(matrix: Matrix) -> list[str]:
    pairs = [(one["first"], one["second"]) for one in [*matrix.claims, *matrix.differences]]
    if matrix.has_cascade:
        pairs += [(row, CASCADE) for row in matrix.listed]
    titles = {**matrix.titles, CASCADE: "cascade"}
    cells = [["first less second", "set", *(METRICS[metric] for metric in COMPARED)]]
    missing = []
    for first, second in pairs:
        label = f"{titles[first]} less {titles[second]}"
        before = len(cells)
        for name in matrix.sets:
            gaps = [matrix.gap(first, second, name, metric) for metric in COMPARED]
            if any(gap is not None for gap in gaps):
                shown = [
                    "" if gap is None else with_interval(m, gap)
                    for m, gap in zip(COMPARED, gaps, strict=True)
                ]
                cells.append([label, name, *shown])
        if len(cells) == before:
            missing.append(label)
    text = [] if len(cells) == 1 else [markdown(cells)]
    text.append(
        "Brackets: 95 % intervals; clips are drawn with replacement a thousand times, the same for "
        "both rows and all their seeds. They hold for these seeds: another seed may differ by more."
    )
    if missing:
        text.append(f"Not run: {'; '.join(missing)}.")
    return text


def best_row() -> str:
    """What the README shows of the recipe that is meant to be good: a column per held-out set."""
    path = ROOT / "docs" / "results.md"
    plan, results = DOCUMENTS[path]
    matrix = read_matrix(results, path, plan)
    cells = [["", *(f"{name} ({clips})" for name, clips in matrix.sets.items())]]
    for metric, label in METRICS.items():
        row = [label]
        for name in matrix.sets:
            cascade = mean(metric, matrix.seeds(CASCADE, name, metric))
            beside = f" (cascade {cascade})" if cascade else ""
            row.append(mean(metric, matrix.seeds(BEST, name, metric)) + beside)
        cells.append(row)
    return markdown(cells)


def write(results: Path, path: Path, plan: Path) -> None:
    """Write the document and its charts."""
    path.write_text(text(results, path, plan), "utf-8")
    matrix = read_matrix(results, path, plan)
    for name, draw in CHARTS.items():
        chart = path.parent / f"{matrix.charts}-{name}.svg"
        if not draw(matrix, chart):
            chart.unlink(missing_ok=True)


def text(results: Path, path: Path, plan: Path) -> str:
    """What `write` puts into the document."""
    return document(read_matrix(results, path, plan), os.path.relpath(results, path.parent))


if __name__ == "__main__":
    if len(sys.argv) not in (1, 4):
        sys.exit(__doc__)
    if len(sys.argv) == 4:
        plan_path, results_dir, to = map(Path, sys.argv[1:])
        write(results_dir, to, plan_path)
    else:
        for to, (plan_path, results_dir) in DOCUMENTS.items():
            write(results_dir, to, plan_path)
