"""`mambakit forecast`: train models of prices, and predict from them.

Everything heavy is imported inside the commands, so that help and predictions come at once.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mambakit.forecast.backtest import Backtest, Progress
    from mambakit.forecast.config import MambaConfig
    from mambakit.forecast.predictor import Forecast
    from mambakit.forecast.prices import PriceSeries
    from mambakit.forecast.registry import ModelRegistry
    from mambakit.forecast.workflow import Outcome
    from mambakit.training import TrainingConfig

TEST_SYMBOLS = ("AAPL", "MSFT", "GOOGL")
_PIPE_WIDTH = 120  # columns of a table where there is no terminal to ask

app = typer.Typer(
    help="Forecast prices 1, 5, 10 and 30 days ahead, with intervals, and beside honest baselines.",
    no_args_is_help=True,
)

_TRAIN_EXAMPLES = """
Three symbols, all defaults:

  mambakit forecast train --test

Symbols of your choice, more briefly:

  mambakit forecast train --symbols AAPL,IBM --epochs 20 --out models

Go on with a training that was killed:

  mambakit forecast train --test --resume
"""

_PREDICT_EXAMPLES = """
From the newest model:

  mambakit forecast predict AAPL

For another program:

  mambakit forecast predict AAPL --json

From a certain version, with a figure:

  mambakit forecast predict AAPL --use v1 --figure fan.png
"""

_BACKTEST_EXAMPLES = """
Five folds of 60 days, everything refitted for each:

  mambakit forecast backtest --symbols AAPL,MSFT --folds 5 --step 60

Only the quick baselines, and intervals that learn from each outcome:

  mambakit forecast backtest --symbols IBM --baselines quick --calibration adaptive

A page of it for the browser:

  mambakit forecast report --run backtests/1 --out report.html
"""

_REPORT_EXAMPLES = """
Of all models in a folder:

  mambakit forecast report --run models --out report.html

Of one version, or of a backtest:

  mambakit forecast report --run models/AAPL/v1 --out aapl.html
"""


@app.command(epilog=_TRAIN_EXAMPLES)
def train(
    test: Annotated[bool, typer.Option("--test", help=f"Train {', '.join(TEST_SYMBOLS)}.")] = False,
    symbols: Annotated[str | None, typer.Option(help="Symbols to train, such as AAPL,IBM.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part, at most.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows behind one step of the optimiser.")] = 32,
    days: Annotated[int | None, typer.Option(min=1, help="Use the last so many days; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("models"),
    d_model: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Mamba blocks.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-4,
    patience: Annotated[int, typer.Option(min=1, help="Stop after so many epochs without progress.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Fixes all randomness.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was killed.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no explanations.")] = False,
) -> None:
    """Train a model for each symbol, and judge it on days that it has not seen.

    Prints each symbol's model beside the forecasters to beat, at every horizon, and says whether it beat them.

    Stores each model as OUT/SYMBOL/v1, v2 and so on, with its figures and a model card.
    """
    if test == (symbols is not None):
        raise typer.BadParameter("give either --test or --symbols AAPL,MSFT", param_hint="--symbols")
    asked = TEST_SYMBOLS if symbols is None else tuple(symbol for symbol in symbols.split(",") if symbol.strip())
    if not asked:
        raise typer.BadParameter("names no symbol; expected a list such as AAPL,MSFT", param_hint="--symbols")
    config, training = _settings(
        {"d_model": d_model, "num_layers": layers},
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "patience": patience,
            "seed": seed,
        },
    )
    started = time.perf_counter()
    from mambakit.forecast.prices import fetch_historical_prices
    from mambakit.forecast.registry import ModelRegistry
    from mambakit.forecast.workflow import prepare_all, train_and_store

    registry = ModelRegistry(out)
    series = list(fetch_historical_prices(asked, days).values())
    prepared = prepare_all(series, config, registry)
    if not quiet:
        for each in series:
            print(_data_line(each, days))
    preparing = time.perf_counter() - started
    outcomes = [train_and_store(each, training, registry, resume=resume, quiet=quiet) for each in prepared]
    _print_outcomes(outcomes, registry, quiet)
    print(
        f"Time: imports and data {preparing:.1f} s, "
        f"training and judging {sum(outcome.training_seconds for outcome in outcomes):.1f} s, "
        f"figures and files {sum(outcome.storing_seconds for outcome in outcomes):.1f} s"
    )


def _settings(model: dict[str, int], training: dict[str, float]) -> "tuple[MambaConfig, TrainingConfig]":
    """Both configurations from options; what only they can judge becomes a usage error that names the option."""
    from pydantic import ValidationError

    from mambakit.forecast.config import FORECAST_TRAINING, MambaConfig
    from mambakit.training import TrainingConfig

    try:
        return (
            MambaConfig.model_validate(model),
            TrainingConfig.model_validate({**FORECAST_TRAINING.model_dump(), **training}),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("num_", "").replace("_", "-")
        raise typer.BadParameter(f"{problem['msg']}, got {problem['input']}", param_hint=option) from error


def _print_outcomes(outcomes: "list[Outcome]", registry: "ModelRegistry", quiet: bool) -> None:
    from mambakit.forecast.report import distribution_verdict, evaluation_table, legend, skill_line, verdict

    console = _console()
    for outcome in outcomes:
        console.print(evaluation_table(outcome.evaluation))
    if not quiet:
        console.print(legend(), soft_wrap=not console.is_terminal)
    for outcome in outcomes:
        state = "already trained, kept" if outcome.reused else "stored"
        print(f"{skill_line(outcome.evaluation)}; {state} as {registry.folder(outcome.symbol) / outcome.version}")
    evaluations = [outcome.evaluation for outcome in outcomes]
    print(verdict(evaluations))
    print(distribution_verdict(evaluations))


@app.command(epilog=_PREDICT_EXAMPLES)
def predict(
    symbol: Annotated[str, typer.Argument(metavar="SYMBOL", help="A symbol with a trained model.")],
    models: Annotated[Path, typer.Option(help="Folder with the models.")] = Path("models"),
    use: Annotated[str, typer.Option(help="A version such as v1, or an alias.")] = "production",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw the fan chart to this PNG.")] = None,
) -> None:
    """Forecast a symbol's price from the last day of its series, with 80% and 95% intervals.

    The first line is a Python literal: {'1d': .., '5d': .., '10d': .., '30d': ..}.

    A price is the current one times exp(mean log return).
    """
    import torch

    torch.set_num_threads(1)  # waking threads, and waiting for them on a busy machine, takes longer than one window
    with _without_pandas():
        from mambakit.forecast.predictor import MambaPredictor
        from mambakit.forecast.prices import fetch_historical_prices, parse_symbol

        symbol = parse_symbol(symbol)
        predictor = MambaPredictor([symbol], models, use)
        saved = predictor.load(symbol)
        series = fetch_historical_prices([symbol])[symbol]
        forecast = predictor.forecast(series)
        from mambakit.forecast.report import skill_line

        skill = skill_line(saved.evaluation)
    if as_json:
        print(json.dumps(_as_json(forecast, skill), indent=2))
    else:
        _print_forecast(forecast, skill)
    if figure is not None:
        from mambakit.forecast.figures import draw_fan

        draw_fan(forecast, series, figure)


@app.command(epilog=_BACKTEST_EXAMPLES)
def backtest(
    symbols: Annotated[str, typer.Option(help="Symbols to backtest, such as AAPL,IBM.")],
    folds: Annotated[int, typer.Option(min=1, help="Test parts, one after the other.")] = 5,
    step: Annotated[int, typer.Option(min=1, help="Trading days in each test part.")] = 60,
    refit_every: Annotated[int, typer.Option(min=1, help="Folds that one training serves.")] = 1,
    window: Annotated[int | None, typer.Option(min=1, help="Learn from the last so many days; all by default.")] = None,
    embargo: Annotated[int, typer.Option(min=0, help="Days dropped between the parts, beside the purge.")] = 0,
    baselines: Annotated[str, typer.Option(help="all, quick, or a list such as 'drift,garch walk'.")] = "all",
    calibration: Annotated[str, typer.Option(help="Of the intervals: none, conformal or adaptive.")] = "conformal",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part, at most.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows behind one step of the optimiser.")] = 32,
    days: Annotated[int | None, typer.Option(min=1, help="Use the last so many days; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for it; else backtests/1, 2 and so on.")] = None,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Mamba blocks.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-4,
    patience: Annotated[int, typer.Option(min=1, help="Stop after so many epochs without progress.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Fixes all randomness.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no explanations.")] = False,
) -> None:
    """Train, forecast, move on: judge a model on every fold of a walk through time, beside the forecasters to beat.

    Prints each symbol's scores, what all symbols say together, and where there is skill and where there is none.

    Stores all predictions as OUT/predictions.parquet, and the rest as OUT/backtest.json.
    """
    if calibration not in ("none", "conformal", "adaptive"):
        raise typer.BadParameter(f"none, conformal or adaptive, got {calibration!r}", param_hint="--calibration")
    asked = tuple(symbol for symbol in symbols.split(",") if symbol.strip())
    if not asked:
        raise typer.BadParameter("names no symbol; expected a list such as AAPL,MSFT", param_hint="--symbols")
    config, training = _settings(
        {"d_model": d_model, "num_layers": layers},
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "patience": patience,
            "seed": seed,
        },
    )
    from mambakit.forecast import backtest as walking
    from mambakit.forecast.baselines import ALL_BASELINES, BASELINES, require_known
    from mambakit.forecast.prices import fetch_historical_prices

    sets = {"all": ALL_BASELINES, "quick": BASELINES}
    wanted = sets.get(baselines) or tuple(name.strip() for name in baselines.split(",") if name.strip())
    require_known(wanted)
    folder = _new_folder(out)
    series = list(fetch_historical_prices(asked, days).values())
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

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("backtest", total=None)
        seen: list[str] = []

        def on_fit(symbol: str, fit: int, fits: int) -> None:
            if symbol not in seen:
                seen.append(symbol)
            before = (len(seen) - 1) * fits + fit - 1
            bar.update(task, total=symbols * fits, completed=before, description=f"{symbol}: fit {fit} of {fits}")
            if not console.is_terminal:
                print(f"{symbol}: fit {fit} of {fits}", file=sys.stderr)

        yield on_fit


def _print_backtest(result: "Backtest", quiet: bool) -> None:
    from mambakit.forecast.report import distribution_verdict, evaluation_table, legend, skill_line, verdict
    from mambakit.forecast.summary import success_criteria
    from mambakit.forecast.tables import criteria_lines, skill_verdict, summary_tables

    console = _console()
    for evaluation in result.evaluations:
        console.print(evaluation_table(evaluation, part="all folds"))
    if not quiet:
        console.print(legend(), soft_wrap=not console.is_terminal)
    for table in summary_tables(result.summary):
        console.print(table, soft_wrap=not console.is_terminal)
    for note in dict.fromkeys(note for evaluation in result.evaluations for note in evaluation.notes):
        print(note)
    for evaluation in result.evaluations:
        print(skill_line(evaluation))
    print(verdict(result.evaluations))
    print(distribution_verdict(result.evaluations))
    print(skill_verdict(result.summary))
    for line in criteria_lines(success_criteria(result.summary)):
        print(line)


@app.command(epilog=_REPORT_EXAMPLES)
def report(
    run: Annotated[Path, typer.Option(help="Models, one symbol's, one version, or a backtest.")] = Path("models"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page: fan charts, calibration, the course of the backtest, every comparison.

    Nothing in it is fetched from anywhere, so it can be sent and opened offline.
    """
    from mambakit.forecast.page import write_page

    write_page(run, out)
    print(f"Wrote {out}")


def _print_forecast(forecast: "Forecast", skill: str) -> None:
    from mambakit.forecast.report import interval_table

    print({horizon: round(price, 2) for horizon, price in forecast.prices().items()})
    _console().print(interval_table(forecast))
    print(f"{forecast.symbol} {forecast.version}, as of {forecast.as_of}, current price {forecast.current_price:.2f}")
    print(skill)


def _as_json(forecast: "Forecast", skill: str) -> dict[str, object]:
    return {
        "symbol": forecast.symbol,
        "version": forecast.version,
        "as_of": str(forecast.as_of),
        "current_price": forecast.current_price,
        "prices": forecast.prices(),
        "intervals": {f"{level:.0%}": forecast.intervals(level) for level in (0.5, 0.8, 0.95)},
        "skill": skill,
    }


def _data_line(series: "PriceSeries", asked: int | None) -> str:
    fewer = f" (fewer than the {asked} asked for)" if asked is not None and len(series) < asked else ""
    return f"{series.symbol}: {len(series)} days{fewer}, {series.dates[0]} to {series.dates[-1]}"


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False)


@contextmanager
def _without_pandas() -> Iterator[None]:
    """Let TA-Lib load without pandas, which it imports only to accept its Series: a third of a second for nothing.

    Afterwards TA-Lib's functions in this process take arrays alone, so this is for the command line, never a library.
    """
    if "pandas" in sys.modules:
        yield
        return
    sys.modules["pandas"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        del sys.modules["pandas"]
