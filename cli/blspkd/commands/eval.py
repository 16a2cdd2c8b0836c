"""`blspkd eval`: the answers to speech beside those to text and to a cascade."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from .options import Loading, model_options, prompt_option, stage_progress


@click.command("eval", context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--task",
    type=click.Choice(["asr", "continue", "st", "qa"]),
    required=True,
    help="asr: repeat the sentence. continue: go on in its own words, the paper's task. "
    "st: translate it (column `translation`). qa: answer it.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the report.  [default: MODEL/eval-TASK-MANIFEST]",
)
@click.option("--force", is_flag=True, help="Write into --output even if it is not empty.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many clips.")
@click.option("--batch-size", default=8, type=click.IntRange(1), help="Clips at a time.")
@click.option("--max-new-tokens", default=64, type=click.IntRange(1), help="Length of an answer.")
@prompt_option("The user turn, with {speech} in it; above the records' own messages.")
@click.option(
    "--transcriber",
    metavar="WHISPER",
    help="Whisper model of the cascade.  [default: the model's own encoder's]",
)
@click.option(
    "--condition",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Beside the clips as they are, under noise:DB (white, at that signal-to-noise ratio), "
    "babble:DB (other clips of MANIFEST), telephone (300 to 3,400 Hz), or several joined by +, "
    "for cascade and speech alike. May be repeated.",
)
@click.option(
    "--no-speech",
    default=0,
    type=click.IntRange(0),
    metavar="N",
    help="How often a row makes up words on N clips each of silence and of noise alone.",
)
@click.option("--seed", default=0, help="Of the bootstrap intervals.")
@click.option("--plots", default=4, type=click.IntRange(0), help="How many clips are drawn.")
@click.option(
    "--fail-under",
    multiple=True,
    metavar="METRIC=VALUE",
    help="Exit with 3 if METRIC is worse than VALUE (for WER and KL: above it); such as "
    "same_answer=0.6, cascade/wer=0.1 or token_accuracy=0.5. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json instead of the table.")
@model_options
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    manifest: Path,
    task: Any,
    output: Path | None,
    force: bool,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    prompt: str | None,
    transcriber: str | None,
    conditions: tuple[str, ...],
    no_speech: int,
    seed: int,
    plots: int,
    fail_under: tuple[str, ...],
    as_json: bool,
    loading: Loading,
) -> None:
    """Evaluate MODEL, a run's folder or a checkpoint, on the clips of MANIFEST.

    Three rows: *text* reads the true transcript, *cascade* what Whisper heard, *speech* listens.
    Rates in metrics.json are 0..1, BLEU and chrF 0..100.
    """
    from blspkd.data.manifest import read_manifest
    from blspkd.evaluation.conditions import hear_under, parse_condition
    from blspkd.evaluation.evaluate import load_cascade, select_records
    from blspkd.evaluation.report import figures, meter_lines, table, write_report
    from blspkd.evaluation.robustness import (
        condition_lines,
        evaluate_conditions,
        nothing_lines,
    )
    from blspkd.evaluation.tasks import EvalConfig
    from blspkd.evaluation.thresholds import EXIT_BELOW, parse_threshold, shortfalls
    from blspkd.model.loading import quieten_transformers

    try:
        thresholds = [parse_threshold(pair, task) for pair in fail_under]
        parsed = [parse_condition(text) for text in dict.fromkeys(conditions)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    output = output or model / f"eval-{task}-{manifest.stem}"
    if output.is_dir() and any(output.iterdir()) and not force:
        raise click.ClickException(
            f"{output}: not empty; --force writes into it, --output elsewhere"
        )
    config = EvalConfig(
        task=task,
        prompt=prompt,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        plots=plots,
    )
    quieten_transformers()
    model_config = loading.config(model)
    records = select_records(read_manifest(manifest), config, model_config.prompt)
    for condition in parsed:
        hear_under(condition, records)
    click.echo(f"{len(records)} clips of {manifest}; loading {model}", err=True)
    speech_model, processor = loading.load(model)
    whisper, notes = load_cascade(speech_model, transcriber)
    with stage_progress() as progress:
        robustness = evaluate_conditions(
            speech_model,
            processor,
            records,
            config,
            parsed,
            no_speech=no_speech,
            transcriber=whisper,
            notes=notes,
            progress=progress,
        )
    found = robustness.clean
    write_report(
        output,
        robustness,
        model=speech_model,
        processor=processor,
        model_folder=model,
        manifest=manifest,
        command=shlex.join(["blspkd", *sys.argv[1:]]),
    )
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps(figures(robustness)))
    else:
        click.echo(table(found))
        click.echo()
        click.echo(meter_lines(found.meters))
        for lines in (condition_lines(robustness), nothing_lines(robustness.nothing)):
            if lines:
                click.echo(f"\n{lines}")
    click.echo(f"report: {output / 'report.md'}", err=True)
    missed = shortfalls(thresholds, found)
    for line in missed:
        click.echo(line, err=True)
    if missed:
        ctx.exit(EXIT_BELOW)
