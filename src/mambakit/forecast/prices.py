"""Daily prices: the series that a forecaster reads, and the source that comes with the package.

A series holds adjusted closes, that is, closes from which splits and dividends are removed, so that a log difference
is what a holder earned. The built-in source has AAPL, GOOG (also under its newer name GOOGL), IBM and MSFT;
`data/README.md` says where its numbers come from.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import as_file, files

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mambakit.errors import DataError

ALIASES = {"GOOGL": "GOOG"}  # a class of shares that did not exist yet within these years
BUILTIN_SYMBOLS = ("AAPL", "GOOG", "IBM", "MSFT")

# A symbol names a folder later on, so nothing that could leave one gets through.
_SYMBOL = re.compile(r"[A-Z][A-Z0-9]{0,9}([.-][A-Z0-9]{1,4})?")


@dataclass(frozen=True)
class PriceSeries:
    """Adjusted daily closes of one symbol, oldest first."""

    symbol: str
    dates: np.ndarray  # (days,) datetime64[D]
    prices: np.ndarray  # (days,) float64, adjusted closes in the currency of the listing
    volumes: np.ndarray  # (days,) float64, shares a day, adjusted so that price * volume is the day's turnover

    def __post_init__(self) -> None:
        if not len(self.dates) == len(self.prices) == len(self.volumes):
            raise DataError(
                f"{self.symbol}: dates, prices and volumes must have one entry a day, "
                f"got {len(self.dates)}, {len(self.prices)} and {len(self.volumes)}"
            )

    def __len__(self) -> int:
        return len(self.prices)

    def last(self, days: int) -> "PriceSeries":
        """The last `days` days, or the whole series where it has fewer."""
        return PriceSeries(self.symbol, self.dates[-days:], self.prices[-days:], self.volumes[-days:])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of dates, prices and volumes: two series with one fingerprint hold the same numbers."""
        digest = hashlib.sha256()
        digest.update(self.dates.astype("datetime64[D]").astype("<i8").tobytes())
        digest.update(self.prices.astype("<f8").tobytes())
        digest.update(self.volumes.astype("<f8").tobytes())
        return digest.hexdigest()


def parse_symbol(text: str) -> str:
    """Return the symbol in capitals; raises DataError where it is not one, such as a path."""
    symbol = text.strip().upper()
    if not _SYMBOL.fullmatch(symbol):
        raise DataError(f"{text!r} is not a symbol: expected letters and digits such as AAPL or BRK.B")
    return symbol


def fetch_historical_prices(symbols: Iterable[str], days: int | None = None) -> dict[str, PriceSeries]:
    """Read the built-in series of each symbol, the last `days` days of it where given.

    Raises DataError for a symbol that the package does not have. A series keeps the name that was asked for:
    GOOGL gives GOOG's prices under the name GOOGL.
    """
    names = [parse_symbol(symbol) for symbol in symbols]
    unknown = [name for name in names if ALIASES.get(name, name) not in BUILTIN_SYMBOLS]
    if unknown:
        available = ", ".join(sorted((*BUILTIN_SYMBOLS, *ALIASES)))
        raise DataError(f"no built-in prices for {', '.join(unknown)}; there are {available}")
    whole = {name: _read_builtin(name) for name in names}
    return whole if days is None else {name: series.last(days) for name, series in whole.items()}


def _read_builtin(name: str) -> PriceSeries:
    with (
        as_file(files("mambakit.forecast") / "data" / "prices.parquet") as path,
        pq.ParquetFile(path) as file,
    ):
        groups = range(file.metadata.num_row_groups)
        first = [file.metadata.row_group(group).column(0).statistics.min for group in groups]
        table = file.read_row_group(
            first.index(ALIASES.get(name, name)), columns=["date", "close", "volume", "adj_close"]
        )
    prices = _column(table, "adj_close")
    turnover = _column(table, "volume") * _column(table, "close")
    dates = _column(table, "date", pa.int32()).astype("datetime64[D]")
    return PriceSeries(name, dates, prices, turnover / prices)


def _column(table: pa.Table, name: str, kind: pa.DataType | None = None) -> np.ndarray:
    column = table[name].combine_chunks()
    # DLPack rather than to_numpy, which would import pandas and a third of a second with it.
    return np.from_dlpack(column if kind is None else column.cast(kind))
