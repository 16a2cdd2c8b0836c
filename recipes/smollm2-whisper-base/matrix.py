"""Every experiment of the paper, at small scale, as one command that goes on where it stopped.

    python recipes/smollm2-whisper-base/matrix.py --dry-run
    python recipes/smollm2-whisper-base/matrix.py data.train=real/train.jsonl
    python recipes/smollm2-whisper-base/matrix.py --only plora --seed 0 --steps 20 --results try

Trains each (row, seed) of matrix.yaml by `blspkd train`'s own functions, measures it by `blspkd
eval`'s, and writes one result file for it. A run whose result file is there is passed over; one
that was interrupted goes on from its checkpoint. KEY=VALUE pairs go above every row's settings.
`python -m benchmarks.proof` makes docs/results.md of the result files.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import click
from matrix_measure import measure_run
from matrix_plan import Plan, Row, differing, read_plan, row_config, settings, with_defaults
from matrix_shared import compact, write

from blspkd.model.loading import quieten_transformers
from blspkd.training.config import TrainConfig
from blspkd.training.config_file import as_dict
from blspkd.training.folder import CONFIG_NAME, SUMMARY_NAME, last_checkpoint, read_document
from blspkd.training.run import train

HERE = Path(__file__).parent


@click.command(context_settings={"show_default": True})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, exists=True),
    default=HERE / "matrix.yaml",
    help="Another matrix.",
)
@click.option("--only", multiple=True, metavar="ROW", help="This row alone; may be repeated.")
@click.option("--seed", "seeds", multiple=True, type=int, help="This seed alone; may be repeated.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of the recipe's.")
@click.option("--results", type=click.Path(path_type=Path), help="Folder of the result files.")
@click.option("--runs", type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--keep-going", is_flag=True, help="Go on with the next run when one fails.")
@click.option("--dry-run", is_flag=True, help="Check every configuration and say what is to do.")
def main(
    overrides: tuple[str, ...],
    plan_path: Path,
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    steps: int | None,
    results: Path | None,
    runs: Path | None,
    keep_going: bool,
    dry_run: bool,
) -> None:
    """Train and measure the rows of a matrix, one run after the other."""
    try:
        plan = read_plan(plan_path)
        plan = dataclasses.replace(plan, results=results or plan.results, runs=runs or plan.runs)
        unknown = set(only) - set(plan.rows)
        if unknown:
            raise ValueError(f"no row {min(unknown)!r}; there are: {', '.join(plan.rows)}")
        todo = [
            (row, seed, row_config(plan, row, seed, extra=overrides, steps=steps))
            for row in plan.rows.values()
            if not only or row.name in only
            for seed in row.seeds
            if not seeds or seed in seeds
        ]
        states = {(row.name, seed): state_of(plan, row, seed, c) for row, seed, c in todo}
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for row, seed, config in todo:
        steps_of = config.optim.max_steps or f"{config.optim.epochs} epochs"
        click.echo(f"{row.name:<16} seed {seed}  {steps_of} steps  {states[row.name, seed]}")
    if dry_run:
        return
    for row, _, config in todo:
        held_out = {name for name, where in config.data.eval.items() if where}
        for task, where in plan.evaluate.extra_tasks.items() if row.tasks else ():
            if where not in held_out and not Path(where).is_file():
                raise click.ClickException(
                    f"evaluate.extra_tasks.{task}: {where} is neither a set of data.eval nor a file"
                )
        for name, where in plan.evaluate.more_clips.items() if row.more_clips else ():
            if name not in held_out or not Path(where).is_file():
                raise click.ClickException(
                    f"evaluate.more_clips.{name}: {name} must be a set of data.eval, and {where} a "
                    "manifest"
                )
    quieten_transformers()
    failed = []
    for row, seed, config in todo:
        if states[row.name, seed] == DONE:
            continue
        try:
            if not run(plan, row, seed, config):
                sys.exit(130)
        except (ValueError, RuntimeError) as error:
            if not keep_going:
                raise
            traceback.print_exc()
            failed.append(f"{row.name}, seed {seed}: {error}")
        gc.collect()  # a Trainer refers to itself, and to the model
    if failed:
        raise click.ClickException("failed: " + "; ".join(failed))


DONE, TRAINED, BEGUN, NEW = "done", "trained, to be measured", "begun", "to do"


def result_path(plan: Plan, row: Row, seed: int) -> Path:
    """Where a run's figures go."""
    return plan.results / f"{row.name}-s{seed}.json"


def state_of(plan: Plan, row: Row, seed: int, config: TrainConfig) -> str:
    """How far a run has come.

    Raises:
        ValueError: What is there was made with other settings.
    """
    path, folder = result_path(plan, row, seed), Path(config.output or "")
    if path.exists():
        found = json.loads(path.read_text("utf-8"))["settings"]
        _refuse_others(path, found, settings(config))
        return DONE
    if not (folder / CONFIG_NAME).exists():
        return NEW
    found = read_document(folder)["config"]
    _refuse_others(folder, found, as_dict(config))
    if (folder / SUMMARY_NAME).exists():
        return TRAINED
    return BEGUN if last_checkpoint(folder) is not None else NEW


def _refuse_others(place: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    filled = with_defaults(found)
    known = {key: value for key, value in filled.items() if key in found or key in wanted}
    fields = differing(json.loads(compact(known)), json.loads(compact(wanted)))
    if fields:
        raise ValueError(
            f"{place} was made with other settings ({', '.join(fields)}): delete it to make it "
            "anew, or choose other --results and --runs"
        )


def run(plan: Plan, row: Row, seed: int, config: TrainConfig) -> bool:
    """Train, if need be, and measure; False if Ctrl-C ended it."""
    state, folder = state_of(plan, row, seed, config), Path(config.output or "")

    def say(text: str) -> None:
        click.echo(f"[{row.name} s{seed}] {text}", err=True)

    if state != TRAINED:
        # a folder without a checkpoint holds nothing worth keeping
        result = train(config, resume=state == BEGUN, force=state == NEW, say=say)
        if result.interrupted:
            say("interrupted; the same command goes on from here")
            return False
    found = measure_run(plan, row, seed, config, folder, say=say)
    path = result_path(plan, row, seed)
    write(path, found)
    say(f"written: {path}")
    return True


if __name__ == "__main__":
    main()
