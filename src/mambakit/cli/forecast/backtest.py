"""`mambakit forecast backtest`: a model judged on a walk through time."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambakit.cli.console import console
from mambakit.cli.forecast.options import (
    SYMBOLS_HELP,
    BatchSize,
    Days,
    DModel,
    Epochs,
    Layers,
    LearningRate,
    Mixer,
    Mode,
    Patience,
    Preset,
    Quiet,
    Seed,
    SettingsFile,
    Source,
    parsed_symbols,
    plain_warnings,
    settings,
)

if TYPE_CHECKING:
    from mambakit.forecast.backtest import Backtest, Progress

EXAMPLES = """
Five folds of 60 days, everything refitted for each:

  mambakit forecast backtest --symbols AAPL,MSFT --folds 5 --step 60

Only the quick baselines, and intervals that learn from each outcome:

  mambakit forecast backtest --symbols IBM --baselines quick --calibration adaptive

A page of it for the browser:

  mambakit forecast report --run backtests/1 --out report.html
"""


def backtest(
    symbols: Annotated[str, typer.Option(help=SYMBOLS_HELP)],
    source: Source = "builtin",
    folds: Annotated[int, typer.Option(min=1, help="Test parts, one after the other.")] = 5,
    step: Annotated[int, typer.Option(min=1, help="Trading days in each test part.")] = 60,
    refit_every: Annotated[int, typer.Option(min=1, help="Folds that one training serves.")] = 1,
    window: Annotated[int | None, typer.Option(min=1, help="Learn from the last so many days; all by default.")] = None,
    embargo: Annotated[int, typer.Option(min=0, help="Days dropped between the parts, beside the purge.")] = 0,
    baselines: Annotated[str, typer.Option(help="all, quick, or a list such as 'drift,garch walk'.")] = "all",
    calibration: Annotated[str, typer.Option(help="Of the intervals: none, conformal or adaptive.")] = "conformal",
    preset: Preset = "default",
    settings_file: SettingsFile = None,
    mixer: Mixer = None,
    mode: Mode = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    days: Days = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for it; else backtests/1, 2 and so on.")] = None,
    d_model: DModel = None,
    layers: Layers = None,
    learning_rate: LearningRate = None,
    patience: Patience = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train, forecast, move on: judge a model on every fold of a walk through time, beside the forecasters to beat.

    Prints each symbol's scores, what all symbols say together, and where there is skill and where there is none.

    Stores all predictions as OUT/predictions.parquet, and the rest as OUT/backtest.json.
    """
    if calibration not in ("none", "conformal", "adaptive"):
        raise typer.BadParameter(f"none, conformal or adaptive, got {calibration!r}", param_hint="--calibration")
    asked = parsed_symbols(symbols)
    config, training = settings(
        preset,
        {"d_model": d_model, "num_layers": layers, "mixer": mixer, "training_mode": mode},
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "patience": patience,
            "seed": seed,
        },
        file=settings_file,
    )
    from mambakit.forecast import backtest as walking
    from mambakit.forecast.baselines import ALL_BASELINES, BASELINES, require_known
    from mambakit.forecast.prices import fetch_historical_prices
    from mambakit.forecast.sources import open_source

    sets = {"all": ALL_BASELINES, "quick": BASELINES}
    wanted = sets.get(baselines) or tuple(name.strip() for name in baselines.split(",") if name.strip())
    require_known(wanted)
    folder = _new_folder(out)
    with plain_warnings():
        series = list(fetch_historical_prices(asked, days, source=open_source(source, progress=not quiet)).values())
    plan = walking.WalkForward(folds=folds, step=step, refit_every=refit_every, window=window, embargo=embargo)
    with _fit_progress(len(series), quiet) as on_fit:
        result = walking.backtest(
            series,
            config,
            training,
            plan,
            baselines=wanted,
            calibration=calibration,  # type: ignore[arg-type]  # one of the three, see above
            on_fit=on_fit,
        )
    result.save(folder)
    _print_backtest(result, quiet)
    print(f"Stored as {folder}; a page of it: mambakit forecast report --run {folder} --out report.html")
    if result.failures:
        for symbol, reason in result.failures.items():
            print(f"{symbol} failed: {reason.removeprefix(f'{symbol}: ')}", file=sys.stderr)
        raise typer.Exit(1)


def _new_folder(out: Path | None) -> Path:
    """The folder asked for, or the next free one; a usage error where it is there already."""
    if out is None:
        return next(path for number in range(1, 10**6) if not (path := Path("backtests") / str(number)).exists())
    if out.exists():
        raise typer.BadParameter(f"{out} is there already: name a new folder", param_hint="--out")
    return out


@contextmanager
def _fit_progress(symbols: int, quiet: bool) -> "Iterator[Progress | None]":
    """Show which symbol and fit is under way, on stderr."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shown = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, disable=not shown.is_terminal, transient=True) as bar:
        task = bar.add_task("backtest", total=None)
        seen: list[str] = []

        def on_fit(symbol: str, fit: int, fits: int) -> None:
            if symbol not in seen:
                seen.append(symbol)
            before = (len(seen) - 1) * fits + fit - 1
            bar.update(task, total=symbols * fits, completed=before, description=f"{symbol}: fit {fit} of {fits}")
            if not shown.is_terminal:
                print(f"{symbol}: fit {fit} of {fits}", file=sys.stderr)

        yield on_fit


def _print_backtest(result: "Backtest", quiet: bool) -> None:
    from mambakit.forecast.report import distribution_verdict, evaluation_table, legend, skill_line, verdict
    from mambakit.forecast.summary import success_criteria
    from mambakit.forecast.tables import criteria_lines, skill_verdict, summary_tables

    terminal = console()
    for evaluation in result.evaluations:
        terminal.print(evaluation_table(evaluation, part="all folds"))
    if not quiet:
        terminal.print(legend(), soft_wrap=not terminal.is_terminal)
    for table in summary_tables(result.summary):
        terminal.print(table, soft_wrap=not terminal.is_terminal)
    for note in dict.fromkeys(note for evaluation in result.evaluations for note in evaluation.notes):
        print(note)
    for evaluation in result.evaluations:
        print(skill_line(evaluation))
    print(verdict(result.evaluations))
    print(distribution_verdict(result.evaluations))
    print(skill_verdict(result.summary))
    for line in criteria_lines(success_criteria(result.summary)):
        print(line)
