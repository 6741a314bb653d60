"""`mambakit forecast models`: what is stored, which version serves, which one is tried beside it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mambakit.forecast.registry import StoredVersion

app = typer.Typer(
    help="List, promote, roll back, delete and verify stored models.",
    no_args_is_help=True,
)

Models = Annotated[Path, typer.Option(help="Folder with the models.")]
Symbol = Annotated[str, typer.Argument(metavar="SYMBOL", help="A symbol with stored models.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="A stored version such as v2.")]
_MAYBE_SYMBOL = typer.Argument(metavar="[SYMBOL]", help="One symbol; all by default.")

_PROMOTE_EXAMPLES = """
The challenger has proved better:

  mambakit forecast models promote AAPL

It was a mistake:

  mambakit forecast models rollback AAPL
"""


@app.command("list")
def list_models(
    symbol: Annotated[str | None, _MAYBE_SYMBOL] = None,
    models: Models = Path("models"),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON list.")] = False,
) -> None:
    """List stored versions, their aliases, data and losses, and whether their files are what was written."""
    from mambakit.forecast.registry import ModelRegistry

    registry = ModelRegistry(models)
    if symbol is not None:
        registry.resolve(symbol)  # no such symbol is an error, not an empty list
    rows = registry.stored(symbol)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif rows:
        _print_table(rows)
    else:
        print(f"no models in {models}; train one with: mambakit forecast train --symbols AAPL --out {models}")


@app.command(epilog=_PROMOTE_EXAMPLES)
def promote(
    symbol: Symbol,
    version: Annotated[str, typer.Argument(metavar="[VERSION]", help="A stored version.")] = "challenger",
    models: Models = Path("models"),
) -> None:
    """Make a version, by default the challenger, the one that serves."""
    from mambakit.forecast.registry import ModelRegistry

    before, now = ModelRegistry(models).promote(symbol, version)
    if before == now:
        print(f"{symbol.upper()}: {now} is production already")
    else:
        print(f"{symbol.upper()}: production is {now}" + (f", it was {before}" if before else ""))


@app.command()
def rollback(symbol: Symbol, models: Models = Path("models")) -> None:
    """Let the version serve that did so before the last promotion."""
    from mambakit.forecast.registry import ModelRegistry

    before, now = ModelRegistry(models).roll_back(symbol)
    print(f"{symbol.upper()}: production is {now} again, it was {before}")


@app.command()
def challenge(
    symbol: Symbol,
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help="The version to try.")] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Let there be no challenger.")] = False,
    models: Models = Path("models"),
) -> None:
    """Choose the version that is tried beside production (see `mambakit forecast ab`)."""
    from mambakit.forecast.registry import ModelRegistry

    if withdraw == (version is not None):
        raise typer.BadParameter("give either a version or --withdraw", param_hint="VERSION")
    registry = ModelRegistry(models)
    registry.challenge(symbol, version)
    if withdraw:
        print(f"{symbol.upper()}: no challenger any more")
    else:
        print(f"{symbol.upper()}: challenger is {registry.aliases(symbol)['challenger']}")


@app.command()
def delete(
    symbol: Symbol,
    version: Version,
    force: Annotated[bool, typer.Option("--force", help="Also a version that is production or challenger.")] = False,
    models: Models = Path("models"),
) -> None:
    """Delete a version; its name is never used again."""
    from mambakit.forecast.registry import ModelRegistry

    production = ModelRegistry(models).delete(symbol, version, even_if_used=force)
    print(f"{symbol.upper()}: {version} is deleted; production is {production or 'the newest version, if any is left'}")


@app.command()
def verify(symbol: Annotated[str | None, _MAYBE_SYMBOL] = None, models: Models = Path("models")) -> None:
    """Check every file against its SHA-256, and every alias; exits with status 1 where something is wrong."""
    from mambakit.forecast.registry import ModelRegistry

    registry = ModelRegistry(models)
    problems = registry.verify(symbol)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    symbols = registry.symbols() if symbol is None else [symbol]
    count = sum(len(registry.versions(each)) for each in symbols)
    print(f"{count} {'version is' if count == 1 else 'versions are'} what was written")


def _print_table(rows: "list[StoredVersion]") -> None:
    from rich import box
    from rich.table import Table

    from mambakit.cli.console import console

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("symbol", "version", "alias", "trained", "data until", "val. loss", "size", "files"):
        table.add_column(column, justify="right" if column in ("val. loss", "size") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.symbol,
            row.version,
            ", ".join(row.aliases),
            row.trained or "?",
            row.data_until or "?",
            "?" if row.validation_loss is None else f"{row.validation_loss:.4f}",
            f"{row.bytes / 1024:.0f} KiB",
            "ok" if row.problem is None else "damaged",
        )
    console().print(table)
    for row in rows:
        if row.problem is not None:
            print(row.problem)
