"""Data frames as price series: pandas, polars and pyarrow, in the column spellings of Yahoo, Stooq and Nixtla.

A frame holds one symbol's days, many symbols one below the other (a column names the symbol), or many symbols side by
side (one column of prices each). Columns are known by their names, whatever their case, spaces and brackets:

    date       Date, Datetime, ds, Timestamp, <DATE>, or the index of a pandas frame
    symbol     unique_id, Symbol, Ticker, <TICKER>, Asset, Name
    adjusted   Adj Close, Adjusted Close, adjusted, close_adj
    close      Close, <CLOSE>, y, Close/Last, Price
    volume     Volume, <VOL>

Where both closes are there, the adjusted ones are the prices and the others `closes`; where one is, it is the prices.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries, parse_symbol
from mambakit.forecast.sources import unknown_symbols

# The spellings of each role, the likelier first, as `_plain` leaves them.
ROLES = {
    "date": ("date", "datetime", "ds", "timestamp", "day", "indexlevel0"),
    "symbol": ("uniqueid", "symbol", "ticker", "asset", "name"),
    "adjusted": ("adjclose", "adjustedclose", "adjusted", "closeadj", "closeadjusted"),
    "close": ("close", "y", "closelast", "closingprice", "price", "last"),
    "volume": ("volume", "vol"),
}
EXPECTED = (
    "expected a date (Date, ds), a close (Close, Adj Close, y) and, for many symbols, their names "
    "(unique_id, symbol, ticker)"
)
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}")
_WITH_SLASHES = re.compile(r"(\d{1,2})[/.](\d{1,2})[/.](\d{4})")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
_NO_NUMBER = {"", "-", "n/a", "na", "nan", "null", "none"}


class FrameSource:
    """A data frame as a source of prices; see `read_frame` for its form and for the errors.

    Args:
        frame: of pandas, polars or pyarrow, for one symbol or many.
        symbol: whose prices they are, where no column says so.
    """

    name = "the data frame"

    def __init__(self, frame: Any, symbol: str | None = None) -> None:
        self._series = read_frame(frame, symbol=None if symbol is None else parse_symbol(symbol))

    def symbols(self) -> tuple[str, ...]:
        """All symbols in the frame."""
        return tuple(sorted(self._series))

    def fetch(self, symbols: Sequence[str], days: int | None) -> dict[str, PriceSeries]:
        """The series of each symbol; raises DataError for one that the frame does not have."""
        unknown = [symbol for symbol in symbols if symbol not in self._series]
        if unknown:
            raise unknown_symbols(self.name, unknown, self.symbols())
        whole = {symbol: self._series[symbol] for symbol in symbols}
        return whole if days is None else {symbol: series.last(days) for symbol, series in whole.items()}


def read_frame(frame: Any, *, symbol: str | None = None, origin: str = "the data frame") -> dict[str, PriceSeries]:
    """The series in a frame, by symbol.

    Args:
        frame: an eager data frame of pandas, polars or pyarrow, or anything else that narwhals reads. A pandas frame
            may have its dates in the index, and columns of two levels as `yfinance.download` gives them.
        symbol: whose prices they are, where no column says so; where one does, all others are left out.
        origin: what messages call the frame.

    Days are put in the order of time where the frame has the newest first; any other order stays, for
    `validate_data_quality` to refuse. Missing prices are NaN; volumes are NaN where the frame has none.

    Raises DataError where it is no frame, a column is missing or ambiguous, or holds what is neither date nor number.
    """
    if nw.dependencies.is_pandas_dataframe(frame):
        if frame.columns.nlevels == 2:
            return _read_two_levels(frame, symbol, origin)
        if "date" not in find_roles(map(str, frame.columns), origin) and frame.index.dtype.kind != "i":
            frame = frame.rename_axis(index=str(frame.index.name or "date")).reset_index()
    try:
        table = nw.from_native(frame, eager_only=True)
    except TypeError as error:
        raise DataError(
            f"{origin}: expected a data frame of pandas, polars or pyarrow (a lazy one collected), "
            f"got {type(frame).__name__}"
        ) from error
    return _read_table(table, symbol, origin)


def find_roles(columns: Iterable[str], origin: str) -> dict[str, str]:
    """The column of each role that the names give one for; raises DataError where two are spelt alike."""
    found: dict[str, str] = {}
    plain: dict[str, str] = {}
    for column in columns:
        other = plain.setdefault(_plain(column), column)
        if other != column and _plain(column):
            raise DataError(f"{origin}: columns {other!r} and {column!r} are spelt alike; keep one of them")
    for role, spellings in ROLES.items():
        spelling = next((spelling for spelling in spellings if spelling in plain), None)
        if spelling is not None:
            found[role] = plain[spelling]
    return found


def clean_symbol(text: str, origin: str) -> str:
    """A symbol as a source spells it, aapl.us for one, as mambakit does: AAPL.

    Raises DataError where it is none, such as a column of something else.
    """
    try:
        return parse_symbol(re.sub(r"\.us$", "", text.strip(), flags=re.IGNORECASE))
    except DataError as error:
        raise DataError(f"{origin}: {error}") from error


def _plain(column: str) -> str:
    return re.sub(r"[^a-z0-9]", "", column.lower())


def _read_two_levels(frame: Any, symbol: str | None, origin: str) -> dict[str, PriceSeries]:
    """Columns like (Close, AAPL), or (AAPL, Close)."""
    fields = next((i for i in (0, 1) if "close" in {_plain(str(c)) for c in frame.columns.get_level_values(i)}), None)
    if fields is None:
        raise _unlike(origin, [" ".join(map(str, column)) for column in frame.columns])
    tickers = frame.columns.get_level_values(1 - fields).unique()
    series: dict[str, PriceSeries] = {}
    for ticker in tickers:
        name = clean_symbol(str(ticker), origin)
        if symbol in (None, name):
            series |= read_frame(frame.xs(ticker, axis=1, level=1 - fields), symbol=name, origin=origin)
    return series


def _read_table(table: nw.DataFrame[Any], symbol: str | None, origin: str) -> dict[str, PriceSeries]:
    roles = find_roles(table.columns, origin)
    if "date" not in roles or not len(table):
        raise _unlike(origin, table.columns, rows=len(table))
    dates = _dates(table[roles["date"]], origin)
    if not {"close", "adjusted"} & set(roles):
        return _read_side_by_side(table, roles, dates, symbol, origin)
    columns = {
        role: _numbers(table[column], origin) for role, column in roles.items() if role not in ("date", "symbol")
    }
    if "symbol" not in roles:
        if symbol is None:
            raise DataError(f"{origin}: no column says whose prices these are; add one called symbol, or give symbol=")
        return {symbol: _series(symbol, dates, columns)}
    spelt, places = np.unique(np.array(table[roles["symbol"]].to_list(), dtype=str), return_inverse=True)
    rows: dict[str, list[np.ndarray]] = {}
    for place, name in enumerate(spelt):
        rows.setdefault(clean_symbol(str(name), origin), []).append(np.flatnonzero(places == place))
    return {
        name: _series(name, dates[mine], {role: values[mine] for role, values in columns.items()})
        for name, parts in rows.items()
        if symbol in (None, name)
        for mine in [np.sort(np.concatenate(parts))]
    }


def _read_side_by_side(
    table: nw.DataFrame[Any], roles: Mapping[str, str], dates: np.ndarray, symbol: str | None, origin: str
) -> dict[str, PriceSeries]:
    """A column of prices for each symbol."""
    names = [column for column in table.columns if column != roles["date"] and _plain(column)]
    if roles.keys() != {"date"} or not names or not all(table[column].dtype.is_numeric() for column in names):
        raise _unlike(origin, table.columns)
    symbols = {clean_symbol(column, origin): column for column in names}
    return {
        name: _series(name, dates, {"close": _numbers(table[column], origin)})
        for name, column in symbols.items()
        if symbol in (None, name)
    }


def _series(symbol: str, dates: np.ndarray, columns: Mapping[str, np.ndarray]) -> PriceSeries:
    prices = columns["adjusted"] if "adjusted" in columns else columns["close"]
    closes = columns["close"] if {"adjusted", "close"} <= columns.keys() else None
    volumes = columns.get("volume", np.full(len(prices), np.nan))
    if closes is not None:
        # Shares of the adjusted kind, so that price * volume is what changed hands that day.
        volumes = volumes * np.divide(closes, prices, out=np.full(len(prices), np.nan), where=prices > 0)
    series = PriceSeries(symbol, dates, prices, volumes, closes)
    newest_first = len(dates) > 1 and bool((np.diff(dates.astype(np.int64)) < 0).all())
    return series.take(slice(None, None, -1)) if newest_first else series


def _dates(column: nw.Series[Any], origin: str) -> np.ndarray:
    """Dates (rows,) datetime64[D]: the local day, where they come with a time and a time zone."""
    if column.null_count():
        raise DataError(f"{origin}: {column.null_count()} rows have no date")
    if column.dtype == nw.Datetime:
        return column.dt.replace_time_zone(None).to_numpy().astype("datetime64[D]")
    if column.dtype == nw.Date:
        return column.to_numpy().astype("datetime64[D]")
    return _parse_dates([str(value).strip() for value in column.to_list()], origin)


def _parse_dates(texts: Sequence[str], origin: str) -> np.ndarray:
    """2013-03-01 with or without a time, 20130301, and 03/01/2013 where the series tells the month from the day."""
    first = texts[0]
    if re.fullmatch(r"\d{8}", first):
        texts = [f"{text[:4]}-{text[4:6]}-{text[6:]}" for text in texts]
    elif _WITH_SLASHES.match(first):
        texts = _with_month_first(texts, origin)
    texts = [text[:10].replace("/", "-") for text in texts]
    wrong = next((row for row, text in enumerate(texts) if not _ISO.fullmatch(text)), None)
    if wrong is None:
        try:
            return np.array(texts, dtype="datetime64[D]")
        except ValueError:
            wrong = next(row for row, text in enumerate(texts) if not _is_date(text))
    raise DataError(f"{origin}: row {wrong} has the date {texts[wrong]!r}, expected one like 2013-03-01 or 20130301")


def _is_date(text: str) -> bool:
    try:
        np.datetime64(text, "D")
    except ValueError:
        return False
    return True


def _with_month_first(texts: Sequence[str], origin: str) -> list[str]:
    parts = [match.groups() if (match := _WITH_SLASHES.match(text)) else ("", "", text) for text in texts]
    beyond_months = [any(part[place].isdigit() and int(part[place]) > 12 for part in parts) for place in (0, 1)]
    if beyond_months[0] == beyond_months[1]:
        raise DataError(f"{origin}: in dates like {texts[0]!r} day and month can't be told apart; write 2013-03-01")
    month, day = (1, 0) if beyond_months[0] else (0, 1)
    return [f"{part[2]}-{part[month]:>02}-{part[day]:>02}" for part in parts]


def _numbers(column: nw.Series[Any], origin: str) -> np.ndarray:
    """Numbers (rows,) float64, NaN where there is none; texts may be like $1,309.51, or 27.71M."""
    if column.dtype.is_numeric():
        return np.array(column.cast(nw.Float64).to_numpy(), dtype=np.float64)
    values = np.full(len(column), np.nan)
    for row, value in enumerate(column.to_list()):
        text = "" if value is None else str(value).strip()
        if text.lower() in _NO_NUMBER:
            continue
        plain = re.sub(r"^\$|,(?=\d{3}(\D|$))", "", text)
        unit = _UNITS.get(plain[-1:].upper(), 1.0)
        try:
            values[row] = unit * float(plain if unit == 1.0 else plain[:-1])
        except ValueError:
            raise DataError(f"{origin}: {column.name} is {text!r} in row {row}, expected a number") from None
    return values


def _unlike(origin: str, columns: Sequence[str], rows: int = 1) -> DataError:
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    return DataError(f"{origin}: {EXPECTED}, found {'no row below ' if not rows else ''}the columns {shown or 'none'}")
