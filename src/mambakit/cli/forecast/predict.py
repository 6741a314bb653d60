"""`mambakit forecast predict`: a forecast from the stored model, or where it can't answer from the fallback."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambakit.cli.console import console
from mambakit.cli.forecast.options import Models, Source, plain_warnings

if TYPE_CHECKING:
    from mambakit.forecast.service import ServedForecast

EXAMPLES = """
From the newest model:

  mambakit forecast predict AAPL

For another program:

  mambakit forecast predict AAPL --json

A symbol that the pooled model may not have met:

  mambakit forecast predict GOOG --pooled

From a certain version, with a figure:

  mambakit forecast predict AAPL --use v1 --figure fan.png

With every fifth customer shown the challenger:

  mambakit forecast predict AAPL --ab 0.2 --key customer-17
"""


def predict(
    symbol: Annotated[str, typer.Argument(metavar="SYMBOL", help="A symbol with a trained model.")],
    models: Models = Path("models"),
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Use the pooled model, for any symbol there are prices of.")
    ] = False,
    use: Annotated[str, typer.Option(help="A version such as v1, or an alias.")] = "production",
    source: Source = "builtin",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw the fan chart to this PNG.")] = None,
    log: Annotated[Path | None, typer.Option(help="Log of predictions; MODELS/predictions.sqlite by default.")] = None,
    no_log: Annotated[bool, typer.Option("--no-log", help="Do not log the prediction.")] = False,
    no_fallback: Annotated[bool, typer.Option("--no-fallback", help="Fail where the model can't answer.")] = False,
    max_age_days: Annotated[int, typer.Option(min=0, help="Days that a model may be older than its prices.")] = 365,
    ab: Annotated[float, typer.Option(min=0, max=1, help="Share that is shown the challenger's forecast.")] = 0.0,
    key: Annotated[str | None, typer.Option(help="Who asks, for --ab; symbol and day by default.")] = None,
) -> None:
    """Forecast a symbol's price from the last day of its series, with 80% and 95% intervals.

    The first line is a Python literal: {'1d': .., '5d': .., '10d': .., '30d': ..}.

    A price is the current one times exp(mean log return).

    Where the model is missing, damaged, older than its prices allow or fed bad data, momentum shrunk to the drift
    answers, and a line that begins with "fallback:" says so and why.
    """
    if no_log and log is not None:
        raise typer.BadParameter("give either --log or --no-log", param_hint="--log")
    if key is not None and ab == 0:
        raise typer.BadParameter("chooses between production and challenger: give --ab too", param_hint="--key")
    import torch

    torch.set_num_threads(1)  # waking threads, and waiting for them on a busy machine, takes longer than one window
    # Other sources may read with pandas.
    with _without_pandas() if source == "builtin" else nullcontext(), plain_warnings():
        from mambakit.forecast.fallback import FALLBACK
        from mambakit.forecast.prediction_log import LOG_NAME, PredictionLog
        from mambakit.forecast.prices import fetch_historical_prices, parse_symbol
        from mambakit.forecast.report import skill_line
        from mambakit.forecast.service import ForecastService

        symbol = parse_symbol(symbol)
        path = models / LOG_NAME if log is None and models.is_dir() else log  # no folder is made for a log alone
        service = ForecastService(
            models,
            use=use,
            max_age_days=max_age_days,
            fallback=not no_fallback,
            log=None if no_log or path is None else PredictionLog(path),
            challenger_share=ab,
            pooled=pooled,
        )
        series = fetch_historical_prices([symbol], source=source)[symbol]
        forecast = service.serve(symbol, series, key=key)
        skill = None
        if forecast.source != FALLBACK:
            evaluation = service.load(symbol, forecast.source).evaluation
            met = bool(evaluation.scores)
            skill = skill_line(evaluation) if met else f"{symbol}: not met in training, so nothing was measured of it"
    if as_json:
        print(json.dumps(_as_json(forecast, skill), indent=2))
    else:
        _print_forecast(forecast, skill)
    if forecast.unlogged is not None:
        print(f"mambakit: warning: the prediction is not logged: {forecast.unlogged}", file=sys.stderr)
    if figure is not None:
        from mambakit.forecast.figures import draw_fan

        draw_fan(forecast, series, figure)


def _print_forecast(forecast: "ServedForecast", skill: str | None) -> None:
    from mambakit.forecast.report import interval_table

    print({horizon: round(price, 2) for horizon, price in forecast.prices().items()})
    console().print(interval_table(forecast))
    arm = " (challenger)" if forecast.arm == "challenger" else ""
    print(f"{forecast.symbol} {forecast.source}{arm}, as of {forecast.as_of}, ", end="")
    print(f"current price {forecast.current_price:.2f}")
    if forecast.reason is not None:
        print(f"{'fallback' if skill is None else 'note'}: {forecast.reason}")
    if skill is not None:
        print(skill)


def _as_json(forecast: "ServedForecast", skill: str | None) -> dict[str, object]:
    return {
        "symbol": forecast.symbol,
        "version": forecast.version,
        "source": forecast.source,
        "reason": forecast.reason,
        "arm": forecast.arm,
        "as_of": str(forecast.as_of),
        "current_price": forecast.current_price,
        "prices": forecast.prices(),
        "intervals": {f"{level:.0%}": forecast.intervals(level) for level in (0.5, 0.8, 0.95)},
        "skill": skill,
    }


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
