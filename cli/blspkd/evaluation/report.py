"""What an evaluation leaves behind: a table, three files, and pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from blspkd import __version__
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.model.processing import BlspKDProcessor

from .evaluate import Evaluation
from .nothing import PRETENDED_WORDS
from .plots import align, plot_alignment, plot_curves, read_curves
from .robustness import Robustness, condition_cells, nothing_cells
from .robustness_plot import plot_conditions
from .tables import lined_up, markdown, one_line
from .tasks import OWN_METRICS, ROWS, SELF_METRICS

TITLES = {
    "wer": "WER %",
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "accuracy %",
    "transcript_wer": "transcript WER %",
    "self_bleu": "Self-BLEU",
    "self_rouge_l": "Self-ROUGE-L",
    "same_answer": "same answer %",
}
PERCENT = ("wer", "accuracy", "transcript_wer", "same_answer")


def figures(robustness: Robustness) -> dict[str, Any]:
    """Everything measured, as metrics.json holds it; rates are 0..1, BLEU and chrF 0..100."""
    found = _clean_figures(robustness.clean)
    if robustness.conditions:
        found["conditions"] = {
            name: _figures_under(evaluation) for name, evaluation in robustness.conditions.items()
        }
    if robustness.nothing is not None:
        found["no_speech"] = robustness.nothing.figures()
    return found


def _figures_under(evaluation: Evaluation) -> dict[str, Any]:
    """What a condition can change."""
    return {
        "rows": evaluation.scores,
        "gaps": {
            f"speech - {name}": {metric: asdict(gap) for metric, gap in gaps.items()}
            for name, gaps in evaluation.gaps.items()
        },
        "meters": evaluation.meters,
    }


def _clean_figures(evaluation: Evaluation) -> dict[str, Any]:
    durations = [record.duration for record in evaluation.records]
    return {
        "task": evaluation.config.task,
        "clips": len(evaluation.records),
        "hours": sum(d for d in durations if d is not None) / 3600 if all(durations) else None,
        **_figures_under(evaluation),
        "notes": evaluation.notes,
        "seconds": evaluation.seconds,
        "config": asdict(evaluation.config),
        "versions": {
            "blspkd": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def table(evaluation: Evaluation) -> str:
    """The rows and their metrics as lines of text."""
    names = _metrics_of(evaluation)
    header = ["", *(TITLES[name] for name in names)]
    body = [
        [row, *(show_score(name, evaluation.scores[row].get(name)) for name in names)]
        for row in ROWS
        if row in evaluation.scores
    ]
    return lined_up([header, *body])


def meter_lines(meters: Mapping[str, float]) -> str:
    """The meters as lines of text."""
    width = max((len(name) for name in meters), default=0)
    return "\n".join(f"{name.ljust(width)}  {value:.4g}" for name, value in meters.items())


def write_report(
    folder: Path,
    robustness: Robustness,
    *,
    model: BlspKDForConditionalGeneration,
    processor: BlspKDProcessor,
    model_folder: Path,
    manifest: Path,
    command: str,
) -> None:
    """Write predictions.jsonl, metrics.json, report.md and its pictures.

    Args:
        folder: Where; made if need be.
        robustness: What was found.
        model: The speech LLM, to draw alignments.
        processor: The model's.
        model_folder: Where it was loaded from, and where its training log may lie.
        manifest: What it was evaluated on.
        command: What was typed.
    """
    evaluation = robustness.clean
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in predictions(evaluation)]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = {"model": str(model_folder), "manifest": str(manifest), **figures(robustness)}
    (folder / "metrics.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    curves = read_curves(model_folder)
    if curves:
        plot_curves(curves, folder / "curves.png")
    pictures = []
    for number, record in enumerate(evaluation.records[: evaluation.config.plots]):
        alignment = align(model, processor, record)
        if alignment is None:
            break
        plot_alignment(alignment, folder / f"alignment-{number}.png")
        pictures.append((f"alignment-{number}.png", record.id))
    if robustness.conditions:
        plot_conditions(robustness, folder / "conditions.png")
    (folder / "report.md").write_text(
        _markdown(robustness, found, bool(curves), pictures, command), encoding="utf-8"
    )


def predictions(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One object a clip: what was said, what should be answered, what each row made of it."""
    out = []
    for index, record in enumerate(evaluation.records):
        line: dict[str, Any] = {"id": record.id, "audio": str(record.audio)}
        line["transcript"] = record.text
        if evaluation.references is not None:
            line["reference"] = evaluation.references[index]
        for name, row in evaluation.rows.items():
            line[name] = row.answers[index]
            if row.transcripts is not None and name != "text":
                line[f"{name}_transcript"] = row.transcripts[index]
        out.append(line)
    return out


def _metrics_of(evaluation: Evaluation) -> list[str]:
    """The task's metrics, if its clips have what they need, and those of every task."""
    own = OWN_METRICS[evaluation.config.task]
    measured = [name for name in own if any(name in row for row in evaluation.scores.values())]
    return [*measured, "transcript_wer", *SELF_METRICS]


def show_score(metric: str, value: float | None) -> str:
    """A metric as its title in `TITLES` has it; a dash for None."""
    if value is None:
        return "-"
    if metric in PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if metric == "self_rouge_l" else f"{value:.1f}"


def _markdown(
    robustness: Robustness,
    found: Mapping[str, Any],
    has_curves: bool,
    pictures: Sequence[tuple[str, str]],
    command: str,
) -> str:
    evaluation = robustness.clean
    names = _metrics_of(evaluation)
    parts = [
        f"# Evaluation: {evaluation.config.task}",
        f"Model `{found['model']}` on `{found['manifest']}`, {found['clips']} clips.",
        f"```\n{command}\n```",
        _table(
            ["row", *(TITLES[name] for name in names)],
            [
                [row, *(show_score(name, evaluation.scores[row].get(name)) for name in names)]
                for row in ROWS
                if row in evaluation.scores
            ],
        ),
        "*text*: the language model reads the true transcript. *cascade*: it reads what Whisper "
        "heard, written as the true transcripts are. *speech*: it reads the adapter's output; its "
        "transcript is the token nearest to each. Self-BLEU, Self-ROUGE-L and *same answer* "
        "compare with the answer to text.",
    ]
    if evaluation.gaps:
        rows = [
            [f"speech - {name}", metric, f"{g.difference:+.3f}", f"[{g.low:+.3f}, {g.high:+.3f}]"]
            for name, gaps in evaluation.gaps.items()
            for metric, g in gaps.items()
        ]
        parts += ["## Gaps", _table(["", "metric", "difference", "95 % (paired bootstrap)"], rows)]
    meters = [[name, f"{value:.4g}"] for name, value in evaluation.meters.items()]
    parts += ["## Meters", _table(["meter", "value"], meters)]
    if robustness.conditions:
        parts += ["## Conditions", markdown(condition_cells(robustness))]
        parts.append("![conditions](conditions.png)")
    if robustness.nothing is not None:
        parts += ["## Clips without speech", markdown(nothing_cells(robustness.nothing))]
        parts.append(
            f"*pretends*: what it believes to have been said has at least {PRETENDED_WORDS} words. "
            "*answer differs*: from the language model's answer to an empty transcript."
        )
    if evaluation.notes:
        parts.append("\n".join(f"- {note}" for note in evaluation.notes))
    speeds = [
        [stage, f"{spent:.1f}", f"{found['clips'] / max(spent, 1e-9):.2f}"]
        for stage, spent in evaluation.seconds.items()
    ]
    parts += ["## Speed", _table(["stage", "s", "clips/s"], speeds)]
    if has_curves:
        parts += ["## Learning curves", "![learning curves](curves.png)"]
    if pictures:
        parts.append("## Alignments")
        parts += [f"![{one_line(name)}]({picture})" for picture, name in pictures]
    parts.append("## Answers")
    for line in predictions(evaluation)[: max(3, evaluation.config.plots)]:
        shown = {key: value for key, value in line.items() if key not in ("id", "audio")}
        parts.append(
            _table([one_line(line["id"]), ""], [[k, one_line(v)] for k, v in shown.items()])
        )
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return markdown([header, *body])
