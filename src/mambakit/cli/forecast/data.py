"""`mambakit forecast data`: what a source of prices holds."""

from typing import Annotated

import typer

from mambakit.cli.console import console
from mambakit.cli.forecast.options import SYMBOLS_HELP, Days, Source, parsed_symbols, plain_warnings

EXAMPLES = """
What comes with the package:

  mambakit forecast data

A folder of files, before training on it:

  mambakit forecast data --source my/prices
"""


def data(
    symbols: Annotated[str | None, typer.Option(help=SYMBOLS_HELP + " All by default.")] = None,
    source: Source = "builtin",
    days: Days = None,
) -> None:
    """List the symbols of a source with their days, and say whether each is fit to be forecast.

    Exits with status 1 when one is not.
    """
    from mambakit.forecast.overview import look_at
    from mambakit.forecast.sources import open_source

    opened = open_source(source, progress=True)
    asked = opened.symbols() if symbols is None else parsed_symbols(symbols)
    if asked is None:
        raise typer.BadParameter(f"{source} can't list its symbols; name some", param_hint="--symbols")
    with plain_warnings():
        overview = look_at(opened, asked, days)
    console().print(overview.table())
    for line in overview.remarks:
        print(line)
    if not overview.all_fit:
        raise typer.Exit(1)
