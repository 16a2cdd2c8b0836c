"""`blspkd export`: a trained model as a folder to give away."""

from __future__ import annotations

from pathlib import Path

import click

from .options import DTYPES, torch_dtype


@click.command("export", context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--encoder", metavar="NAME", help="The encoder's name for those who get the folder.")
@click.option("--language-model", metavar="NAME", help="The language model's name likewise.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="bfloat16", help="Type of the weights in FOLDER."
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="What `blspkd eval` wrote: its figures go into the README; may be given several times.",
)
@click.option("--license", "licence", metavar="ID", help="SPDX identifier for the README's head.")
def command(
    model: Path,
    folder: Path,
    encoder: str | None,
    language_model: str | None,
    dtype: str,
    evaluations: tuple[Path, ...],
    licence: str | None,
) -> None:
    """Write MODEL, a run's folder or a checkpoint, to FOLDER for others to use.

    FOLDER gets config.json, the trained weights and a README that says how to load them. The
    encoder and the language model stay where they are, unless the encoder was trained.
    """
    from blspkd.evaluation.card import model_card
    from blspkd.model.loading import load_config, quieten_transformers
    from blspkd.model.release import export_model

    quieten_transformers()
    config = load_config(model, encoder=encoder, language_model=language_model)
    size = export_model(
        model,
        folder,
        config=config,
        dtype=torch_dtype(dtype),
        card=model_card(config, folder.name, evaluations=evaluations, licence=licence),
    )
    click.echo(f"{folder}: {size / 1e6:.1f} MB")
