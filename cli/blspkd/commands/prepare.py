"""`blspkd prepare`: a speech corpus becomes a checked manifest."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import click

from blspkd.data.manifest import Record
from blspkd.data.prepare import PrepareConfig, PrepareSummary, prepare
from blspkd.data.sources import LAYOUTS, Dropped

_DEFAULTS = PrepareConfig()


@click.command(
    "prepare",
    context_settings={"show_default": True},
    epilog=f"SOURCE is {LAYOUTS}.",
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--min-duration", default=_DEFAULTS.min_duration, help="Seconds.")
@click.option("--max-duration", default=_DEFAULTS.max_duration, help="Seconds.")
@click.option(
    "--case",
    type=click.Choice(["keep", "lower"]),
    default=_DEFAULTS.case,
    help="Case of the transcripts.",
)
@click.option(
    "--punctuation",
    type=click.Choice(("keep", "strip")),
    default=_DEFAULTS.punctuation,
    show_default=True,
    help="What becomes of punctuation in transcripts.",
)
@click.option("--jobs", default=1, type=click.IntRange(1), help="Files decoded at a time.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as json.")
def command(
    source: Path,
    out: Path,
    min_duration: float,
    max_duration: float,
    case: Literal["keep", "lower"],
    punctuation: Literal["keep", "strip"],
    jobs: int,
    force: bool,
    as_json: bool,
) -> None:
    """Check the clips of SOURCE and write those that can be used to the manifest OUT.

    Every clip is decoded. Those left out are counted by reason; a manifest's other columns are
    kept. Nothing is converted: any rate and number of channels will do.
    """
    if out.exists() and not force:
        raise click.ClickException(f"{out}: exists already; --force replaces it")
    config = PrepareConfig(
        min_duration=min_duration, max_duration=max_duration, case=case, punctuation=punctuation
    )
    summary = prepare(source, out, config=config, jobs=jobs, progress=_progress)
    for line in _describe(summary, out):
        click.echo(line, err=True)
    if as_json:
        result = {
            "out": str(out) if summary.kept else None,
            "total": summary.total,
            "kept": summary.kept,
            "hours": round(summary.seconds / 3600, 4),
            "dropped": dict(summary.dropped),
        }
        click.echo(json.dumps(result))
    if not summary.kept:
        raise click.ClickException(f"{source}: none of {summary.total} clips can be used")


def _progress(items: Iterable[Record | Dropped], length: int) -> Iterator[Record | Dropped]:
    if not sys.stderr.isatty():
        yield from items
        return
    with click.progressbar(items, length=length, label="Checking", file=sys.stderr) as bar:
        yield from bar


def _describe(summary: PrepareSummary, out: Path) -> Iterator[str]:
    hours = summary.seconds / 3600
    yield f"kept {summary.kept} of {summary.total} clips, {hours:.2f} h" + (
        f": {out}" if summary.kept else ""
    )
    for reason, count in summary.dropped.most_common():
        yield f"dropped {count}: {reason}, as in {summary.examples[reason]}"
    if summary.capitals:
        yield (
            f"note: {summary.capitals} transcripts are all in capitals, which language models read "
            "poorly; --case lower writes them in lower case"
        )
