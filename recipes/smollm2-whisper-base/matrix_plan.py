"""What matrix.yaml asks for: rows, seeds, and the training configuration of each."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from blspkd.training.config import TrainConfig
from blspkd.training.config_file import as_dict, load_config

SHOWN = ("title", "about", "claims", "differences")
"""Keys for the document alone."""
KEYS = ("base", "runs", "results", "common", "rows", "evaluate", *SHOWN)
PLACES = ("name", "output", "seed")
"""Fields of a configuration that say which run it is, not what is trained."""


@dataclass(frozen=True)
class Row:
    """One row of the comparison.

    Attributes:
        name: Of its files.
        title: As the table has it.
        seeds: One run for each.
        set: Fields of the training configuration, by dotted name.
        base: A configuration of its own to start from, without the plan's `common`.
        scaling: Whether it is a point of the scaling curve.
        in_matrix: Whether it stands in the table of the matrix.
        robustness: Whether its first seed is measured under conditions.
        tasks: Whether its first seed is asked the plan's extra tasks.
        more_clips: Whether its first seed hears the plan's further clips.
    """

    name: str
    title: str
    seeds: tuple[int, ...] = (0,)
    set: dict[str, Any] = field(default_factory=dict)
    base: Path | None = None
    scaling: bool = False
    in_matrix: bool = True
    robustness: bool = False
    tasks: bool = False
    more_clips: bool = False


@dataclass(frozen=True)
class RobustnessPlan:
    """How robustness is measured.

    Attributes:
        set: The held-out set whose clips are used.
        conditions: As `blspkd eval --condition` takes them.
        limit: Only the first so many clips.
        no_speech: Clips of each kind without speech.
    """

    set: str
    conditions: tuple[str, ...]
    limit: int | None = None
    no_speech: int = 0


@dataclass(frozen=True)
class EvalPlan:
    """How every run is measured.

    Attributes:
        limit: Only the first so many clips of each held-out set.
        task: Of `blspkd eval`, for all sets.
        extra_tasks: Further tasks, and for each the name of a held-out set or a manifest.
        max_new_tokens: Of each answer.
        batch_size: Clips at a time.
        robustness: Under conditions; None for not at all.
        more_clips: For a held-out set, a manifest with more clips of its kind: what the set has of
            them is left out, the others are heard and not answered.
    """

    limit: int | None = None
    task: str = "continue"
    extra_tasks: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = 48
    batch_size: int = 16
    robustness: RobustnessPlan | None = None
    more_clips: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A whole matrix.

    Attributes:
        base: The configuration all rows start from.
        runs: Where run folders go.
        results: Where result files go.
        common: Fields laid over the base for all rows without one of their own.
        rows: By name.
        evaluate: How runs are measured.
    """

    base: Path
    runs: Path
    results: Path
    common: dict[str, Any]
    rows: dict[str, Row]
    evaluate: EvalPlan


def read_plan(path: Path) -> Plan:
    """Read a matrix.yaml; each `base` and `results` are relative to it, `runs` to where one stands.

    Raises:
        ValueError: It has a key that nobody knows.
    """
    document = yaml.safe_load(path.read_text("utf-8"))
    unknown = set(document) - set(KEYS)
    if unknown:
        raise ValueError(f"{path}: unknown key {min(unknown)!r}; known: {', '.join(KEYS)}")
    rows = {}
    for name, values in document["rows"].items():
        checked = _checked(Row, {"name": name, "title": name, **values}, f"{path}: rows.{name}")
        checked["seeds"] = tuple(checked.get("seeds", (0,)))
        if "base" in checked:
            checked["base"] = path.parent / checked["base"]
        rows[name] = Row(**checked)
    evaluate = _checked(EvalPlan, document.get("evaluate") or {}, f"{path}: evaluate")
    if evaluate.get("robustness"):
        inner = _checked(RobustnessPlan, evaluate["robustness"], f"{path}: evaluate.robustness")
        inner["conditions"] = tuple(inner["conditions"])
        evaluate["robustness"] = RobustnessPlan(**inner)
    return Plan(
        base=path.parent / document["base"],
        runs=Path(document["runs"]),
        results=path.parent / document["results"],
        common=document.get("common") or {},
        rows=rows,
        evaluate=EvalPlan(**evaluate),
    )


def _checked(kind: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    known = [one.name for one in dataclasses.fields(kind)]
    unknown = set(values) - set(known)
    if unknown:
        raise ValueError(f"{where}: unknown key {min(unknown)!r}; known: {', '.join(known)}")
    return dict(values)


def row_config(
    plan: Plan, row: Row, seed: int, *, extra: tuple[str, ...] = (), steps: int | None = None
) -> TrainConfig:
    """The training configuration of one run.

    Args:
        plan: The matrix.
        row: Which row.
        seed: Which run of it.
        extra: Further `key=value` pairs, above all else: where data and models lie.
        steps: Optimiser steps instead of the configuration's.
    """
    name = f"{row.name}-s{seed}"
    fields = {**(plan.common if row.base is None else {}), **row.set}
    # JSON is YAML, and says null, true and strings as the reader wants them
    pairs = [f"{key}={json.dumps(value)}" for key, value in fields.items()]
    pairs += [*extra, f"seed={seed}", f"name={name}", f"output={json.dumps(str(plan.runs / name))}"]
    if steps is not None:
        pairs.append(f"optim.max_steps={steps}")
    return load_config(row.base or plan.base, pairs)


def with_defaults(found: dict[str, Any], default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings of an earlier version, with the defaults of the fields that it did not know."""
    filled = dict(as_dict(TrainConfig()) if default is None else default)
    for key, value in found.items():
        before = filled.get(key)
        nested = isinstance(value, dict) and isinstance(before, dict)
        filled[key] = with_defaults(value, before) if nested else value
    return filled


def settings(config: TrainConfig) -> dict[str, Any]:
    """What is trained, without which run it is: equal for all seeds of a row."""
    return {key: value for key, value in as_dict(config).items() if key not in PLACES}


def differing(first: Any, second: Any, where: str = "") -> list[str]:
    """Dotted names of the fields in which two nested mappings differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for key in {**first, **second}:
            inner = f"{where}.{key}" if where else str(key)
            missing = object()
            found += differing(first.get(key, missing), second.get(key, missing), inner)
        return found
    return [] if first == second else [where]
