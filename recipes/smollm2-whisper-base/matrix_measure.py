"""One trained run on the held-out sets: figures, and each clip's share in them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matrix_more import measure_more
from matrix_origin import origin
from matrix_plan import Plan, RobustnessPlan, Row
from matrix_shared import Listener, Shared, adapted_rows, made_with

from blspkd.data.builtin import resolve_manifest
from blspkd.data.manifest import Record, read_manifest
from blspkd.evaluation.conditions import parse_condition
from blspkd.evaluation.evaluate import CLEAN, Evaluation, evaluate, load_cascade, select_records
from blspkd.evaluation.gaps import row_statistics
from blspkd.evaluation.nothing import hear_out_nothing
from blspkd.evaluation.tasks import SELF_METRICS, EvalConfig
from blspkd.evaluation.tasks import Row as AnswerRow
from blspkd.model.decoding import Decoding
from blspkd.model.loading import load_model
from blspkd.training.config import TrainConfig

Say = Callable[[str], None]


def measure_run(
    plan: Plan, row: Row, seed: int, config: TrainConfig, folder: Path, *, say: Say
) -> dict[str, Any]:
    """All that a result file holds.

    Args:
        plan: The matrix.
        row: Which row.
        seed: Which run.
        config: As it was trained.
        folder: Where it was trained.
        say: Told what is being measured.
    """
    began = time.monotonic()
    dtype = getattr(torch, config.model.dtype)
    model, processor = load_model(folder, dtype=dtype)
    transcriber, _ = load_cascade(model, None)
    listener = Listener(model, processor, transcriber)
    how = plan.evaluate
    shared = Shared(
        plan.results, made_with(listener, config.model.dtype, plan.evaluate.max_new_tokens)
    )
    options = {"max_new_tokens": how.max_new_tokens, "batch_size": how.batch_size}
    eval_config = EvalConfig(task=how.task, limit=how.limit, **options)
    records = {
        name: select_records(
            read_manifest(resolve_manifest(path, folder / "data")),
            eval_config,
            model.config.prompt,
        )
        for name, path in config.data.eval.items()
        if path
    }
    sets: dict[str, Any] = {}
    for name, clips in records.items():
        say(f"measuring {name}: {len(clips)} clips")
        sets[name] = _measure_set(listener, shared, name, clips, eval_config)
    result: dict[str, Any] = {
        "row": row.name,
        "title": row.title.strip(),
        "seed": seed,
        **origin(config, folder),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "sets": sets,
    }
    if row.tasks and seed == row.seeds[0]:
        result["tasks"] = {}
        for task, where in how.extra_tasks.items():
            say(f"asking for {task}: {where}")
            asked = dataclasses.replace(eval_config, task=task)
            name, clips = where, records.get(where)
            if clips is None:
                manifest = read_manifest(Path(where))
                name, clips = Path(where).stem, select_records(manifest, asked, model.config.prompt)
            found = _measure_set(listener, shared, name, clips, asked)
            kept = ("ids", "rows", "text", "cascade", "speech", "answers")
            result["tasks"][task] = {"set": name, **{key: found[key] for key in kept}}
    if row.more_clips and seed == row.seeds[0]:
        result["more_clips"] = {}
        for name, where in how.more_clips.items():
            say(f"listening to more clips: {where}")
            known = {record.id for record in records[name]}
            result["more_clips"][name] = measure_more(
                listener, shared, name, where, without=known, batch_size=how.batch_size
            )
    if row.robustness and seed == row.seeds[0] and how.robustness is not None:
        say("measuring robustness")
        clips = records[how.robustness.set][: how.robustness.limit]
        result["robustness"] = _measure_robustness(
            listener, shared, how.robustness, clips, eval_config
        )
    result["eval_seconds"] = time.monotonic() - began
    return result


def _measure_set(
    listener: Listener, shared: Shared, name: str, records: Sequence[Record], config: EvalConfig
) -> dict[str, Any]:
    common = shared.rows(listener, name, records, config)
    plain = listener.model.config.plain_lora
    found = evaluate(
        listener.model,
        listener.processor,
        records,
        config,
        transcriber=None,
        given=adapted_rows(listener, records, config, common) if plain else common,
    )
    kept = {
        "ids": [record.id for record in records],
        "figures": found.meters,
        "rows": found.scores,
        "meters": {key: [list(pair) for pair in parts] for key, parts in _parts(found).items()},
        **_each_clip(found, found.rows["text"].answers),
        "answers": found.rows["speech"].answers,
        "transcripts": found.rows["speech"].transcripts,
    }
    if plain:
        untouched = common["text"].answers
        kept["text_answers"] = found.rows["text"].answers
        kept["against_untouched"] = {
            row: {metric: clips for metric, clips in statistics.items() if metric in SELF_METRICS}
            for row, statistics in _each_clip(found, untouched, text=SELF_METRICS).items()
        }
    return kept


def _parts(found: Evaluation) -> dict[str, list[tuple[float, int]]]:
    return found.clip_meters.parts


def _each_clip(
    found: Evaluation, own_answers: Sequence[str], *, text: Sequence[str] = ("wer", "bleu")
) -> dict[str, dict[str, Any]]:
    """Each row's statistics clip by clip; of the row "text" only what says something."""
    statistics: dict[str, dict[str, Any]] = {}
    for name, row in found.rows.items():
        if name == "text":
            row = AnswerRow(row.answers, None)
        each = row_statistics(found.config.task, found.records, row, own_answers)
        statistics[name] = {
            metric: clips.tolist()
            for metric, clips in each.items()
            if name != "text" or metric in text
        }
    return statistics


def _measure_robustness(
    listener: Listener,
    shared: Shared,
    how: RobustnessPlan,
    records: Sequence[Record],
    config: EvalConfig,
) -> dict[str, Any]:
    conditions: dict[str, Any] = {}
    for condition in (None, *map(parse_condition, how.conditions)):
        found = evaluate(
            listener.model,
            listener.processor,
            records,
            config,
            transcriber=None,
            condition=condition,
            given=shared.rows(listener, how.set, records, config, condition),
        )
        conditions[CLEAN if condition is None else condition.name] = {
            "figures": found.meters,
            "rows": found.scores,
            **_each_clip(found, found.rows["text"].answers),
        }
    measured: dict[str, Any] = {"set": how.set, "clips": len(records), "conditions": conditions}
    if how.no_speech:
        nothing = hear_out_nothing(
            listener.model,
            listener.processor,
            prompt=listener.model.config.prompt,
            count=how.no_speech,
            transcriber=listener.transcriber,
            decoding=Decoding(max_new_tokens=config.max_new_tokens),
            batch_size=config.batch_size,
        )
        measured["no_speech"] = {**nothing.figures(), "transcripts": nothing.transcripts}
    return measured
