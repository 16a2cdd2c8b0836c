"""Keeps the figures of runs in results/, and writes the READMEs' tables from them.

    python -m benchmarks.readme keep NAME RUN_FOLDER [EVAL_FOLDER]
    python -m benchmarks.readme write

`keep` copies what `blspkd train` measured (and, given its folder, what `blspkd eval` printed) into
results/NAME.json. `write` fills each part of a README between `<!-- results: NAME -->` and
`<!-- end of results -->`: from results/NAME.json or, where that is what a benchmark left, by the
function `table` of the benchmark that results/BENCHMARK-DEVICE.jsonl is named after, with the chart
beside it; where NAME is "best", by `benchmarks.proof`. A test checks that every README is what it
writes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import proof
from benchmarks.measure import machine, read
from blspkd.training.effort import effort
from blspkd.training.folder import read_document

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("src/*/README.md"))]
SHOWN = {
    "input_kl": "KL after each token of the utterance (nats)",
    "response_kl": "KL over the LLM's own response (nats)",
    "input_top1": "same likeliest next token, utterance",
    "token_accuracy": "speech tokens nearest to their text token",
    "length_exact": "exact number of tokens",
    "length_within_one": "number of tokens within one",
    "repeat_wer": "word error rate when asked to repeat",
    "same_answer": "very same answer to speech as to text",
}
PLAIN = ("input_kl", "response_kl")
EVAL_SHOWN = {
    "wer": "WER of the LLM's repetition",
    "transcript_wer": "WER of what was recognised",
    "self_bleu": "Self-BLEU",
    "self_rouge_l": "Self-ROUGE-L",
    "same_answer": "very same answer",
}
PLAIN_EVAL = ("self_bleu",)


def keep(name: str, run: Path, evaluation: Path | None = None) -> Path:
    """Copy a run's figures into results/NAME.json."""
    figures = json.loads((run / "summary.json").read_text())
    resolved, took = read_document(run), effort(run)
    kept = {
        "commit": resolved["commit"],
        "versions": resolved["versions"],
        "device": machine("cpu")["device"],
        "steps": took["steps"],
        "batch_size": resolved["config"]["optim"]["batch_size"],
        "train_seconds": took["train_seconds"],
        **figures,
    }
    if evaluation is not None:
        kept["eval"] = json.loads((evaluation / "metrics.json").read_text())
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def run_table(figures: dict[str, Any]) -> str:
    """Held-out figures before -> after, a column per set."""
    after, before = figures["after"], figures["before"]
    sets = list(dict.fromkeys(key.partition("/")[0] for key in after))
    heads = [f"{one} ({after[f'{one}/clips']:.0f})" for one in sets]
    lines = [f"| held-out clips | {' | '.join(heads)} |", "|---|" + "---|" * len(sets)]
    for meter, label in SHOWN.items():
        cells = [_change(meter, before, after, f"{one}/{meter}") for one in sets]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def text(name: str, figures: dict[str, Any]) -> str:
    """What stands between a part's marks."""
    minutes, result = figures["train_seconds"] / 60, f"benchmarks/results/{name}.json"
    made = (
        f"Measured before -> after {figures['steps']} steps of {figures['batch_size']} clips in "
        f"{minutes:.0f} minutes on {figures['device']} ([`{result}`]({result})):"
    )
    parts = [made, run_table(figures)]
    if "eval" in figures:
        evaluation = figures["eval"]
        parts.append(f"`blspkd eval` on {evaluation['clips']} of the held-out sentences:")
        parts.append(rows_table(evaluation["rows"]))
    return "\n\n".join(parts)


def rows_table(rows: dict[str, dict[str, float]]) -> str:
    """The rows of `blspkd eval`, a column per metric."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    lines = [f"| | {' | '.join(EVAL_SHOWN[metric] for metric in metrics)} |"]
    lines.append("|---|" + "---|" * len(metrics))
    for name, row in rows.items():
        cells = [
            "" if m not in row else f"{row[m]:.1f}" if m in PLAIN_EVAL else f"{row[m]:.1%}"
            for m in metrics
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(document: Path) -> str:
    """A README's text with every part made anew; a part without results stays empty."""

    def part(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[1]}.json"
        rows = path.with_suffix(".jsonl")
        body = ""
        if match[1] == "best":
            body = proof.best_row() + "\n"
        elif path.exists():
            body = text(match[1], json.loads(path.read_text())) + "\n"
        elif rows.exists():
            body = bench_text(match[1], read(rows), os.path.relpath(RESULTS, document.parent))
        return f"<!-- results: {match[1]} -->\n{body}<!-- end of results -->"

    pattern = r"<!-- results: ([\w-]+) -->\n.*?<!-- end of results -->"
    return re.sub(pattern, part, document.read_text("utf-8"), flags=re.DOTALL)


def bench_text(name: str, rows: list[dict[str, Any]], folder: str) -> str:
    """What a benchmark says of its rows, and links to rows and chart in `folder`."""
    benchmark = importlib.import_module(f"benchmarks.{name.partition('-')[0]}")
    links = f"[Every row]({folder}/{name}.jsonl)"
    if (RESULTS / f"{name}.svg").exists():
        links = f"![{name}]({folder}/{name}.svg)\n\n{links}"
    return f"{benchmark.table(rows)}\n\n{links}.\n"


def _change(meter: str, before: dict[str, float], after: dict[str, float], key: str) -> str:
    if key not in after:
        return ""
    show = "{:.2f}" if meter in PLAIN else "{:.1%}"
    old = show.format(before[key]) + " -> " if key in before else ""
    return old + show.format(after[key])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["keep", name, run, *evaluation]:
            print(keep(name, Path(run), *map(Path, evaluation)))
        case ["write"]:
            for document in DOCUMENTS:
                document.write_text(filled(document), "utf-8")
        case _:
            sys.exit(__doc__)
