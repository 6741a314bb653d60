"""Yahoo Finance through yfinance (extra `[live]`): patient, and asked no more than needed.

Every symbol's whole history is fetched at once and kept as a Parquet file for some hours, so that one symbol costs one
request however often, and for however many days, it is asked for. Where Yahoo answers "too many requests", the next
attempt waits twice as long as the last one, give or take a random part, so that many machines don't come back at once.

Nothing is written but the cache: by default `mambakit/yahoo` in the user's cache folder (on Linux ~/.cache), as
`platformdirs` names it. yfinance keeps its cookies and time zones in there too.
"""

import io
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries, PriceWarning
from mambakit.forecast.sources import SourceUnreachable
from mambakit.forecast.sources.frames import read_frame
from mambakit.training.artefacts import write_file

_FETCHED = b"mambakit.fetched"  # metadata of a cached file: when, as seconds since 1970
_FIELDS = ("dates", "prices", "volumes", "closes")
_OFFLINE = (
    "cannot reach Yahoo Finance ({}): connect to the internet, or name a folder of CSV or Parquet files, or builtin, "
    "as the source instead"
)


class YahooSource:
    """Daily prices of Yahoo Finance: closes, adjusted closes and volumes.

    Yahoo's closes are adjusted for splits already, its adjusted closes for dividends as well. A class of shares is
    spelt as mambakit does (BRK.B) or as Yahoo does (BRK-B); exchanges outside the US as Yahoo does (VOD.L, 7203.T).

    Args:
        cache: folder of the cache; see above for the default.
        keep: how long a cached symbol counts as fresh.
        attempts: how often a symbol is tried while Yahoo says that there are too many requests.
        first_pause: seconds before the second attempt, doubled before each one after it.
        progress: show a bar on a terminal while several symbols are fetched.
        sleep: what waits, for tests.

    Raises:
        DataError: yfinance is not installed.
    """

    name = "yahoo"

    def __init__(
        self,
        cache: str | Path | None = None,
        *,
        keep: timedelta = timedelta(hours=12),
        attempts: int = 6,
        first_pause: float = 2.0,
        progress: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if attempts < 1:
            raise DataError(f"attempts must be 1 or more, got {attempts}")
        try:
            import yfinance
        except ImportError as error:
            raise DataError("the source yahoo needs the package yfinance: pip install 'mambakit[live]'") from error
        self.cache = _default_cache() if cache is None else Path(cache).expanduser()
        self._yfinance: ModuleType = yfinance
        self._keep, self._attempts, self._first_pause, self._sleep = keep, attempts, first_pause, sleep
        self._progress = progress

    def symbols(self) -> None:
        """None: Yahoo has more than can be listed."""
        return

    def fetch(self, symbols: Sequence[str], days: int | None) -> dict[str, PriceSeries]:
        """The series of each symbol, from the cache where that is fresh.

        Where Yahoo can't be reached, an older cached series serves, with a warning that says how old it is.

        Raises DataError where Yahoo has no such symbol, SourceUnreachable (a DataError as well) where it gives no
        answer and the cache has none.
        """
        whole = {symbol: self._series(symbol) for symbol in self._one_by_one(symbols)}
        return whole if days is None else {symbol: series.last(days) for symbol, series in whole.items()}

    def _one_by_one(self, symbols: Sequence[str]) -> Iterable[str]:
        if not self._progress or len(symbols) < 2:
            return symbols
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        return track(symbols, "Yahoo Finance", console=console, transient=True, disable=not console.is_terminal)

    def _series(self, symbol: str) -> PriceSeries:
        path = self.cache / f"{symbol}.parquet"
        cached = _read_cached(path)
        if cached is not None and datetime.now(UTC) - cached[0] < self._keep:
            return _as_series(symbol, cached[1])
        try:
            frame = self._download(symbol)
        except SourceUnreachable as error:
            if cached is None:
                raise
            fetched = f"{cached[0]:%Y-%m-%d %H:%M} UTC"
            warnings.warn(f"{symbol}: {error}; using the prices cached on {fetched}", PriceWarning, stacklevel=4)
            return _as_series(symbol, cached[1])
        series = read_frame(frame, symbol=symbol, origin=f"Yahoo's prices of {symbol}")[symbol]
        table = _as_table(series)
        _write_cached(path, table)
        return _as_series(symbol, table)  # the same numbers as from the cache, to the last bit

    def _download(self, symbol: str) -> Any:
        """Yahoo's frame of one symbol, its unfinished day left out."""
        for attempt in range(self._attempts):
            if attempt:
                pause = self._first_pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                busy = f"{symbol}: Yahoo Finance has had too many requests; waiting {pause:.0f} s"
                warnings.warn(busy, PriceWarning, stacklevel=5)
                self._sleep(pause)
            try:
                with self._quiet_yfinance():
                    ticker = self._yfinance.Ticker(_as_yahoo_spells(symbol))
                    frame = ticker.history(period="max", interval="1d", auto_adjust=False, actions=False)
                    closing = _closing_time(ticker)
            except Exception as error:
                kind = {base.__name__ for base in type(error).__mro__}
                status = getattr(getattr(error, "response", None), "status_code", None)
                if "YFRateLimitError" in kind or status == HTTPStatus.TOO_MANY_REQUESTS:
                    continue
                if "YFTickerMissingError" in kind or status == HTTPStatus.NOT_FOUND:
                    break
                if isinstance(error, OSError):  # what both curl_cffi and requests raise
                    raise SourceUnreachable(_OFFLINE.format(type(error).__name__)) from error
                if "YFException" in kind or isinstance(error, ValueError):  # an answer that is none
                    reason = " ".join(str(error).split())
                    raise SourceUnreachable(
                        f"Yahoo Finance does not work at present ({reason}); try again later"
                    ) from error
                raise
            if not len(frame):
                break
            return _finished_days(frame, closing)
        else:
            raise SourceUnreachable(
                f"Yahoo Finance refused {self._attempts} requests (too many from this address); try again later, "
                "or name a folder of CSV or Parquet files as the source instead"
            )
        raise DataError(f"Yahoo Finance has no daily prices of {symbol}; see https://finance.yahoo.com for its symbols")

    @contextmanager
    def _quiet_yfinance(self) -> Iterator[None]:
        """Let yfinance raise what went wrong, rather than print it and return nothing, and write into our cache."""
        self._yfinance.set_tz_cache_location(str(self.cache / "yfinance"))
        debug = self._yfinance.config.debug
        hid, logger = debug.hide_exceptions, logging.getLogger("yfinance")
        level = logger.level
        debug.hide_exceptions = False
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            debug.hide_exceptions = hid
            logger.setLevel(level)


def _default_cache() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("mambakit", appauthor=False) / "yahoo"


def _as_yahoo_spells(symbol: str) -> str:
    """BRK.B as BRK-B; VOD.L and 7203.T stay, as no exchange has A, B or C for its letter."""
    return symbol[:-2] + "-" + symbol[-1] if symbol[-2:] in (".A", ".B", ".C") else symbol


def _closing_time(ticker: Any) -> float | None:
    """When the exchange's current session ends, in seconds since 1970, where Yahoo says so."""
    period = (getattr(ticker, "history_metadata", None) or {}).get("currentTradingPeriod", {})
    end = period.get("regular", {}).get("end") if isinstance(period, dict) else None
    return float(end.timestamp() if isinstance(end, datetime) else end) if end is not None else None


def _finished_days(frame: Any, closing: float | None) -> Any:
    """Without the last row where its day's session has not ended: its close is none yet."""
    if closing is None or time.time() >= closing or frame.index.tz is None:
        return frame
    return frame[:-1] if frame.index[-1].date() == datetime.fromtimestamp(closing, frame.index.tz).date() else frame


def _as_table(series: PriceSeries) -> pa.Table:
    known = np.isfinite(series.prices)  # Yahoo has a row without prices for some days, today's among them
    series = series.take(slice(None, len(known) - int(known[::-1].argmax())))
    return pa.table({field: pa.array(getattr(series, field)) for field in _FIELDS})


def _as_series(symbol: str, table: pa.Table) -> PriceSeries:
    dates, *others = (table[field].to_numpy() for field in _FIELDS)
    return PriceSeries(symbol, dates.astype("datetime64[D]"), *others)


def _read_cached(path: Path) -> tuple[datetime, pa.Table] | None:
    """When it was fetched and what; None where there is nothing to be used."""
    try:
        table = pq.read_table(path)
        return datetime.fromtimestamp(float(table.schema.metadata[_FETCHED]), UTC), table
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None  # absent or damaged: it is fetched again


def _write_cached(path: Path, table: pa.Table) -> None:
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_FETCHED: str(time.time())}), content)
    write_file(path, content.getvalue())
