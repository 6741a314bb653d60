"""Long frames, pandas' or polars': reading unique_id, ds, y and covariates into arrays, steps ahead, and back."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import narwhals as nw
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mambakit.errors import DataError

Freq = str | int
_KEYS = ("unique_id", "ds", "y")


@dataclass(frozen=True)
class LongFrame:
    """The columns of a long frame, sorted by series and step."""

    unique_id: np.ndarray  # (rows,)
    ds: np.ndarray  # (rows,) datetime64 or whole numbers
    y: np.ndarray  # (rows,) float64
    covariates: Mapping[str, np.ndarray]  # (rows,) each
    backend: Any  # what the frame was made by, for those that go out

    def series(self) -> Iterator[tuple[Any, slice]]:
        """Name and rows of each series, in order."""
        starts = np.flatnonzero(np.concatenate([[True], self.unique_id[1:] != self.unique_id[:-1]]))
        for start, stop in zip(starts, [*starts[1:], len(self.y)], strict=True):
            yield self.unique_id[start], slice(int(start), int(stop))

    def covariates_of(self, rows: slice) -> dict[str, np.ndarray]:
        """The covariates of some rows."""
        return {name: values[rows] for name, values in self.covariates.items()}

    def without_last(self, steps: int) -> "LongFrame":
        """Every series without its last steps; raises DataError where one has no more than these."""
        kept = []
        for name, rows in self.series():
            if rows.stop - rows.start <= steps:
                raise DataError(f"{name}: {rows.stop - rows.start} steps are too few to leave out the last {steps}")
            kept.append(np.arange(rows.start, rows.stop - steps))
        chosen = np.concatenate(kept)
        return replace(
            self,
            unique_id=self.unique_id[chosen],
            ds=self.ds[chosen],
            y=self.y[chosen],
            covariates={name: values[chosen] for name, values in self.covariates.items()},
        )

    @staticmethod
    def plain(name: Any) -> str | int:
        """A name as JSON can hold it."""
        return int(name) if isinstance(name, int | np.integer) else str(name)

    def write(self, path: Path) -> None:
        """Write the columns as a Parquet file."""
        columns = {"unique_id": self.unique_id.tolist(), "ds": self.ds, "y": self.y, **self.covariates}
        pq.write_table(pa.table(columns), path)

    @classmethod
    def read(cls, path: Path, covariates: Sequence[str]) -> "LongFrame":
        """What `write` wrote."""
        return read_frame(pq.read_table(path).to_pandas(), covariates)


def read_frame(df: Any, covariates: Sequence[str]) -> LongFrame:
    """Read a long frame with unique_id, ds, y and exactly these covariates.

    Raises DataError for another kind of object, missing or further columns, missing or infinite numbers, and steps that
    come twice.
    """
    try:
        frame = nw.from_native(df, eager_only=True)
    except TypeError as error:
        raise DataError(f"df must be a frame of pandas or polars, got {type(df).__name__}") from error
    wanted = [*_KEYS, *covariates]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise DataError(f"df lacks the column {missing[0]}; expected {', '.join(wanted)}")
    further = [name for name in frame.columns if name not in wanted]
    if further:
        raise DataError(f"df has the column {further[0]}, which is not read; name it in covariates, or leave it out")
    if not len(frame):
        raise DataError("df is empty: expected at least one series")
    frame = frame.sort("unique_id", "ds")
    numbers = {}
    for name in wanted[2:]:
        try:
            values = frame[name].cast(nw.Float64).to_numpy()
        except Exception as error:  # each backend has errors of its own
            raise DataError(f"the column {name} must hold numbers") from error
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise DataError(f"the column {name} must be finite, {frame['unique_id'][row]} is not at {frame['ds'][row]}")
        numbers[name] = np.asarray(values, dtype=np.float64)
    names, ds = _names(frame["unique_id"]), _steps(frame["ds"])
    twice = (names[1:] == names[:-1]) & (ds[1:] == ds[:-1])
    if twice.any():
        row = int(twice.argmax())
        raise DataError(f"{names[row]} has {ds[row]} twice")
    y = numbers.pop("y")
    return LongFrame(names, ds, y, numbers, frame.implementation)


def _names(column: nw.Series) -> np.ndarray:
    values = column.to_list()
    if any(value is None for value in values):
        raise DataError("unique_id must be given in every row")
    return np.asarray(values)


def _steps(column: nw.Series) -> np.ndarray:
    values = column.to_numpy()
    if values.dtype == object:  # dates of Python
        values = np.asarray(values, dtype="datetime64[D]")
    if np.issubdtype(values.dtype, np.datetime64):
        if np.isnat(values).any():
            raise DataError("ds must be given in every row")
        return values
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"ds must hold dates, times or whole numbers, got {column.dtype}")
    return values


def future_steps(ds: np.ndarray, freq: Freq | None, steps: int, name: Any) -> np.ndarray:
    """The steps (steps,) after the last of ds; raises DataError where freq does not fit, or can't be inferred."""
    if np.issubdtype(ds.dtype, np.integer):
        if isinstance(freq, str):
            raise DataError(f"freq must be a whole number where ds are numbers, got {freq!r}")
        return ds[-1] + np.arange(1, steps + 1) * (1 if freq is None else freq)
    if isinstance(freq, int):
        raise DataError(f"freq must be an offset such as 'B' or 'D' where ds are dates, got {freq}")
    import pandas as pd

    known = pd.DatetimeIndex(ds)
    with warnings.catch_warnings():
        # Later versions of pandas answer with an offset instead of its name; date_range takes either.
        warnings.filterwarnings("ignore", message=".*BaseOffset")
        offset = freq or pd.infer_freq(known) or _business_days(known)
    if offset is None:
        raise DataError(f"{name}: the steps of ds are not regular; say what they are with freq, such as 'B' or 'D'")
    try:
        ahead = pd.date_range(known[-1], periods=steps + 1, freq=offset)
    except ValueError as error:
        raise DataError(f"freq must be a pandas offset such as 'B', 'D' or 'MS', got {freq!r}") from error
    # A last step that is off the grid, such as a Saturday with 'B', is not its first point.
    return np.asarray(ahead[ahead > known[-1]][:steps] if len(ahead) else ahead, dtype=ds.dtype)


def _business_days(known: Any) -> str | None:
    """'B' where no step is on a weekend, and most follow the last business day: a calendar with holidays."""
    days = known.values.astype("datetime64[D]")
    gaps = np.busday_count(days[:-1], days[1:])
    regular = (known.day_of_week < 5).all() and (known == known.normalize()).all()
    return "B" if regular and len(gaps) and np.median(gaps) == 1 and (gaps >= 1).all() else None


def build_frame(
    columns: Mapping[str, list[np.ndarray]], like: LongFrame, order: Sequence[str] = ("unique_id", "ds")
) -> Any:
    """A frame of the kind that `like` came from, sorted."""
    arrays = {name: np.concatenate(blocks) for name, blocks in columns.items()}
    frame = nw.from_dict({name: _plain(values) for name, values in arrays.items()}, backend=like.backend)
    return frame.sort(*order).to_native()


def _plain(values: np.ndarray) -> Any:
    return values.tolist() if values.dtype.kind in "US" else values
