"""Make the cascade of a matrix's result files anew, without the runs.

    python recipes/smollm2-whisper-base/matrix_cascade.py --dtype float32

Nothing in the cascade is trained, so its rows can be made again when its way of listening changes,
long after the runs are gone. What was measured of speech stays as it is. Every row is compared with
answers to text by its own arithmetic: the rounding of another processor alone changes a quarter of
all greedy answers. So the answers to text are made again, too, for the cascade, and those that
speech was compared with are kept beside them. Runs with plain LoRA lose their cascade, which their
own language model had answered.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import torch
from matrix_more import more_name, more_records
from matrix_plan import Plan, read_plan, row_config
from matrix_shared import NAME, Listener, Shared, made_with, write

from blspkd.data.manifest import Record, read_manifest
from blspkd.evaluation.conditions import parse_condition
from blspkd.evaluation.evaluate import CLEAN, load_cascade
from blspkd.evaluation.gaps import row_statistics
from blspkd.evaluation.metrics import each_word_errors, word_error_rate
from blspkd.evaluation.nothing import hear_out_nothing
from blspkd.evaluation.tasks import EvalConfig, Task, score_rows
from blspkd.model.configuration import BlspKDConfig
from blspkd.model.decoding import Decoding
from blspkd.model.loading import load_processor, quieten_transformers
from blspkd.model.modeling import BlspKDForConditionalGeneration
from blspkd.training.config import TrainConfig

HERE = Path(__file__).parent
CASCADE = "cascade"
FORMER = "speech_compared_with"


@click.command(context_settings={"show_default": True})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, exists=True),
    default=HERE / "matrix.yaml",
    help="Another matrix.",
)
@click.option("--results", type=click.Path(path_type=Path), help="Folder of the result files.")
@click.option(
    "--unfinished",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/cascade"),
    help="Where answers are kept until all are there; a second call goes on from them.",
)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")), default="float32")
def main(
    overrides: tuple[str, ...], plan_path: Path, results: Path | None, unfinished: Path, dtype: str
) -> None:
    """Listen and answer anew, and lay the rows into all result files."""
    plan = read_plan(plan_path)
    plan = dataclasses.replace(plan, results=results or plan.results)
    files = {path: json.loads(path.read_text("utf-8")) for path in plan.results.glob("*-s*.json")}
    if not files:
        raise click.ClickException(f"{plan.results} holds no result files")
    quieten_transformers()
    row = next(iter(plan.rows.values()))
    config = row_config(plan, row, row.seeds[0], extra=overrides)
    anew = Anew(plan, config, dtype=dtype, unfinished=unfinished)
    for path, run in files.items():
        click.echo(path.name, err=True)
        if run["settings"]["model"]["plain_lora"]:
            drop_cascade(run)
        else:
            anew.renew(run)
    former = json.loads((plan.results / NAME).read_text("utf-8"))
    common = {
        "made_with": anew.shared.made_with,
        "entries": anew.shared.entries,
        FORMER: former.get(FORMER) or _answers_to_text(former),
    }
    for path, run in files.items():
        write(path, run)
    write(plan.results / NAME, common)


def drop_cascade(run: dict[str, Any]) -> None:
    """Forget the cascade of a run that answered for itself."""
    for one in run["sets"].values():
        for place in (one, one["rows"], one["against_untouched"]):
            place.pop(CASCADE, None)


def _answers_to_text(former: dict[str, Any]) -> dict[str, Any]:
    ends = tuple(f", {task}" for task in get_args(Task))
    entries = {key: one for key, one in former["entries"].items() if key.endswith(ends)}
    return {"made_with": former["made_with"], "entries": entries}


class Anew:
    """The cascade of a matrix, as it is made today.

    Args:
        plan: The matrix.
        config: Of any of its rows: which parts, and which clips.
        dtype: Of the arithmetic.
        unfinished: Folder where answers are kept.
    """

    def __init__(self, plan: Plan, config: TrainConfig, *, dtype: str, unfinished: Path) -> None:
        parts = BlspKDConfig(
            config.model.encoder, config.model.language_model, prompt=config.model.prompt
        )
        model = BlspKDForConditionalGeneration.from_parts(parts, dtype=getattr(torch, dtype))
        transcriber, notes = load_cascade(model, None)
        if transcriber is None:
            raise click.ClickException("; ".join(notes))
        self.plan = plan
        self.how = EvalConfig(
            task=plan.evaluate.task,
            max_new_tokens=plan.evaluate.max_new_tokens,
            batch_size=plan.evaluate.batch_size,
        )
        self.listener = Listener(model, load_processor(parts), transcriber)
        self.shared = Shared(
            unfinished, made_with(self.listener, dtype, plan.evaluate.max_new_tokens)
        )
        self.manifests = {name: where for name, where in config.data.eval.items() if where}
        self.nothing: dict[str, Any] | None = None

    def renew(self, run: dict[str, Any]) -> None:
        """Lay the cascade's rows into a result file's contents."""
        for name, one in run["sets"].items():
            self._lay(one, name, self._records(self.manifests[name], one["ids"]), self.how)
        for task, one in run.get("tasks", {}).items():
            where = self.plan.evaluate.extra_tasks[task]
            records = self._records(self.manifests.get(where, where), one["ids"])
            self._lay(one, one["set"], records, dataclasses.replace(self.how, task=task))
        for name, one in run.get("more_clips", {}).items():
            where = self.plan.evaluate.more_clips[name]
            model = self.listener.model
            records = more_records(where, run["sets"][name]["ids"], model.config.prompt)
            _check(len(records) == one["clips"], where)
            heard = self.shared.heard(self.listener, more_name(name), records)
            one["wer"][CASCADE] = word_error_rate(each_word_errors(records, heard))
        if "robustness" in run:
            self._renew_robustness(run["robustness"], run["sets"])

    def _renew_robustness(self, found: dict[str, Any], sets: Mapping[str, Any]) -> None:
        name = found["set"]
        ids = sets[name]["ids"][: found["clips"]]
        records = self._records(self.manifests[name], ids)
        for condition, one in found["conditions"].items():
            self._lay(one, name, records, self.how, None if condition == CLEAN else condition)
        if "no_speech" in found:
            if self.nothing is None:
                self.nothing = self._hear_nothing(next(iter(_clips(found["no_speech"]))))
            found["no_speech"]["rows"][CASCADE] = self.nothing["rows"][CASCADE]
            found["no_speech"]["transcripts"][CASCADE] = self.nothing["transcripts"][CASCADE]

    def _lay(
        self,
        place: dict[str, Any],
        name: str,
        records: Sequence[Record],
        config: EvalConfig,
        condition: str | None = None,
    ) -> None:
        under = None if condition is None else parse_condition(condition)
        rows = self.shared.rows(self.listener, name, records, config, under)
        place["rows"][CASCADE] = score_rows(config.task, records, rows)[CASCADE]
        place[CASCADE] = _each_clip(config.task, records, rows)

    def _hear_nothing(self, count: int) -> dict[str, Any]:
        # the adapter here is untrained: what it makes of the clips is thrown away
        nothing = hear_out_nothing(
            self.listener.model,
            self.listener.processor,
            prompt=self.listener.model.config.prompt,
            count=count,
            transcriber=self.listener.transcriber,
            decoding=Decoding(max_new_tokens=self.how.max_new_tokens),
            batch_size=self.how.batch_size,
        )
        return {**nothing.figures(), "transcripts": nothing.transcripts}

    def _records(self, manifest: str, ids: Sequence[str]) -> list[Record]:
        known = {record.id: record for record in read_manifest(Path(manifest))}
        _check(all(one in known for one in ids), manifest)
        return [known[one] for one in ids]


def _each_clip(task: Task, records: Sequence[Record], rows: Mapping[str, Any]) -> dict[str, Any]:
    each = row_statistics(task, records, rows[CASCADE], rows["text"].answers)
    return {metric: clips.tolist() for metric, clips in each.items()}


def _clips(no_speech: Mapping[str, Any]) -> list[int]:
    return [kind["clips"] for kind in no_speech["rows"]["speech"].values()]


def _check(same: bool, manifest: str) -> None:
    if not same:
        raise click.ClickException(
            f"{manifest} does not hold the clips that the result files were measured on"
        )


if __name__ == "__main__":
    main()
