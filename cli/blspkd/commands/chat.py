"""`blspkd chat`: talk about a recording."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import Loading, decoding_options, model_options

if TYPE_CHECKING:
    from blspkd.evaluation.conversation import Conversation

AUDIO_SUFFIXES = (".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
HELP = (
    "Name an audio file to have it answered, then type what you want to ask about it. Another file "
    "begins anew. Ctrl-D ends."
)


@click.command("chat", context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("audio", required=False, type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    metavar="TEXT",
    help="The user turn around a recording, with {speech}.  [default: the model's own]",
)
@decoding_options
@model_options
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    audio: Path | None,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    num_beams: int,
    seed: int,
    loading: Loading,
) -> None:
    """Talk with MODEL, a run's folder or a checkpoint, about the recording AUDIO.

    Each line of the terminal, or of stdin, is a turn: the name of an audio file, which begins a new
    conversation, or text, which goes on with it. A turn that fails leaves the conversation as it
    was; where stdin is no terminal, the exit code is 1 then.
    """
    import torch

    from blspkd.evaluation.clips import read_clips
    from blspkd.evaluation.conversation import Conversation
    from blspkd.model.decoding import Decoding
    from blspkd.model.loading import quieten_transformers

    decoding = Decoding(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, num_beams=num_beams
    )
    quieten_transformers()
    config = loading.config(model)
    if audio is not None:
        read_clips([audio], prompt=config.prompt if prompt is None else prompt)
    speech_model, processor = loading.load(model)
    torch.manual_seed(seed)
    conversation = Conversation(speech_model, processor, prompt=prompt, decoding=decoding)
    done = [_take_turn(conversation, line) for line in _lines(audio)]
    ctx.exit(0 if all(done) or sys.stdin.isatty() else 1)


def _take_turn(conversation: Conversation, line: str) -> bool:
    """Print what is answered to a line, or why it cannot be; whether it could."""
    path = named_file(line)
    try:
        answer = conversation.say(line) if path is None else conversation.listen(path)
    except ValueError as error:
        click.echo(f"Error: {error}", err=True)
        return False
    if path is not None and conversation.spoken == 0:
        click.echo(f"warning: no speech was heard in {path}", err=True)
    click.echo(answer)
    return True


def named_file(line: str) -> Path | None:
    """The audio file that a line names: one that exists, or one word that ends like one."""
    unquoted = line[1:-1] if len(line) > 1 and line[0] == line[-1] and line[0] in "'\"" else line
    path = Path(unquoted).expanduser()
    with contextlib.suppress(OSError):  # a text may be longer than any file's name
        if path.is_file():
            return path
    named = path.suffix.lower() in AUDIO_SUFFIXES and len(unquoted.split()) == 1
    return path if named else None


def _lines(audio: Path | None) -> Iterator[str]:
    if audio is not None:
        yield str(audio)
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
