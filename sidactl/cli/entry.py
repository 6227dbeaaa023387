"""The sidactl command: its group, its entry, its exit codes. stdout is data, stderr is for people."""

import difflib
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import click
import typer
from click_default_group import DefaultGroup
from typer.core import TyperGroup

from sidactl import __version__, launch
from sidactl.cli import console
from sidactl.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, SidaError


class RefGroup(DefaultGroup, TyperGroup):  # type: ignore[misc]  # click-default-group has no types
    """A group whose default command is `show`, reached only by words that are shaped like an oid or a ref."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.default_cmd_name = "show"

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        is_oid = len(word) >= 4 and all(c in "0123456789abcdef" for c in word)
        if word in self.commands or is_oid or "/" in word:
            resolved: tuple[str | None, click.Command | None, list[str]] = super().resolve_command(ctx, args)
            return resolved
        near = difflib.get_close_matches(word, self.commands, n=1)
        what = "option" if word.startswith("-") else "command"
        raise SidaError(f"No such {what} {word!r}", f"Did you mean {near[0]!r}?" if near else "Try it with --help.")


app = typer.Typer(
    cls=RefGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print_data(__version__)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="show a traceback with an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Distill diffusion models into one-step generators (SiD, SiDA and their rivals), sample them, score them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # accepted anywhere: people append it to the command that just failed
    given = [word for word in given if word != "--debug"]
    console.mend_streams()
    # Training has handlers of its own; everything else ends on SIGTERM as it does on Ctrl-C.
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, handler if callable(handler) else signal.default_int_handler)
    try:
        launch.check()
        code = app(given, standalone_mode=False, prog_name="sidactl") or 0
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # typer had made a mere number of it
    except SidaError as error:
        if debug:
            traceback.print_exc()
        code = console.fail(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = EXIT_USAGE
    except click.NoSuchOption as error:
        near = " or ".join(map(repr, sorted(error.possibilities or [])))
        hint = f"Did you mean {near}?" if near else "Try it with --help."
        code = console.fail(SidaError(f"No such option {error.option_name!r}", hint))
    except click.ClickException as error:
        code = console.fail(SidaError(error.format_message().rstrip("."), "Try it with --help."))
    except (KeyboardInterrupt, click.exceptions.Abort):
        code = console.fail(SidaError("interrupted", "Repeat the same command to go on.", exit_code=EXIT_INTERRUPTED))
    except Exception as error:  # the last resort: a bug of ours, told in one line
        if debug:
            traceback.print_exc()
        code = console.fail(explained(error))
    if code and launch.world_size() > 1 and "torch" in sys.modules:
        from sidactl.engine import ranks

        ranks.abandon(code)
    sys.exit(code)


def explained(error: Exception) -> SidaError:
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError) and frames[-1].startswith("click."):  # in printing --help
        return console.stdout_error(error)
    if "torch" in sys.modules:
        from sidactl.engine.failures import explain_failure

        if plain := explain_failure(error):
            return plain
    message = f"this is a bug in sidactl: {type(error).__name__}: {error}"
    return SidaError(message, "Repeat with --debug and report what it prints.", exit_code=EXIT_FAILED)
