"""The `blspkd` command: `blspkd VERB ...`, one module of `blspkd.commands` a verb.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 below `--fail-under`, 130 interrupted. A verb's
module is imported when the verb is called, so that `blspkd --help` needs no torch.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import click

from blspkd import __version__

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130

VERBS = {
    "prepare": "Check a speech corpus and write its manifest.",
    "respond": "Let the LLM write its response to every transcript of a manifest.",
    "train": "Train a speech LLM; without arguments, the built-in tiny recipe.",
    "eval": "Compare a model's answers to speech with text and cascade.",
    "generate": "Answer audio files.",
    "chat": "Talk about a recording.",
    "export": "Write a trained model to a folder for others to use.",
    "info": "Describe a model, a run or this installation.",
}


@dataclass
class Session:
    """What the global options set; reached by a verb as `ctx.obj`.

    Attributes:
        debug: Show tracebacks.
    """

    debug: bool = False


class LazyGroup(click.Group):
    """A group that knows its verbs from a table and imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the verbs in the order in which one meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb's module and return its `command`."""
        if cmd_name not in VERBS:
            return None
        command = import_module(f"blspkd.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs in the help without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="blspkd")
@click.pass_obj
def cli(session: Session, debug: bool) -> None:
    """Teach a text LLM to answer speech the way it answers the transcript (BLSP-KD).

    `blspkd train` alone trains a tiny speech LLM from built-in files in a few minutes.
    """
    session.debug = debug


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Without the program's name; None takes those of this process.

    Returns:
        The exit code. A verb sets it with `ctx.exit(code)`.
    """
    session = Session()
    try:
        code = cli.main(
            args=None if args is None else list(args),
            prog_name="blspkd",
            standalone_mode=False,
            obj=session,
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # click makes it from KeyboardInterrupt
        click.echo("Interrupted.", err=True)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        _report(describe_error(error), session)
        return EXIT_FAILURE
    # the process ends here either way; users see a traceback only if they ask for it
    except Exception as error:
        name = type(error).__name__
        _report(f"{name}: {error} (unexpected; `blspkd --debug ...` shows where)", session)
        return EXIT_FAILURE
    return code if isinstance(code, int) else 0


def describe_error(error: Exception) -> str:
    """Put an error into words for the terminal."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def _report(message: str, session: Session) -> None:
    if session.debug:
        traceback.print_exc(file=sys.stderr)
    click.echo(f"Error: {message}", err=True)


if __name__ == "__main__":
    sys.exit(main())
