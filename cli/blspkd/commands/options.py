"""Options that several verbs share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

    from blspkd.model.configuration import BlspKDConfig
    from blspkd.model.modeling import BlspKDForConditionalGeneration
    from blspkd.model.processing import BlspKDProcessor

Function = TypeVar("Function", bound=Callable[..., Any])
Advance = Callable[[str, int, int], None]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loading:
    """How a trained model is loaded: what `model_options` were given."""

    encoder: str | None
    language_model: str | None
    dtype: str
    device: str | None
    trust_remote_code: bool

    def config(self, model: Path) -> BlspKDConfig:
        """The model's configuration, without its weights."""
        from blspkd.model.loading import load_config

        return load_config(model, encoder=self.encoder, language_model=self.language_model)

    def load(self, model: Path) -> tuple[BlspKDForConditionalGeneration, BlspKDProcessor]:
        """The model and its processor."""
        from blspkd.model.loading import load_model

        warn_of_slow_type(self.dtype, self.device)
        return load_model(
            model,
            encoder=self.encoder,
            language_model=self.language_model,
            dtype=torch_dtype(self.dtype),
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


device_option = click.option(
    "--device", help="Such as cpu or cuda:0; by default a GPU if there is one."
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the language model."
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how a trained model is loaded; they arrive as `loading`."""

    @functools.wraps(function)
    def with_loading(*args: Any, **given: Any) -> Any:
        taken = {field.name: given.pop(field.name) for field in fields(Loading)}
        return function(*args, loading=Loading(**taken), **given)

    options = (
        click.option("--encoder", metavar="PATH", help="Where the speech encoder is now."),
        click.option("--language-model", metavar="PATH", help="Where the language model is now."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="float32",
            show_default=True,
            help="Type of the frozen weights.",
        ),
        device_option,
        trust_option,
    )
    return functools.reduce(lambda inner, add: add(inner), reversed(options), with_loading)


def prompt_option(text: str) -> Callable[[Function], Function]:
    """`--prompt`, a user turn with `{speech}` in it.

    Args:
        text: Its help.
    """
    return click.option("--prompt", metavar="TEXT", callback=_checked_prompt, help=text)


def _checked_prompt(_ctx: click.Context, _param: click.Parameter, prompt: str | None) -> str | None:
    if prompt is None:
        return None
    from blspkd.model.prompts import check_prompt

    try:
        check_prompt(prompt)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return prompt


def warn_of_silence(path: Path) -> None:
    """Say on stderr that a recording holds no sound that could be speech."""
    click.echo(f"warning: {path} is silent; its answer means nothing", err=True)


def decoding_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how words are chosen; they arrive as `decoding` and `seed`."""

    @functools.wraps(function)
    def with_decoding(*args: Any, **given: Any) -> Any:
        from blspkd.model.decoding import Decoding

        taken = {field.name: given.pop(field.name) for field in fields(Decoding)}
        try:
            decoding = Decoding(**taken)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        return function(*args, decoding=decoding, **given)

    options = (
        click.option(
            "--max-new-tokens", default=64, type=click.IntRange(1), help="Length of an answer."
        ),
        click.option("--temperature", default=0.0, type=click.FloatRange(0), help="0 is greedy."),
        click.option(
            "--top-p",
            default=1.0,
            type=click.FloatRange(0, 1, min_open=True),
            help="With --temperature.",
        ),
        click.option(
            "--num-beams", default=1, type=click.IntRange(1), help="Above 1: beam search."
        ),
        click.option("--seed", default=0, help="With --temperature."),
    )
    return functools.reduce(lambda inner, add: add(inner), reversed(options), with_decoding)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of one of `DTYPES`."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def warn_of_slow_type(dtype: str, device: str | None) -> None:
    """Say on stderr that float32 would be faster there, if it would."""
    from blspkd.model.loading import place_of
    from blspkd.model.precision import slow_type_warning

    warning = slow_type_warning(torch_dtype(dtype), place_of(device), remedy="give --dtype float32")
    if warning is not None:
        click.echo(warning, err=True)


@contextmanager
def stage_progress() -> Iterator[Advance | None]:
    """A progress bar for each stage on stderr; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield advance
