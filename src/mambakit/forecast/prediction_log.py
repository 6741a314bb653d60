"""The log of predictions: one SQLite file in which every forecast waits for its outcome.

    forecasts     one row a forecast: who made it, when, from which day, from which inputs
    predictions   one row a forecast and horizon: mean, quantiles and, once it is known, the outcome

A forecast is what one version says of one symbol as of one day. Logging it again adds nothing, so that nothing is
counted twice. Horizons are trading days, counted in the series itself. An outcome is a log return between two prices
of one series: adjusted prices of the past are rescaled by every later split and dividend, so the price that was
current when the forecast was made can't be compared with a price of today.

Many processes may write at once (write-ahead log; each waits for the other), and one that is killed leaves what it had
committed.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.predictor import Forecast
from mambakit.forecast.prices import PriceSeries

if TYPE_CHECKING:
    import pandas as pd

LOG_NAME = "predictions.sqlite"
_SCHEMA_VERSION = 1
_PATIENCE = 30.0  # seconds to wait for another writer
_PAUSE = 0.02
_SCHEMA = (
    """
CREATE TABLE forecasts (
    id INTEGER PRIMARY KEY,
    made_at TEXT NOT NULL,        -- ISO date and time, UTC
    symbol TEXT NOT NULL,
    version TEXT NOT NULL,        -- a stored version, or 'fallback'
    trained_at TEXT NOT NULL,     -- tells two models apart that had one name in two folders; '' for the fallback
    arm TEXT NOT NULL,            -- 'production', 'challenger' or 'fallback'
    shown INTEGER NOT NULL,       -- 1: the user got it, 0: made beside it, to be compared
    replayed INTEGER NOT NULL,    -- 1: made afterwards, from the data of its day
    as_of TEXT NOT NULL,          -- the last day that the forecast saw
    current_price REAL NOT NULL,
    reason TEXT,                  -- why the fallback answered, or what was left out
    volatility REAL,              -- a day, at as_of
    levels TEXT NOT NULL,         -- JSON: of the quantiles
    features TEXT,                -- JSON: the last row of the model's features, before scaling
    UNIQUE (symbol, version, trained_at, as_of)
)
""",
    """
CREATE TABLE predictions (
    forecast INTEGER NOT NULL REFERENCES forecasts (id) ON DELETE CASCADE,
    horizon INTEGER NOT NULL,     -- trading days
    mean REAL NOT NULL,           -- log return
    drift REAL NOT NULL,          -- log return, the training part's mean
    quantiles TEXT NOT NULL,      -- JSON: log returns
    outcome_day TEXT,
    outcome REAL,                 -- log return
    PRIMARY KEY (forecast, horizon)
) WITHOUT ROWID
""",
    "CREATE INDEX waiting ON predictions (forecast) WHERE outcome IS NULL",
)


@dataclass(frozen=True)
class LogEntry:
    """A forecast and how it came about."""

    forecast: Forecast
    trained_at: str = ""
    arm: str = "production"
    shown: bool = True
    replayed: bool = False
    reason: str | None = None
    volatility: float | None = None
    features: np.ndarray | None = None  # (columns,)


class Joined(NamedTuple):
    """What `join_outcomes` found."""

    joined: int  # predictions whose outcome is now known
    waiting: int  # whose day has not come
    unmatched: int  # whose day of forecast is not in the series


@dataclass(frozen=True)
class LoggedForecasts:
    """The forecasts of one version, oldest first; NaN where an outcome is not known yet."""

    as_of: np.ndarray  # (forecasts,) datetime64[D]
    horizons: tuple[int, ...]
    levels: tuple[float, ...]
    mean: np.ndarray  # (forecasts, horizons)
    drift: np.ndarray  # (forecasts, horizons)
    quantiles: np.ndarray  # (forecasts, horizons, levels)
    outcome: np.ndarray  # (forecasts, horizons)
    volatility: np.ndarray  # (forecasts,)
    features: np.ndarray  # (forecasts, columns)

    def __len__(self) -> int:
        return len(self.as_of)


class PredictionLog:
    """The log in one file, made by the first `append`.

    Raises, from every method, ArtefactError where the file can't be read or written, or is not such a log.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, entries: Iterable[LogEntry]) -> int:
        """Write forecasts, all or none of them; return how many were new.

        One that is there already stays as it is, but counts as shown once it was shown.
        """
        made_at = datetime.now(UTC).isoformat(timespec="seconds")
        with self._writing() as connection:
            return sum(_insert(connection, entry, made_at) for entry in entries)

    def join_outcomes(self, series: PriceSeries) -> Joined:
        """Give every waiting prediction of the series' symbol its outcome, where the series reaches that far."""
        days = {str(day): row for row, day in enumerate(series.dates.astype("datetime64[D]"))}
        with np.errstate(invalid="ignore", divide="ignore"):
            logs = np.log(series.prices)
        found, waiting, unmatched = [], 0, 0
        with self._writing(must_exist=True) as connection:
            rows = connection.execute(
                "SELECT forecast, horizon, as_of FROM predictions JOIN forecasts ON forecast = id "
                "WHERE outcome IS NULL AND symbol = ?",
                (series.symbol,),
            )
            for forecast, horizon, as_of in rows.fetchall():
                origin = days.get(as_of)
                if origin is None:
                    unmatched += 1
                elif origin + horizon < len(series) and np.isfinite(logs[origin + horizon] - logs[origin]):
                    outcome = float(logs[origin + horizon] - logs[origin])
                    found.append((str(series.dates[origin + horizon]), outcome, forecast, horizon))
                else:
                    waiting += 1
            connection.executemany(
                "UPDATE predictions SET outcome_day = ?, outcome = ? WHERE forecast = ? AND horizon = ?", found
            )
        return Joined(len(found), waiting, unmatched)

    def forecasts(self, symbol: str, version: str, trained_at: str, last: int | None = None) -> LoggedForecasts:
        """The forecasts of one version, the `last` so many of them; empty where there are none.

        Raises DataError where they differ in horizons or levels, which those of one version never do.
        """
        with self._reading() as connection:
            heads = connection.execute(
                "SELECT id, as_of, levels, volatility, features FROM forecasts "
                "WHERE symbol = ? AND version = ? AND trained_at = ? ORDER BY as_of DESC LIMIT ?",
                (symbol, version, trained_at, -1 if last is None else last),
            ).fetchall()[::-1]
            rows = connection.execute(
                "SELECT forecast, horizon, mean, drift, quantiles, outcome FROM predictions "
                "JOIN forecasts ON forecast = id WHERE symbol = ? AND version = ? AND trained_at = ? "
                "ORDER BY as_of, horizon",
                (symbol, version, trained_at),
            ).fetchall()
        return _stack(heads, rows)

    def frame(self, symbol: str | None = None) -> "pd.DataFrame":
        """The whole log, or one symbol's, as a tidy frame: a row for each forecast and horizon, a column a quantile."""
        import pandas as pd

        with self._reading() as connection:
            columns = (
                "made_at, symbol, version, trained_at, arm, shown, replayed, as_of, current_price, horizon, mean, "
                "drift, volatility, outcome_day, outcome, reason, levels, quantiles"
            )
            rows = connection.execute(
                f"SELECT {columns} FROM predictions JOIN forecasts ON forecast = id "
                "WHERE ?1 IS NULL OR symbol = ?1 ORDER BY as_of, symbol, version, horizon",
                (symbol,),
            ).fetchall()
        frame = pd.DataFrame(rows, columns=columns.split(", "))
        quantiles = [
            dict(zip((f"q{level:g}" for level in json.loads(levels)), json.loads(values), strict=True))
            for levels, values in zip(frame.pop("levels"), frame.pop("quantiles"), strict=True)
        ]
        frame = frame.astype({"shown": bool, "replayed": bool})
        for column in ("made_at", "as_of", "outcome_day"):
            frame[column] = pd.to_datetime(frame[column])
        return pd.concat([frame, pd.DataFrame(quantiles, index=frame.index)], axis=1)

    def export(self, path: str | Path) -> int:
        """Write `frame()` to a .parquet or .csv file; return its number of rows. Raises DataError for another kind."""
        path = Path(path)
        if path.suffix not in (".parquet", ".csv"):
            raise DataError(f"{path}: expected a name that ends in .parquet or .csv")
        frame = self.frame()
        if path.suffix == ".parquet":
            frame.to_parquet(path, index=False)
        else:
            frame.to_csv(path, index=False)
        return len(frame)

    @contextmanager
    def _writing(self, must_exist: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction, committed when the block ends without error."""
        if must_exist:
            self._require_file()
        with self._explained("write"), closing(sqlite3.connect(self.path, _PATIENCE, isolation_level=None)) as opened:
            _use_write_ahead_log(opened)
            opened.execute("PRAGMA foreign_keys = ON")
            opened.execute("BEGIN IMMEDIATE")
            try:
                if self._version_of(opened) == 0:
                    for statement in _SCHEMA:
                        opened.execute(statement)
                    opened.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                yield opened
            except BaseException:
                if opened.in_transaction:  # a full disk may have rolled back already
                    opened.execute("ROLLBACK")
                raise
            opened.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        self._require_file()
        # Where nothing can be written, nobody writes, and SQLite must not look for a lock.
        writable = os.access(self.path.parent, os.W_OK) and os.access(self.path, os.W_OK)
        address = f"{self.path.absolute().as_uri()}?{'mode=rw' if writable else 'immutable=1'}"
        with self._explained("read"), closing(sqlite3.connect(address, _PATIENCE, uri=True)) as opened:
            if self._version_of(opened) == 0:
                raise self._nothing_there()
            yield opened

    def _require_file(self) -> None:
        if not self.path.is_file():
            raise self._nothing_there()

    def _nothing_there(self) -> ArtefactError:
        return ArtefactError(
            f"there are no predictions in {self.path}: they are logged by `mambakit forecast predict`, "
            "or all at once by `mambakit forecast monitor --replay`"
        )

    def _version_of(self, connection: sqlite3.Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version not in (0, _SCHEMA_VERSION) or (version == 0 and tables):
            raise ArtefactError(
                f"{self.path} is not a log of predictions that this version of mambakit can read; "
                "choose another file with --log"
            )
        return version

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            damaged = not isinstance(error, sqlite3.OperationalError)
            way_out = "; move it aside, and the next forecast starts a new one" if damaged else ""
            raise ArtefactError(f"cannot {verb} {self.path}: {error}{way_out}") from error


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Readers then never wait. Of two processes that ask for it at once, one gets an error instead of its turn."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)


def _insert(connection: sqlite3.Connection, entry: LogEntry, made_at: str) -> int:
    """Write one forecast; return 1 if it is new and 0 if not."""
    forecast = entry.forecast
    key = (forecast.symbol, forecast.version, entry.trained_at, str(forecast.as_of))
    known = connection.execute(
        "SELECT id FROM forecasts WHERE symbol = ? AND version = ? AND trained_at = ? AND as_of = ?", key
    ).fetchone()
    if known is not None:
        connection.execute("UPDATE forecasts SET shown = max(shown, ?) WHERE id = ?", (int(entry.shown), known[0]))
        return 0
    cursor = connection.execute(
        "INSERT INTO forecasts (symbol, version, trained_at, as_of, made_at, arm, shown, replayed, current_price, "
        "reason, volatility, levels, features) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *key,
            made_at,
            entry.arm,
            int(entry.shown),
            int(entry.replayed),
            float(forecast.current_price),
            entry.reason,
            entry.volatility,
            json.dumps(list(QUANTILES)),
            None if entry.features is None else _compact(entry.features),
        ),
    )
    connection.executemany(
        "INSERT INTO predictions (forecast, horizon, mean, drift, quantiles) VALUES (?, ?, ?, ?, ?)",
        [
            (cursor.lastrowid, horizon, float(mean), float(drift), _compact(quantiles))
            for horizon, mean, drift, quantiles in zip(
                forecast.horizons, forecast.mean, forecast.drift, forecast.quantiles, strict=True
            )
        ],
    )
    return 1


def _compact(values: np.ndarray) -> str:
    """JSON with 9 digits, as many as a float32 has."""
    return json.dumps([float(f"{value:.9g}") for value in values.tolist()])


def _stack(heads: list[tuple], rows: list[tuple]) -> LoggedForecasts:
    horizons = tuple(sorted({row[1] for row in rows}))
    levels = {head[2] for head in heads} or {"[]"}
    place = {head[0]: row for row, head in enumerate(heads)}
    rows = [row for row in rows if row[0] in place]
    if len(levels) != 1 or len(rows) != len(heads) * len(horizons):
        raise DataError("the logged forecasts of one version differ in horizons or in levels of their quantiles")
    shape = (len(heads), len(horizons))
    named = json.loads(levels.pop())

    def column(position: int) -> np.ndarray:
        return np.array([row[position] for row in rows], dtype=np.float64).reshape(shape)

    features = [json.loads(head[4]) if head[4] else [] for head in heads]
    width = max((len(each) for each in features), default=0)
    return LoggedForecasts(
        as_of=np.array([head[1] for head in heads], dtype="datetime64[D]"),
        horizons=horizons,
        levels=tuple(named),
        mean=column(2),
        drift=column(3),
        quantiles=np.array([json.loads(row[4]) for row in rows]).reshape(*shape, len(named)),
        outcome=column(5),
        volatility=np.array([head[3] for head in heads], dtype=np.float64),
        features=np.array([each or [np.nan] * width for each in features], dtype=np.float64).reshape(len(heads), width),
    )
