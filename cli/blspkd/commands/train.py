"""`blspkd train`: teach a language model to answer speech."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

TINY = "tiny"


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml] [key=value ...]")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@click.option("--force", is_flag=True, help="Start over in a folder that holds a run.")
@click.option(
    "--overfit", type=click.IntRange(1), metavar="N", help="Train on the first N clips alone."
)
@click.option("--dry-run", is_flag=True, help="Check everything, show one batch, train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout.")
@click.pass_context
def command(
    context: click.Context,
    arguments: tuple[str, ...],
    resume: bool,
    force: bool,
    overfit: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a speech LLM.

    Without a configuration, the built-in recipe `tiny` is run: it needs no network and no GPU.
    KEY=VALUE pairs, such as optim.learning_rate=1e-4, override the configuration.
    """
    from accelerate import PartialState

    from blspkd.model.loading import quieten_transformers
    from blspkd.training.config_file import load_config
    from blspkd.training.dry_run import dry_run as run_dry
    from blspkd.training.report import table
    from blspkd.training.run import train

    quieten_transformers()
    overrides = list(arguments)
    path = Path(__file__).parent.parent / TINY / "recipe.yaml"
    if overrides and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
    config = load_config(path, overrides)

    def say(text: str) -> None:
        click.echo(text, err=True)

    if dry_run:
        click.echo(run_dry(config, say=say))
        return
    result = train(config, resume=resume, force=force, overfit=overfit or 0, say=say)
    if not PartialState().is_main_process:
        return
    if result.interrupted:
        command_line = ["blspkd", "train", *arguments]
        if config.output is None:  # the folder was numbered
            command_line.append(f"output={result.folder}")
        if overfit:
            command_line += ["--overfit", str(overfit)]
        say(f"interrupted; go on with: {shlex.join([*command_line, '--resume'])}")
        context.exit(130)
    if as_json:
        figures = {"folder": str(result.folder), "before": result.before, "after": result.after}
        click.echo(json.dumps(figures))
    else:
        click.echo(table(result.before, result.after))
        click.echo(f"\nThe model is in {result.folder}. Let it answer a recording:\n")
        click.echo(f"    blspkd generate {result.folder} RECORDING.wav")
