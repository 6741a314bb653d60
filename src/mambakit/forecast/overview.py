"""What a source of prices holds, as a table: each symbol's days, and whether they are fit to be forecast."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries, fetch_historical_prices
from mambakit.forecast.quality import validate_data_quality
from mambakit.forecast.sources import PriceSource, SourceUnreachable

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SymbolOverview:
    """One symbol; its series is None where it could not be had, for the reason in `verdict`."""

    symbol: str
    series: PriceSeries | None
    fit: bool
    verdict: str  # "ok", or what is wrong


@dataclass(frozen=True)
class Overview:
    """All symbols that were looked at, and what else there is to say about their source."""

    symbols: tuple[SymbolOverview, ...]
    remarks: tuple[str, ...]  # such as files that hold no prices

    @property
    def all_fit(self) -> bool:
        """Whether there is nothing wrong with any symbol."""
        return all(each.fit for each in self.symbols)

    def table(self) -> "Table":
        """For a terminal."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 1), pad_edge=True)
        table.add_column("symbol", no_wrap=True)
        for heading in ("days", "first", "last", "missing"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("volume", no_wrap=True)
        table.add_column("fit to be forecast")
        for each in self.symbols:
            table.add_row(each.symbol, *_columns(each.series), each.verdict)
        return table


def look_at(source: PriceSource, symbols: Sequence[str], days: int | None = None) -> Overview:
    """Fetch and check the symbols; one that can't be had does not stop the others.

    Raises SourceUnreachable where none can be had at present.
    """
    try:
        fetched: dict[str, PriceSeries] = fetch_historical_prices(symbols, days, source=source)
        looked_at = [_check(symbol, fetched[symbol]) for symbol in symbols]
    except SourceUnreachable:
        raise
    except DataError:
        looked_at = [_fetch_and_check(source, symbol, days) for symbol in symbols]
    unusable = getattr(source, "unusable", {})
    return Overview(tuple(looked_at), tuple(f"not used: {reason}" for reason in unusable.values()))


def _fetch_and_check(source: PriceSource, symbol: str, days: int | None) -> SymbolOverview:
    try:
        return _check(symbol, fetch_historical_prices([symbol], days, source=source)[symbol])
    except DataError as error:
        return SymbolOverview(symbol, None, False, str(error))


def _check(symbol: str, series: PriceSeries) -> SymbolOverview:
    return SymbolOverview(symbol, series, *validate_data_quality(series))


def _columns(series: PriceSeries | None) -> list[str]:
    if series is None or not len(series):
        return ["-"] * 5
    volume = "yes" if np.isfinite(series.volumes).any() else "no"
    missing = np.isnan(series.prices).sum()
    return [str(len(series)), str(series.dates[0]), str(series.dates[-1]), str(missing or "-"), volume]
