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
from .plots import align, plot_alignment, plot_curves, read_curves
from .tasks import OWN_METRICS, ROWS, SELF_METRICS

TITLES = {
    "wer": "WER %",
    "bleu": "BLEU",
    "chrf": "chrF",
    "transcript_wer": "transcript WER %",
    "self_bleu": "Self-BLEU",
    "self_rouge_l": "Self-ROUGE-L",
    "same_answer": "same answer %",
}
PERCENT = ("wer", "transcript_wer", "same_answer")


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Everything measured, as metrics.json holds it; rates are 0..1, BLEU and chrF 0..100."""
    durations = [record.duration for record in evaluation.records]
    return {
        "task": evaluation.config.task,
        "clips": len(evaluation.records),
        "hours": sum(d for d in durations if d is not None) / 3600 if all(durations) else None,
        "rows": evaluation.scores,
        "gaps": {
            f"speech - {name}": {metric: asdict(gap) for metric, gap in gaps.items()}
            for name, gaps in evaluation.gaps.items()
        },
        "meters": evaluation.meters,
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
    names = (*OWN_METRICS[evaluation.config.task], "transcript_wer", *SELF_METRICS)
    header = ["", *(TITLES[name] for name in names)]
    body = [
        [row, *(_show(name, evaluation.scores[row].get(name)) for name in names)]
        for row in ROWS
        if row in evaluation.scores
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = []
    for line in [header, *body]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def meter_lines(meters: Mapping[str, float]) -> str:
    """The meters as lines of text."""
    width = max((len(name) for name in meters), default=0)
    return "\n".join(f"{name.ljust(width)}  {value:.4g}" for name, value in meters.items())


def write_report(
    folder: Path,
    evaluation: Evaluation,
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
        evaluation: What was found.
        model: The speech LLM, to draw alignments.
        processor: The model's.
        model_folder: Where it was loaded from, and where its training log may lie.
        manifest: What it was evaluated on.
        command: What was typed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in predictions(evaluation)]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = {"model": str(model_folder), "manifest": str(manifest), **figures(evaluation)}
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
    (folder / "report.md").write_text(
        _markdown(evaluation, found, bool(curves), pictures, command), encoding="utf-8"
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


def _show(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    if metric in PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if metric == "self_rouge_l" else f"{value:.1f}"


def _markdown(
    evaluation: Evaluation,
    found: Mapping[str, Any],
    has_curves: bool,
    pictures: Sequence[tuple[str, str]],
    command: str,
) -> str:
    names = (*OWN_METRICS[evaluation.config.task], "transcript_wer", *SELF_METRICS)
    parts = [
        f"# Evaluation: {evaluation.config.task}",
        f"Model `{found['model']}` on `{found['manifest']}`, {found['clips']} clips.",
        f"```\n{command}\n```",
        _rows(
            ["row", *(TITLES[name] for name in names)],
            [
                [row, *(_show(name, evaluation.scores[row].get(name)) for name in names)]
                for row in ROWS
                if row in evaluation.scores
            ],
        ),
        "*text*: the language model reads the true transcript. *cascade*: it reads what Whisper "
        "heard. *speech*: it reads the adapter's output; its transcript is the token nearest to "
        "each. Self-BLEU, Self-ROUGE-L and *same answer* compare with the answer to text.",
    ]
    if evaluation.gaps:
        rows = [
            [f"speech - {name}", metric, f"{g.difference:+.3f}", f"[{g.low:+.3f}, {g.high:+.3f}]"]
            for name, gaps in evaluation.gaps.items()
            for metric, g in gaps.items()
        ]
        parts += ["## Gaps", _rows(["", "metric", "difference", "95 % (paired bootstrap)"], rows)]
    meters = [[name, f"{value:.4g}"] for name, value in evaluation.meters.items()]
    parts += ["## Meters", _rows(["meter", "value"], meters)]
    if evaluation.notes:
        parts.append("\n".join(f"- {note}" for note in evaluation.notes))
    speeds = [
        [stage, f"{spent:.1f}", f"{found['clips'] / max(spent, 1e-9):.2f}"]
        for stage, spent in evaluation.seconds.items()
    ]
    parts += ["## Speed", _rows(["stage", "s", "clips/s"], speeds)]
    if has_curves:
        parts += ["## Learning curves", "![learning curves](curves.png)"]
    if pictures:
        parts.append("## Alignments")
        parts += [f"![{_cell(name)}]({picture})" for picture, name in pictures]
    parts.append("## Answers")
    for line in predictions(evaluation)[: max(3, evaluation.config.plots)]:
        shown = {key: value for key, value in line.items() if key not in ("id", "audio")}
        parts.append(_rows([_cell(line["id"]), ""], [[k, _cell(v)] for k, v in shown.items()]))
    return "\n\n".join(parts) + "\n"


def _rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
