"""Prices from files: CSV (also as .txt, .tsv and compressed) and Parquet, one of them or a folder with any number.

What a file holds is read from its columns (see `frames`); where no column names the symbol, the file's name does:
AAPL.csv, or aapl.us.txt as Stooq calls it. Folders are searched with all that is below them.
"""

import csv
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.sources import shortened
from mambakit.forecast.sources.frames import EXPECTED, clean_symbol, find_roles, read_frame

SUFFIXES = (".csv", ".txt", ".tsv", ".csv.gz", ".parquet")
_HEAD = 65536  # bytes in which a file's column names must lie
_DELIMITERS = ",;\t"


class FolderSource:
    """Reads the files of a folder, or one file.

    Args:
        path: the folder or the file, ~ allowed.

    Raises DataError where it is not there or holds no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.name = str(path)
        self.unusable: dict[Path, str] = {}  # files that are no prices, and why; filled as files are looked at
        if not self.path.exists():
            raise DataError(f"{path} is not there: expected a folder or file of prices")
        found = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        self._files = [file for file in found if file.name.lower().endswith(SUFFIXES) and file.is_file()]
        if not self._files:
            raise DataError(f"{path}: expected files of prices ({', '.join(SUFFIXES)}), found none")

    def symbols(self) -> tuple[str, ...]:
        """Every symbol in the files; raises DataError where no file holds prices."""
        known = self._index()
        if not known:
            raise DataError(next(iter(self.unusable.values())))
        return tuple(sorted(known))

    def fetch(self, symbols: Sequence[str], days: int | None) -> dict[str, PriceSeries]:
        """The series of each symbol.

        Raises DataError for a symbol that no file has, or several have, and for a file that can't be read.
        """
        known = self._by_name(symbols)
        if len(known) < len(set(symbols)):
            known = self._index() | known
        unknown = [symbol for symbol in symbols if symbol not in known]
        if unknown:
            there = shortened(sorted(known)) or "none"
            but = f"; not used: {next(iter(self.unusable.values()))}" if self.unusable else ""
            raise DataError(f"no prices for {shortened(unknown)} in {self.name}; there are {there}{but}")
        fetched: dict[str, PriceSeries] = {}
        for file in dict.fromkeys(self._only(known, symbol) for symbol in symbols):
            content = read_file(file)
            fetched |= {symbol: content[symbol] for symbol in symbols if known[symbol] == [file]}
        return fetched if days is None else {name: series.last(days) for name, series in fetched.items()}

    def _only(self, known: dict[str, list[Path]], symbol: str) -> Path:
        files = known[symbol]
        if len(files) > 1:
            raise DataError(f"{symbol} is in {files[0]} and in {files[1]}; keep one, or give that file as the source")
        return files[0]

    def _by_name(self, symbols: Sequence[str]) -> dict[str, list[Path]]:
        """The symbols whose files are called after them, without a look into all the others."""
        known: dict[str, list[Path]] = {}
        for file in self._files:
            symbol = _symbol_of_name(file)
            if symbol is not None and symbol in symbols and symbol in self._symbols_in(file):
                known.setdefault(symbol, []).append(file)
        return known

    def _index(self) -> dict[str, list[Path]]:
        known: dict[str, list[Path]] = {}
        for file in self._files:
            for symbol in self._symbols_in(file):
                known.setdefault(symbol, []).append(file)
        return known

    def _symbols_in(self, file: Path) -> set[str]:
        try:
            return _symbols_of(file)
        except DataError as error:
            self.unusable[file] = str(error)
            return set()


def read_file(path: Path) -> dict[str, PriceSeries]:
    """The series in one file, by symbol; raises DataError where it holds none, naming what was expected and found."""
    with _one_line_errors(path):
        if path.suffix.lower() == ".parquet":
            return read_frame(pq.read_table(path), symbol=_default_symbol(path), origin=str(path))
        head = _head(path)
        if head.two_levels:
            return _read_two_levels(path, head)
        table = _read_csv(path, head)
    return read_frame(table, symbol=_default_symbol(path, table.column_names), origin=str(path))


class _Head:
    """The first rows of a text file, its delimiter, and whether its column names take more than one row."""

    def __init__(self, text: str) -> None:
        first = text.split("\n", 1)[0]
        self.delimiter = max(_DELIMITERS, key=first.count)
        self.rows = list(csv.reader(StringIO(text), delimiter=self.delimiter))[:3]

    @property
    def columns(self) -> list[str]:
        names = [column.strip() for column in self.rows[0]] if self.rows else []
        # pandas writes an index without a name so.
        return ["date", *names[1:]] if names and not names[0] and "date" not in find_roles(names, "") else names

    @property
    def two_levels(self) -> bool:
        """yfinance's: fields in one row, symbols in the other, and often a third with nothing but the word Date."""
        if len(self.rows) < 2 or not len(self.rows[1]) == len(self.rows[0]) > 1:
            return False
        corners = self.rows[0][0].strip(), self.rows[1][0].strip()
        return corners[1] in ("Ticker", "Price") or (corners[1] == "" and corners[0] in ("", "Price"))

    @property
    def fields_and_tickers(self) -> tuple[list[str], list[str]]:
        """Of every column but the first, where there are two levels."""
        first, second = ([name.strip() for name in row[1:]] for row in self.rows[:2])
        return (second, first) if "Close" in second else (first, second)

    @property
    def named_index(self) -> bool:
        return len(self.rows) > 2 and self.rows[2][0].strip() in ("Date", "Datetime") and not any(self.rows[2][1:])


def _head(path: Path) -> _Head:
    with path.open("rb") as stream:
        packed = path.suffix.lower() == ".gz"
        content = gzip.GzipFile(fileobj=stream).read(_HEAD) if packed else stream.read(_HEAD)
    # A cut inside the last character is no damage.
    return _Head(content.decode("utf-8-sig", errors="ignore" if len(content) == _HEAD else "strict"))


def _read_csv(path: Path, head: _Head, names: Sequence[str] | None = None, skip: int = 0) -> pa.Table:
    columns = list(names or head.columns)
    roles = find_roles(columns, str(path))
    wanted = list(roles.values()) if {"close", "adjusted"} & roles.keys() else columns
    texts = [roles[role] for role in ("date", "symbol") if role in roles]  # no guess at 20130301, or at a symbol NA
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=columns, skip_rows=skip or 1),
        parse_options=pyarrow.csv.ParseOptions(delimiter=head.delimiter),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(texts, pa.string())
        ),
    )


def _read_two_levels(path: Path, head: _Head) -> dict[str, PriceSeries]:
    fields, tickers = head.fields_and_tickers
    names = ["Date", *(f"{field}|{ticker}" for field, ticker in zip(fields, tickers, strict=True))]
    table = _read_csv(path, head, names, skip=3 if head.named_index else 2)
    series: dict[str, PriceSeries] = {}
    for ticker in dict.fromkeys(tickers):
        mine = {name.split("|")[0]: table[name] for name in names[1:] if name.split("|")[1] == ticker}
        symbol = clean_symbol(ticker, str(path))
        series |= read_frame(pa.table({"Date": table["Date"], **mine}), symbol=symbol, origin=str(path))
    return series


def _symbols_of(path: Path) -> set[str]:
    """The symbols in a file, from as little of it as tells."""
    with _one_line_errors(path):
        if path.suffix.lower() == ".parquet":
            schema = pq.read_schema(path)
            columns, roles = schema.names, find_roles(schema.names, str(path))
            if "symbol" in roles:
                named = pq.read_table(path, columns=[roles["symbol"]])[0].unique().to_pylist()
                return {clean_symbol(str(symbol), str(path)) for symbol in named}
        else:
            head = _head(path)
            if head.two_levels:
                return {clean_symbol(ticker, str(path)) for ticker in head.fields_and_tickers[1]}
            columns, roles = head.columns, find_roles(head.columns, str(path))
            if {"symbol", "date"} <= roles.keys():
                named = _read_csv(path, head)[roles["symbol"]].unique().to_pylist()
                return {clean_symbol(str(symbol), str(path)) for symbol in named}
        if "date" not in roles:
            raise DataError(f"{path}: {EXPECTED}, found the columns {shortened(columns) or 'none'}")
        if {"close", "adjusted"} & roles.keys():
            return {_require_symbol(path)}
        return {clean_symbol(column, str(path)) for column in columns if column and column != roles["date"]}


def _symbol_of_name(path: Path) -> str | None:
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    try:
        return clean_symbol(name, str(path))
    except DataError:
        return None


def _require_symbol(path: Path) -> str:
    symbol = _symbol_of_name(path)
    if symbol is None:
        raise DataError(f"{path}: no column names the symbol, and the file's name is none; expected one like AAPL.csv")
    return symbol


def _default_symbol(path: Path, columns: Sequence[str] | None = None) -> str | None:
    """The symbol for a file whose columns name none."""
    columns = pq.read_schema(path).names if columns is None else columns
    roles = find_roles(columns, str(path))
    return None if "symbol" in roles or not {"close", "adjusted"} & roles.keys() else _require_symbol(path)


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: expected prices as CSV or Parquet, but it can't be read ({reason})") from error
