"""`blspkd generate`: answer audio files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import Loading, decoding_options, model_options, prompt_option, warn_of_silence

if TYPE_CHECKING:
    from blspkd.model.decoding import Decoding


@click.command("generate", context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("audio", nargs=-1, required=True, type=click.Path(path_type=Path))
@prompt_option("The user turn, with {speech} where the speech goes.  [default: the model's own]")
@decoding_options
@click.option("--batch-size", default=8, type=click.IntRange(1), help="Clips at a time.")
@click.option("--transcript", is_flag=True, help="Say what was heard, too: the nearest tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one json object a clip.")
@model_options
def command(
    model: Path,
    audio: tuple[Path, ...],
    prompt: str | None,
    decoding: Decoding,
    batch_size: int,
    seed: int,
    transcript: bool,
    as_json: bool,
    loading: Loading,
) -> None:
    """Let MODEL, a run's folder or a checkpoint, answer each AUDIO file (wav, flac, ogg, ...).

    Clips last 0.1 to 30 s. Any sampling rate and number of channels will do.
    """
    from blspkd.evaluation.clips import answer_clips, read_clips, transcribe_clips
    from blspkd.model.loading import quieten_transformers

    quieten_transformers()
    config = loading.config(model)
    if transcript and config.adapter_type != "cformer":
        raise ValueError(
            "--transcript needs an adapter that makes one output per text token, and that of "
            f"{model} is {config.adapter_type}: leave it out"
        )
    clips = read_clips(audio, prompt=config.prompt if prompt is None else prompt)
    for clip in clips:
        if clip.silent:
            warn_of_silence(clip.path)
    speech_model, processor = loading.load(model)
    answers = answer_clips(
        speech_model, processor, clips, decoding=decoding, batch_size=batch_size, seed=seed
    )
    heard = (
        transcribe_clips(speech_model, processor, clips, batch_size=batch_size)
        if transcript
        else [None] * len(clips)
    )
    for index, (clip, answer, words) in enumerate(zip(clips, answers, heard, strict=True)):
        if as_json:
            row = {
                "audio": str(clip.path),
                "answer": answer,
                "duration": round(clip.duration, 3),
                "silent": clip.silent,
            }
            if words is not None:
                row["transcript"] = words
            click.echo(json.dumps(row, ensure_ascii=False))
            continue
        if len(clips) > 1:
            click.echo(("\n" if index else "") + f"==> {clip.path} <==")
        if words is not None:
            click.echo(f"heard: {words}" if words else "heard no speech")
        click.echo(answer)
