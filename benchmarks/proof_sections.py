"""The sections of docs/results.md that follow the matrix."""

from __future__ import annotations

from typing import Any

from benchmarks.proof_cells import METRICS, NOT_RUN, mean, show
from benchmarks.proof_charts import CHARTS
from benchmarks.proof_results import CASCADE, Matrix
from blspkd.evaluation.nothing import PRETENDED_WORDS
from blspkd.evaluation.tables import markdown

ROUGE = "self_rouge_l"
HEARD = ("input_kl", "input_top1", "token_accuracy", "length_exact", "length_within_one")
OWN = {"asr": "wer", "st": "bleu", "qa": "accuracy"}
TASK_FIGURES = {"wer": "WER %", "bleu": "BLEU", "accuracy": "accuracy %", ROUGE: "Self-ROUGE-L"}


def drift(matrix: Matrix) -> list[str]:
    """What LoRA on text did to the language model's reading of text."""
    sides = ("text", CASCADE, "speech")
    cells = [["", "set", "KL on text", "answers to text changed %", *sides]]
    for row in matrix.adapted:
        for run in matrix.runs[row]:
            for name, one in run["sets"].items():
                figures = one["figures"]
                changed = f"{100 * figures['text_answers_changed']:.0f}"
                own = [one["against_untouched"].get(side, {}).get(ROUGE) for side in sides]
                means = [None if v is None else sum(a for a, _ in v) / len(v) for v in own]
                title = f"{matrix.titles[row]}, seed {run['seed']}"
                kl = show("text_drift_kl", figures["text_drift_kl"])
                cells.append([title, name, kl, changed, *(show(ROUGE, v) for v in means)])
    if len(cells) == 1:
        return [f"{NOT_RUN.capitalize()}."]
    return [
        "The same matrices, acting on text as well, in the teacher too. *KL on text*: nats from "
        "the untouched language model's reading of transcript and response to the adapted one's. "
        "The last three columns: Self-ROUGE-L of its answers to the true transcript, to Whisper's "
        "and to speech against the *untouched* language model's answers to text; above, they are "
        "compared with its own. With PLoRA the text column is 1 and the drift 0 by construction.",
        markdown(cells),
    ]


def tasks(matrix: Matrix) -> list[str]:
    """What else was asked, beside what the language model makes of the true transcript."""
    sides = ("text", CASCADE, "speech")
    cells = [["", "set", "task", "figure", *sides]]
    for row, runs in matrix.runs.items():
        for task, found in runs[0].get("tasks", {}).items():
            for metric in (*([OWN[task]] if task in OWN else []), ROUGE):
                values = [found["rows"].get(side, {}).get(metric) for side in sides]
                shown = [show(metric, value) for value in values]
                where = f"{found['set']} ({len(found['ids'])} clips)"
                cells.append([matrix.titles[row], where, task, TASK_FIGURES[metric], *shown])
    if len(cells) == 1:
        return [f"{NOT_RUN.capitalize()}."]
    return [
        "*text* is the ceiling: the same language model, given the true transcript. Where it is "
        "bad, the others say little.",
        markdown(cells),
    ]


def more_clips(matrix: Matrix) -> list[str]:
    """What is heard of clips that nobody answered."""
    titles = [METRICS[metric] for metric in HEARD]
    cells = [["", "like", "clips", *titles, "WER %", "WER % of the cascade"]]
    for row, runs in matrix.runs.items():
        for name, found in runs[0].get("more_clips", {}).items():
            figures = [show(metric, found["figures"].get(metric)) for metric in HEARD]
            wer = [show("wer", found["wer"].get(side)) for side in ("speech", CASCADE)]
            cells.append([matrix.titles[row], name, f"{found['clips']}", *figures, *wer])
    if len(cells) == 1:
        return [f"{NOT_RUN.capitalize()}."]
    return [
        "The sets of the matrix are the first clips of what was held out; these are the others, "
        "heard and not answered.",
        markdown(cells),
    ]


def robustness(matrix: Matrix) -> list[str]:
    """Cascade and speech under conditions, and on clips without speech."""
    parts = []
    for row, run in _robust_runs(matrix):
        found = run["robustness"]
        cells = [["condition", "row", "WER %", "Self-ROUGE-L", "Self-BLEU", "input KL"]]
        for condition, one in found["conditions"].items():
            for side in (CASCADE, "speech"):
                scores = one["rows"].get(side)
                if scores is None:
                    continue
                kl = one["figures"].get("input_kl") if side == "speech" else None
                values = [scores.get(m) for m in ("transcript_wer", "self_rouge_l", "self_bleu")]
                named = zip(("transcript_wer", "self_rouge_l", "self_bleu"), values, strict=True)
                shown = [show(m, v) for m, v in named]
                cells.append([condition, side, *shown, show("input_kl", kl)])
        parts.append(
            f"{matrix.titles[row]}, seed {run['seed']}, on {found['clips']} clips of "
            f"*{found['set']}*. Noise is white, at that signal-to-noise ratio in dB."
        )
        parts.append(markdown(cells))
        if "no_speech" in found:
            parts += ["Clips without speech:", markdown(_no_speech(found["no_speech"]))]
            parts.append(
                f"*pretends*: what it believes to have been said has at least {PRETENDED_WORDS} "
                "words; *answer differs*: from the answer to an empty transcript."
            )
    return [*parts, *chart(matrix, "robustness")] if parts else [f"{NOT_RUN.capitalize()}."]


def _no_speech(found: dict[str, Any]) -> list[list[str]]:
    cells = [["sound", "row", "clips", "pretends %", "words", "answer differs %"]]
    for side, by_kind in found["rows"].items():
        for kind, one in by_kind.items():
            rates = [one["pretends"], one["answers_differ"]]
            pretends, differs = ("" if r is None else f"{100 * r:.0f}" for r in rates)
            words = "" if one["words"] is None else f"{one['words']:.1f}"
            cells.append([kind, side, str(one["clips"]), pretends, words, differs])
    return cells


def scaling(matrix: Matrix) -> list[str]:
    """The same settings on fewer clips."""
    cells = [["", "clips", "hours", "set", *METRICS.values()]]
    for row in matrix.scaling:
        for run in matrix.runs.get(row, [])[:1]:
            size = [f"{run['train_clips']:,}", f"{run['train_hours']:.2f}"]
            for name in run["sets"]:
                values = [mean(metric, matrix.seeds(row, name, metric)) for metric in METRICS]
                cells.append([matrix.titles[row], *size, name, *values])
    if len(cells) == 1:
        return [f"{NOT_RUN.capitalize()}."]
    seen = {run["clips_seen"] for row in matrix.scaling for run in matrix.runs.get(row, [])}
    return [
        "The same settings on fewer clips; every run saw "
        f"{' or '.join(f'{one:,}' for one in sorted(seen))} clips, repeats counted.",
        markdown(cells),
        *chart(matrix, "scaling"),
    ]


def origins(matrix: Matrix, folder: str) -> list[str]:
    """Where each run's figures come from; `folder` is that of the result files."""
    if not matrix.runs:
        return [f"{NOT_RUN.capitalize()}."]
    cells = [
        ["", "seed", "steps", "clips seen", "trained M", "hours", "minutes", "before", "device"]
    ]
    for row, runs in matrix.runs.items():
        for run in runs:
            link = f"[{matrix.titles[row]}]({folder}/{row}-s{run['seed']}.json)"
            counts = (f"{run['seed']}", f"{run['steps']:,}", f"{run['clips_seen']:,}")
            stages = run["earlier_stages"].values()
            before = " + ".join(f"{stage['train_seconds'] / 60:.0f}" for stage in stages)
            times = (f"{run['train_hours']:.1f}", f"{run['train_seconds'] / 60:.0f}", before)
            size = f"{run['trained_parameters'] / 1e6:.1f}"
            where = f"{run['device']}, {(run['commit'] or 'unknown')[:10]}"
            cells.append([link, *counts, size, *times, where])
    return [
        "*trained M*: millions of trained parameters; *hours*: of speech trained on; *minutes*: of "
        "training; *before*: those of the stages whose weights it began with; then device and "
        "commit.",
        markdown(cells),
    ]


def _robust_runs(matrix: Matrix) -> list[tuple[str, dict[str, Any]]]:
    every = [(row, run) for row, runs in matrix.runs.items() for run in runs]
    return [(row, run) for row, run in every if "robustness" in run]


def chart(matrix: Matrix, name: str) -> list[str]:
    """A link to a chart, if there is anything to draw."""
    return [f"![{name}]({matrix.charts}-{name}.svg)"] if CHARTS[name](matrix, None) else []
