"""`blspkd respond`: the language model answers the transcripts."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .options import (
    DTYPES,
    device_option,
    prompt_option,
    torch_dtype,
    trust_option,
    warn_of_slow_type,
)


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--language-model", required=True, help="Path or hub id of the causal LM.")
@click.option(
    "--encoder", required=True, help="Path or hub id of the Whisper model it will listen with."
)
@prompt_option("The user turn, with {speech} where the speech goes.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=48, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@device_option
@trust_option
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Answer the first N alone.")
@click.option("--shard", default="0/1", show_default=True, help="I/N: each N-th, from the I-th.")
@click.option("--resume", is_flag=True, help="Go on in an OUT that is there already.")
@click.option("--force", is_flag=True, help="Write an OUT that is there already anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON on stdout.")
def command(
    manifest: Path,
    out: Path,
    language_model: str,
    encoder: str,
    prompt: str | None,
    max_new_tokens: int,
    batch_size: int,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
    limit: int | None,
    shard: str,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Let the language model answer each transcript of MANIFEST, into OUT.

    Lines are only ever appended: an interrupted run goes on with --resume. Several processes share
    the work by --shard, each with an OUT and a --device of its own.
    """
    from blspkd.data.manifest import read_manifest
    from blspkd.data.respond import RespondConfig, respond
    from blspkd.model.bases import load_feature_extractor, load_language_model, load_tokenizer
    from blspkd.model.configuration import DEFAULT_PROMPT
    from blspkd.model.loading import put, quieten_transformers
    from blspkd.model.processing import BlspKDProcessor

    quieten_transformers()
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(f"expected I/N with I < N, got {shard!r}", param_hint="--shard")
    if out.exists() and manifest.exists() and out.samefile(manifest):
        raise ValueError(f"{out}: would overwrite the source; name another file to write")
    if out.exists() and not (resume or force):
        raise ValueError(f"{out} exists: go on in it with --resume, or write it anew with --force")
    records = read_manifest(manifest)[:limit][int(index) :: int(count)]
    if not records:
        raise ValueError(
            f"--shard {shard}: expected a share of the clips, got none of {manifest}'s; "
            "give a smaller N"
        )
    processor = BlspKDProcessor(
        load_feature_extractor(encoder),
        load_tokenizer(language_model, trust_remote_code=trust_remote_code),
    )
    config = RespondConfig(prompt or DEFAULT_PROMPT, max_new_tokens, batch_size)
    processor.tokenize_turn([{"role": "user", "content": config.prompt}], records[0].text)
    warn_of_slow_type(dtype, device)
    model = load_language_model(
        language_model, dtype=torch_dtype(dtype), trust_remote_code=trust_remote_code
    )
    put(model, device)

    def progress(done: int, total: int) -> None:
        click.echo(f"answered {done}/{total}", err=True)

    written = respond(records, out, model, processor, config, anew=force, progress=progress)
    if as_json:
        click.echo(json.dumps({"written": written, "records": len(records)}))
    else:
        click.echo(f"{written} responses written, {len(records)} records in {out}")
