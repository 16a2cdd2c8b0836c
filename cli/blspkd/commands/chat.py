"""`blspkd chat`: talk about a recording."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import Loading, decoding_options, model_options, prompt_option, warn_of_silence

if TYPE_CHECKING:
    from blspkd.evaluation.conversation import Conversation
    from blspkd.model.decoding import Decoding

AUDIO_SUFFIXES = (".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
HELP = (
    "Name an audio file to have it answered, then type what you want to ask about it. Another file "
    "begins anew. Ctrl-D ends."
)


@click.command("chat", context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("audio", required=False, type=click.Path(path_type=Path))
@prompt_option("The user turn around a recording, with {speech}.  [default: the model's own]")
@decoding_options
@model_options
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    audio: Path | None,
    prompt: str | None,
    decoding: Decoding,
    seed: int,
    loading: Loading,
) -> None:
    """Talk with MODEL, a run's folder or a checkpoint, about the recording AUDIO.

    Each line of the terminal, or of stdin, is a turn: the name of an audio file, which begins a new
    conversation, or text, which goes on with it. A single word without an ending is text: such a
    file is named with its folder, as in ./hello. A turn that fails leaves the conversation as it
    was; where stdin is no terminal, the exit code is 1 then.
    """
    import torch

    from blspkd.evaluation.clips import read_clips
    from blspkd.evaluation.conversation import Conversation
    from blspkd.model.loading import quieten_transformers

    quieten_transformers()
    config = loading.config(model)
    if audio is not None:
        read_clips([audio], prompt=config.prompt if prompt is None else prompt)
    speech_model, processor = loading.load(model)
    torch.manual_seed(seed)
    conversation = Conversation(speech_model, processor, prompt=prompt, decoding=decoding)
    done = [_take_turn(conversation, turn) for turn in _turns(audio)]
    ctx.exit(0 if all(done) or sys.stdin.isatty() else 1)


def _take_turn(conversation: Conversation, turn: str | Path) -> bool:
    """Print what is answered to a line or a recording, or why it cannot be; whether it could."""
    try:
        answer = conversation.say(turn) if isinstance(turn, str) else conversation.listen(turn)
    except ValueError as error:
        click.echo(f"Error: {error}", err=True)
        return False
    if isinstance(turn, Path):
        if conversation.silent:
            warn_of_silence(turn)
        elif conversation.spoken == 0:
            click.echo(f"warning: no speech was heard in {turn}", err=True)
    click.echo(answer)
    return True


def named_file(line: str) -> Path | None:
    """The audio file that a line names: one that exists, or one word that ends like one.

    A bare name without an ending is no file's, whatever lies in the folder: "hello" is a turn.
    """
    unquoted = line[1:-1] if len(line) > 1 and line[0] == line[-1] and line[0] in "'\"" else line
    if line == Path(line).name and not Path(line).suffix:
        return None
    path = Path(unquoted).expanduser()
    with contextlib.suppress(OSError):  # a text may be longer than any file's name
        if path.is_file():
            return path
    named = path.suffix.lower() in AUDIO_SUFFIXES and len(unquoted.split()) == 1
    return path if named else None


def _turns(audio: Path | None) -> Iterator[str | Path]:
    if audio is not None:
        yield audio
    for line in _lines():
        yield named_file(line) or line


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit and recall lines, where there is one
    click.echo(HELP, err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo(err=True)
            return
        if line:
            yield line
