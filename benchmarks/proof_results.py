"""The result files of a matrix.py, and what can be computed of them.

Shapes: S runs of a row that differ by their seed, C clips, K statistics of a clip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from blspkd.evaluation.bootstrap import Gap, Statistics, bleu_score, paired_gap
from blspkd.evaluation.gaps import score_of

ROOT = Path(__file__).parents[1]
CASCADE = "cascade"


@dataclass(frozen=True)
class Matrix:
    """A plan and what there is of it.

    Attributes:
        titles: Of all rows, by name, in the plan's order.
        runs: The result files' contents of each row that has any, seed by seed.
        claims: `claim`, `first` and `second` of what the paper says.
        differences: `first` and `second` of further rows that are compared.
        scaling: Names of the rows that are points of the scaling curve.
        listed: Names of the rows that stand in the table.
        planned: What some row asks for: "plain_lora", "more_clips", "tasks", "robustness",
            "scaling".
        title: Of the document.
        about: What was trained on what, in a sentence or two.
        charts: How the names of its charts begin.
    """

    titles: dict[str, str]
    runs: dict[str, list[dict[str, Any]]]
    claims: list[dict[str, str]]
    differences: list[dict[str, str]]
    scaling: list[str]
    listed: list[str]
    planned: frozenset[str]
    title: str
    about: str
    charts: str

    @property
    def adapted(self) -> list[str]:
        """Rows whose LoRA acts on text too, so that text and cascade are their own."""
        return [row for row, runs in self.runs.items() if _is_adapted(runs[0])]

    @property
    def has_cascade(self) -> bool:
        """Whether any run had Whisper's decoder to compare with; an encoder alone has none."""
        every = [run for runs in self.runs.values() for run in runs]
        return any(one.get(CASCADE) for run in every for one in run["sets"].values())

    @property
    def sets(self) -> dict[str, int]:
        """Held-out sets that any run was measured on, with their number of clips."""
        found: dict[str, int] = {}
        for runs in self.runs.values():
            for run in runs:
                for name, one in run["sets"].items():
                    found.setdefault(name, len(one["ids"]))
        return found

    def statistics(
        self, row: str, set_name: str, metric: str, side: str = "speech"
    ) -> Statistics | None:
        """What each clip adds to a metric's sums, (S, C, K); None where that was not measured.

        Args:
            row: One of the plan's; or "cascade", which all share whose text is untouched.
            set_name: A held-out set.
            metric: As in metrics.json.
            side: "speech", or "cascade" for the row's own.
        """
        found = []
        for run in self._runs_of(row):
            one = run["sets"].get(set_name)
            if one is None:
                continue
            own = CASCADE if row == CASCADE else side
            clips = one.get(own, {}).get(metric)
            if clips is None and own == "speech":
                clips = one["meters"].get(metric)
            if clips is None:
                continue
            sums = np.asarray(clips, dtype=np.float64)
            # Was there anything to count? BLEU's sums begin with two lengths, and end with the
            # answers' 4-grams, of which short ones have none; the others end with what is counted.
            if (sums[:, :2] if score_of(metric) is bleu_score else sums[:, -1]).any():
                found.append(sums)
        return np.stack(found) if found else None

    def seeds(self, row: str, set_name: str, metric: str, side: str = "speech") -> list[float]:
        """A metric of each run of a row; see `statistics`."""
        found = self.statistics(row, set_name, metric, side)
        return [] if found is None else score_of(metric)(found.sum(axis=1)).tolist()

    def gap(self, first: str, second: str, set_name: str, metric: str) -> Gap | None:
        """First row less second row; None where one of them was not measured.

        Against "cascade", a row's own: of the language model that reads its speech.

        Raises:
            ValueError: They were measured on different clips.
        """
        one = self.statistics(first, set_name, metric)
        if second == CASCADE:
            two = self.statistics(first, set_name, metric, CASCADE)
        else:
            two = self.statistics(second, set_name, metric)
        if one is None or two is None:
            return None
        rows = [*self._runs_of(first), *self._runs_of(second if second != CASCADE else first)]
        clips = {tuple(run["sets"][set_name]["ids"]) for run in rows if set_name in run["sets"]}
        if len(clips) > 1:
            raise ValueError(f"{first} and {second} were measured on different clips of {set_name}")
        return paired_gap(one, two, score_of(metric))

    def interval(self, row: str, set_name: str, metric: str) -> Gap | None:
        """A ratio itself, with its interval over clips."""
        found = self.statistics(row, set_name, metric)
        if found is None:
            return None
        return paired_gap(found, np.zeros_like(found[:1]))

    def _runs_of(self, row: str) -> list[dict[str, Any]]:
        if row != CASCADE:
            return self.runs.get(row, [])
        every = [run for runs in self.runs.values() for run in runs]
        return [run for run in every if not _is_adapted(run)][:1]


def _is_adapted(run: dict[str, Any]) -> bool:
    return bool(run["settings"]["model"]["plain_lora"])


def read_matrix(results: Path, path: Path, plan: Path) -> Matrix:
    """Read a plan, and the result files that there are, for the document at ``path``."""
    document = yaml.safe_load(plan.read_text("utf-8"))
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, row in document["rows"].items():
        paths = [results / f"{name}-s{seed}.json" for seed in row.get("seeds", [0])]
        there = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
        if there:
            runs[name] = there
    return Matrix(
        titles={name: row.get("title", name).strip() for name, row in document["rows"].items()},
        runs=runs,
        claims=document.get("claims") or [],
        differences=document.get("differences") or [],
        scaling=[name for name, row in document["rows"].items() if row.get("scaling")],
        listed=[name for name, row in document["rows"].items() if row.get("in_matrix", True)],
        planned=frozenset(
            what
            for row in document["rows"].values()
            for what in ("plain_lora", "more_clips", "tasks", "robustness", "scaling")
            if row.get(what) or row.get("set", {}).get(f"model.{what}")
        ),
        title=document["title"],
        about=" ".join(document["about"].split()),
        charts=path.stem,
    )
