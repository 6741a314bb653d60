"""Daily prices: the series that a forecaster reads, and the functions that fetch it from wherever prices are kept.

A series holds adjusted closes, that is, closes from which splits and dividends are removed, so that a log difference
is what a holder earned. `mambakit.forecast.sources` has the places that prices come from.
"""

import asyncio
import hashlib
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mambakit.errors import DataError

if TYPE_CHECKING:
    from mambakit.forecast.sources import PriceSource

# A symbol names a folder later on, so nothing that could leave one gets through.
_SYMBOL = re.compile(r"\^?[A-Z0-9]{1,10}([.-][A-Z0-9]{1,4})?")


class PriceWarning(UserWarning):
    """Prices that can be used, but not quite as they were asked for: days left out, older ones, a long wait."""


@dataclass(frozen=True)
class PriceSeries:
    """Adjusted daily closes of one symbol, oldest first; `numpy.asarray(series)` is its prices."""

    symbol: str
    dates: np.ndarray  # (days,) datetime64[D]
    prices: np.ndarray  # (days,) float64, adjusted closes in the currency of the listing
    volumes: np.ndarray  # (days,) float64, shares a day so that price * volume is the turnover; NaN where unknown
    closes: np.ndarray | None = None  # (days,) float64, closes as traded, where the source has them beside `prices`

    def __post_init__(self) -> None:
        if not len(self.dates) == len(self.prices) == len(self.volumes):
            raise DataError(
                f"{self.symbol}: dates, prices and volumes must have one entry a day, "
                f"got {len(self.dates)}, {len(self.prices)} and {len(self.volumes)}"
            )
        if self.closes is not None and len(self.closes) != len(self.prices):
            raise DataError(
                f"{self.symbol}: closes must have one entry a day, got {len(self.closes)} for {len(self.prices)} days"
            )

    def __len__(self) -> int:
        return len(self.prices)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.prices, dtype=dtype, copy=copy)

    def take(self, rows: np.ndarray | slice) -> "PriceSeries":
        """The series of these rows: a slice, a mask (days,), or positions."""
        closes = None if self.closes is None else self.closes[rows]
        return PriceSeries(self.symbol, self.dates[rows], self.prices[rows], self.volumes[rows], closes)

    def last(self, days: int) -> "PriceSeries":
        """The last `days` days, or the whole series where it has fewer. Raises DataError for less than one day."""
        if days < 1:
            raise DataError(f"days must be 1 or more, got {days}")
        return self.take(slice(-days, None))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of dates, prices and volumes: two series with one fingerprint hold the same numbers."""
        digest = hashlib.sha256()
        digest.update(self.dates.astype("datetime64[D]").astype("<i8").tobytes())
        digest.update(self.prices.astype("<f8").tobytes())
        digest.update(self.volumes.astype("<f8").tobytes())
        return digest.hexdigest()


class HistoricalPrices(dict[str, PriceSeries]):
    """Series by symbol: a plain dict that may also be awaited, which gives the dict itself.

    So `prices = fetch_historical_prices(["AAPL"])` and, in a coroutine, `prices = await fetch_historical_prices(
    ["AAPL"])` are the same. Awaiting does not make the fetch asynchronous: it was done when the call returned.
    `fetch_historical_prices_async` leaves the event loop free meanwhile.
    """

    def __await__(self) -> Generator[None, None, Self]:
        return self
        yield  # what makes this a generator, as awaiting wants one


def parse_symbol(text: str) -> str:
    """Return the symbol in capitals; raises DataError where it is not one, such as a path."""
    symbol = text.strip().upper()
    if not _SYMBOL.fullmatch(symbol):
        raise DataError(f"{text!r} is not a symbol: expected letters and digits such as AAPL or BRK.B")
    return symbol


def fetch_historical_prices(
    symbols: Iterable[str], days: int | None = None, *, source: "PriceSource | str | Path | None" = None
) -> HistoricalPrices:
    """Fetch the series of each symbol, the last `days` days of it where given.

    Args:
        symbols: such as ["AAPL", "BRK.B"], in any case.
        days: trading days, counted from the newest; all of them by default.
        source: a PriceSource, or a text that `open_source` understands: "builtin", "skfolio", "yahoo" or the path of
            a folder or file. The built-in prices by default.

    Returns:
        The series by symbol in capitals, in the order asked for, each once. In a coroutine it may be awaited.

    Raises:
        DataError: a text is no symbol, the source does not have a symbol or can't be read, or days is below 1.
    """
    from mambakit.forecast.sources import open_source

    if isinstance(symbols, str):
        raise DataError(f"symbols must be a list such as [{symbols!r}], got the text {symbols!r}")
    if days is not None and days < 1:
        raise DataError(f"days must be 1 or more, got {days}")
    names = tuple(dict.fromkeys(parse_symbol(symbol) for symbol in symbols))
    source = "builtin" if source is None else source
    fetched = (open_source(source) if isinstance(source, str | Path) else source).fetch(names, days)
    return HistoricalPrices((name, fetched[name]) for name in names)


async def fetch_historical_prices_async(
    symbols: Iterable[str], days: int | None = None, *, source: "PriceSource | str | Path | None" = None
) -> HistoricalPrices:
    """`fetch_historical_prices` in a thread of its own, so that the event loop goes on meanwhile."""
    return await asyncio.to_thread(fetch_historical_prices, symbols, days, source=source)
