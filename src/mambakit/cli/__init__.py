"""The command line: `mambakit <room> <command>`.

Commands are thin: they read options, call a room and print what it gives. What the user can mend ends as one line on
stderr and exit status 1; a wrong option as a usage message and status 2.
"""

import sys
from typing import Annotated

import typer

from mambakit import __version__
from mambakit.cli import forecast, lab, lm, stream
from mambakit.cli.doctor import doctor
from mambakit.errors import MambakitError

app = typer.Typer(
    name="mambakit",
    help="Selective state-space models that install anywhere: forecasting, streaming and language.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(forecast.app, name="forecast")
app.add_typer(stream.app, name="stream")
app.add_typer(lm.app, name="lm")
app.add_typer(lab.app, name="lab")
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mambakit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before any command."""


def main() -> None:
    """Entry point of the `mambakit` command."""
    try:
        app()
    except (MambakitError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"mambakit: error: {reason}", file=sys.stderr)
        sys.exit(1)
