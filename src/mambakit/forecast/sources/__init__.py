"""Where prices come from: one file a source, all with the same three members.

builtin     four symbols that come with the package        folder   CSV and Parquet files, in the usual spellings
skfolio     the example prices of an installed skfolio     yahoo    Yahoo Finance, through yfinance, cached on disk
frames      data frames of pandas, polars and pyarrow; what the other files are read with
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries

_LISTED = 10  # symbols that an error names before it counts the rest


@runtime_checkable
class PriceSource(Protocol):
    """A place that prices come from. Anything with these members is one."""

    @property
    def name(self) -> str:
        """What to call it in messages, such as "yahoo" or the path of a folder."""

    def symbols(self) -> tuple[str, ...] | None:
        """The symbols it has, sorted; None where it can't list them."""

    def fetch(self, symbols: Sequence[str], days: int | None) -> dict[str, PriceSeries]:
        """The series of each of these symbols (in capitals), its last `days` days, or all for None.

        Raises DataError where it does not have one of them.
        """


class SourceUnreachable(DataError):
    """A source that does not answer at present, whatever the symbol."""


def open_source(text: str | Path, *, progress: bool = False) -> PriceSource:
    """The source that a text names: "builtin", "skfolio", "yahoo", or the path of a folder or file.

    With `progress`, a source that takes long, Yahoo alone, shows a bar on a terminal.

    Raises DataError where it is none of them, or what it needs is not installed.
    """
    if text == "builtin":
        from mambakit.forecast.sources.builtin import BuiltinSource

        return BuiltinSource()
    if text == "skfolio":
        from mambakit.forecast.sources.skfolio import SkfolioSource

        return SkfolioSource()
    if text == "yahoo":
        from mambakit.forecast.sources.yahoo import YahooSource

        return YahooSource(progress=progress)
    if not Path(text).expanduser().exists():
        raise DataError(
            f"no source of prices {str(text)!r}: expected builtin, skfolio, yahoo, or the path of a folder or file"
        )
    from mambakit.forecast.sources.folder import FolderSource

    return FolderSource(text)


def unknown_symbols(source: str, unknown: Sequence[str], available: Sequence[str]) -> DataError:
    """The error for symbols that a source does not have, naming some that it has."""
    return DataError(f"no prices for {shortened(unknown)} in {source}; there are {shortened(available) or 'none'}")


def shortened(symbols: Sequence[str]) -> str:
    """The symbols as a list in words, the first ten of them where there are more."""
    rest = len(symbols) - _LISTED
    return ", ".join(symbols[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
