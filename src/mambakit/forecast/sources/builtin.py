"""The prices that come with the package: AAPL, GOOG, IBM and MSFT, see `mambakit/forecast/data/README.md`."""

from collections.abc import Sequence
from importlib.resources import as_file, files

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.sources import unknown_symbols

ALIASES = {"GOOGL": "GOOG"}  # a class of shares that did not exist yet within these years
BUILTIN_SYMBOLS = ("AAPL", "GOOG", "IBM", "MSFT")


class BuiltinSource:
    """Reads the packaged file. A series keeps the name that was asked for: GOOGL gives GOOG's prices as GOOGL."""

    name = "builtin"

    def symbols(self) -> tuple[str, ...]:
        """The four symbols and the alias GOOGL."""
        return tuple(sorted((*BUILTIN_SYMBOLS, *ALIASES)))

    def fetch(self, symbols: Sequence[str], days: int | None) -> dict[str, PriceSeries]:
        """The series of each symbol, with raw closes; raises DataError for one that the package does not have."""
        unknown = [name for name in symbols if ALIASES.get(name, name) not in BUILTIN_SYMBOLS]
        if unknown:
            raise unknown_symbols("the built-in prices", unknown, self.symbols())
        whole = {name: _read(name) for name in symbols}
        return whole if days is None else {name: series.last(days) for name, series in whole.items()}


def _read(name: str) -> PriceSeries:
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
    closes = _column(table, "close").astype(np.float64).round(4)  # stored as float32, exact again to four decimals
    dates = _column(table, "date", pa.int32()).astype("datetime64[D]")
    return PriceSeries(name, dates, prices, _column(table, "volume") * closes / prices, closes)


def _column(table: pa.Table, name: str, kind: pa.DataType | None = None) -> np.ndarray:
    column = table[name].combine_chunks()
    # DLPack rather than to_numpy, which would import pandas and a third of a second with it.
    return np.from_dlpack(column if kind is None else column.cast(kind))
