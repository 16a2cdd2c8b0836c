"""`blspkd info`: what a model or a manifest is."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("info")
@click.argument("target", metavar="MODEL|MANIFEST", type=click.Path(path_type=Path))
@click.option("--encoder", metavar="PATH", help="Where the speech encoder is now.")
@click.option("--language-model", metavar="PATH", help="Where the language model is now.")
@click.option("--json", "as_json", is_flag=True, help="Print json.")
def command(target: Path, encoder: str | None, language_model: str | None, as_json: bool) -> None:
    """Describe a model (a run's folder or a checkpoint) or a manifest (a jsonl file).

    Of a run it tells what it took to train, and the runs that it went on from.

    Reads no weights: trained parameters are counted in the checkpoint's header, frozen ones from
    the pretrained parts' configurations.
    """
    from blspkd.evaluation.describe import (
        describe_manifest,
        describe_model,
        manifest_text,
        model_text,
    )
    from blspkd.model.loading import quieten_transformers
    from blspkd.training.effort import all_stages, effort_lines

    quieten_transformers()
    if target.is_file():
        found = describe_manifest(target)
        text = manifest_text(found)
    else:
        found = describe_model(target, encoder=encoder, language_model=language_model)
        found["training"] = all_stages(target)
        text = "\n".join([model_text(found), *effort_lines(found["training"])])
    click.echo(json.dumps(found, ensure_ascii=False) if as_json else text)
