"""The daily prices that benchmarks of forecasts run on: the built-in ones and, where it is installed, skfolio's."""

from dataclasses import replace

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries, fetch_historical_prices
from mambakit.forecast.sources import open_source
from mambakit.forecast.sources.builtin import BUILTIN_SYMBOLS

SUFFIX = "-SKF"  # AAPL-SKF is skfolio's AAPL
_INDEX = "SP500"  # which is no share


def skfolio_names() -> list[str]:
    """Names of skfolio's shares; none where it is not installed."""
    try:
        return [f"{symbol}{SUFFIX}" for symbol in open_source("skfolio").symbols() or () if symbol != _INDEX]
    except DataError:
        return []


def all_names() -> list[str]:
    """Names of all series there are."""
    return [*BUILTIN_SYMBOLS, *skfolio_names()]


def is_skfolio(name: str) -> bool:
    """Whether a series is one of skfolio's."""
    return name.endswith(SUFFIX)


def read_series(name: str) -> PriceSeries:
    """A series under its name here; raises DataError for one that is not there."""
    symbol = name.removesuffix(SUFFIX)
    series = fetch_historical_prices([symbol], source="skfolio" if is_skfolio(name) else "builtin")[symbol]
    return replace(series, symbol=name)
