"""The example prices of skfolio, where that is installed: 20 shares of the S&P 500 and the index, 1990 to 2022.

Adjusted closes without volumes, for tests and examples (https://skfolio.org, `skfolio.datasets.load_sp500_dataset`).
The index is SP500. skfolio itself is not imported, which would take seconds: its files are read where they lie.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.sources import unknown_symbols
from mambakit.forecast.sources.folder import read_file

_FILES = ("sp500_dataset.csv.gz", "sp500_index.csv.gz")


class SkfolioSource:
    """Reads the data sets inside the installed package; raises DataError where it is not installed."""

    name = "skfolio"

    def __init__(self) -> None:
        found = find_spec("skfolio")
        if found is None or found.origin is None:
            raise DataError("the source skfolio needs the package skfolio: pip install skfolio")
        self._folder = Path(found.origin).parent / "datasets" / "data"
        missing = [name for name in _FILES if not (self._folder / name).is_file()]
        if missing:
            raise DataError(f"this version of skfolio has no {self._folder / missing[0]}: pip install skfolio==1.12.2")

    def symbols(self) -> tuple[str, ...]:
        """The 20 shares, and SP500 for the index."""
        return tuple(sorted(self._read()))

    def fetch(self, symbols: Sequence[str], days: int | None) -> dict[str, PriceSeries]:
        """The series of each symbol; raises DataError for one that is not among them."""
        every = self._read()
        unknown = [symbol for symbol in symbols if symbol not in every]
        if unknown:
            raise unknown_symbols("skfolio's prices", unknown, sorted(every))
        return {symbol: every[symbol] if days is None else every[symbol].last(days) for symbol in symbols}

    def _read(self) -> dict[str, PriceSeries]:
        shares, index = (read_file(self._folder / name) for name in _FILES)
        return shares | index
