"""What was forecast of one symbol, and what came: the record that scores, tests, summaries and figures are made from.

As a table it is long and tidy, one row for each origin, horizon and forecaster, so that other tools can read it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.predictions import Predictions, joined

_QUANTILE_COLUMNS = tuple(f"q{level:g}" for level in QUANTILES)


@dataclass(frozen=True)
class OutOfSample:
    """Every forecaster's predictions for the same samples, oldest first, and the returns that followed.

    None of them was used in any way to make the forecaster that is judged on it.
    """

    symbol: str
    horizons: tuple[int, ...]  # trading days
    dates: np.ndarray  # (samples,) datetime64[D], the origins
    fold: np.ndarray  # (samples,) which fit made the forecast, from 0
    actual: np.ndarray  # (samples, horizons) log returns
    volatility: np.ndarray  # (samples,) a day, known at the origin
    usual_change: np.ndarray  # (samples, horizons) mean |log return| of the training part behind the forecast
    predictions: Mapping[str, Predictions]

    def __post_init__(self) -> None:
        shape = (len(self.dates), len(self.horizons))
        for name, predictions in self.predictions.items():
            if predictions.mean.shape != shape:
                raise DataError(f"{self.symbol}: {name} must predict {shape}, got {predictions.mean.shape}")

    @property
    def scale(self) -> np.ndarray:
        """The origin's volatility carried to each horizon, (samples, horizons)."""
        return self.volatility[:, None] * np.sqrt(self.horizons)

    def with_predictions(self, name: str, predictions: Predictions) -> "OutOfSample":
        """The same record with this forecaster added, or replaced."""
        return replace(self, predictions={**self.predictions, name: predictions})

    def to_table(self) -> pa.Table:
        """Columns symbol, forecaster, fold, origin, horizon, actual, mean, volatility, usual_change, q0.025 and on."""
        samples, horizons, names = len(self.dates), len(self.horizons), list(self.predictions)
        rows = samples * horizons
        common = {
            "fold": np.repeat(self.fold.astype(np.int32), horizons),
            "origin": np.repeat(self.dates.astype("datetime64[D]"), horizons),
            "horizon": np.tile(np.array(self.horizons, dtype=np.int32), samples),
            "actual": self.actual.ravel(),
            "volatility": np.repeat(self.volatility, horizons),
            "usual_change": self.usual_change.ravel(),
        }
        columns: dict[str, pa.Array] = {
            "symbol": pa.array([self.symbol] * (rows * len(names))).dictionary_encode(),
            "forecaster": pa.array(np.repeat(names, rows)).dictionary_encode(),
        }
        columns |= {name: pa.array(np.tile(values, len(names))) for name, values in common.items()}
        columns["mean"] = pa.array(np.concatenate([each.mean.ravel() for each in self.predictions.values()]))
        stacked = np.concatenate([each.quantiles.reshape(rows, -1) for each in self.predictions.values()])
        # Seven digits of a quantile are five more than anyone knows of it, and half the size.
        columns |= {name: pa.array(stacked[:, place], pa.float32()) for place, name in enumerate(_QUANTILE_COLUMNS)}
        return pa.table(columns)


def write_records(path: Path, records: Iterable[OutOfSample]) -> None:
    """All records as one Parquet file; quantiles in single precision."""
    table = pa.concat_tables([record.to_table() for record in records], promote_options="permissive")
    pq.write_table(table, path, compression="zstd")


def read_records(path: Path) -> list[OutOfSample]:
    """The records that `write_records` wrote; raises ArtefactError where the file is not one."""
    try:
        table = pq.read_table(path)
        symbols = table["symbol"].to_numpy()
        whole = {name: table[name].to_numpy() for name in table.column_names}
        order = list(dict.fromkeys(symbols.tolist()))
        return [_from_columns({name: values[symbols == each] for name, values in whole.items()}) for each in order]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise ArtefactError(f"cannot read {path} as predictions: {' '.join(str(error).split())}") from error


def _from_columns(columns: dict[str, np.ndarray]) -> OutOfSample:
    names = list(dict.fromkeys(columns["forecaster"].tolist()))
    first = columns["forecaster"] == names[0]
    horizons = tuple(dict.fromkeys(columns["horizon"][first].tolist()))
    shape = (-1, len(horizons))

    def of(name: str, column: str) -> np.ndarray:
        return columns[column][columns["forecaster"] == name].reshape(shape)

    predictions = {
        name: Predictions(
            of(name, "mean"), np.stack([of(name, column) for column in _QUANTILE_COLUMNS], axis=-1).astype(np.float64)
        )
        for name in names
    }
    return OutOfSample(
        symbol=str(columns["symbol"][0]),
        horizons=horizons,
        dates=of(names[0], "origin")[:, 0].astype("datetime64[D]"),
        fold=of(names[0], "fold")[:, 0],
        actual=of(names[0], "actual"),
        volatility=of(names[0], "volatility")[:, 0],
        usual_change=of(names[0], "usual_change"),
        predictions=predictions,
    )


def stacked(folds: Iterable[OutOfSample]) -> OutOfSample:
    """Consecutive folds of one symbol as one record, with the forecasters that every fold has."""
    parts = list(folds)
    first = parts[0]
    names = [name for name in first.predictions if all(name in part.predictions for part in parts)]

    def whole(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in parts])

    return OutOfSample(
        symbol=first.symbol,
        horizons=first.horizons,
        dates=whole("dates"),
        fold=whole("fold"),
        actual=whole("actual"),
        volatility=whole("volatility"),
        usual_change=whole("usual_change"),
        predictions={name: joined([part.predictions[name] for part in parts]) for name in names},
    )
