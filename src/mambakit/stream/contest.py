"""The contest's interface and its scorer: what a solution is called with, what it must return, how it is judged.

Rows come one at a time in the order of the file. A solution returns None, or where the row asks for a prediction a
vector; that is compared with the state of the next row (edition 1), or with target columns of the same row (edition
2). Traps that the interface keeps on purpose: a state is a vector of Python objects, since it comes from a table of
mixed types, and rows that ask for nothing must still move the solution's state on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from mambakit.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Metric = Literal["r2", "pearson"]
METRIC_NAMES: dict[Metric, str] = {"r2": "R2", "pearson": "weighted Pearson"}
FIRST_COLUMNS = ("seq_ix", "step_in_seq", "need_prediction")
PEARSON_CLIP = 6.0  # predictions beyond are cut to it
_ROWS_AT_ONCE = 20_000  # as Python objects a row takes a kilobyte


@dataclass
class DataPoint:
    """One row: which sequence, which step of it, whether a prediction is asked for, and the state (features,)."""

    seq_ix: int
    step_in_seq: int
    need_prediction: bool
    state: np.ndarray


class Solution(Protocol):
    """What the scorer calls: a contestant's `PredictionModel`, or this package's."""

    def predict(self, data_point: DataPoint, /) -> np.ndarray | None: ...


class Scorer:
    """Scores a solution as the contest does.

    Args:
        dataset: a parquet file in the contest's format, or such a table.
        targets: columns to predict on the row itself, which the state then lacks; none: the next row's state.
        metric: "r2", or "pearson" weighted by |target|; the mean over the targets.

    Raises:
        DataError: the table is not one; see `mambakit.stream.data.check_table`.

    >>> Scorer("valid.parquet").score(PredictionModel("stream-model"))["mean_r2"]  # doctest: +SKIP
    """

    def __init__(
        self, dataset: "str | Path | pd.DataFrame", targets: Sequence[str] = (), metric: Metric = "r2"
    ) -> None:
        from mambakit.stream.data import check_table, read_table

        if metric not in ("r2", "pearson"):
            raise DataError(f"metric must be 'r2' or 'pearson', got {metric!r}")
        self.metric: Metric = metric
        self.table = read_table(dataset) if isinstance(dataset, str | Path) else dataset
        self.layout = check_table(self.table, targets, str(dataset) if isinstance(dataset, str | Path) else "the table")

    def score(self, model: Solution, on_row: Callable[[], None] | None = None) -> dict[str, float]:
        """The metric of each target by name, and their mean as "mean_r2" or "mean_pearson".

        Raises DataError where a prediction is missing, was not asked for, has a wrong length or is not finite.
        """
        truth, predictions = self.collect(model, on_row)
        return target_scores(truth, predictions, self.layout.targets, self.metric)

    def collect(self, model: Solution, on_row: Callable[[], None] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Run the solution over every row: truth and predictions, both (scored rows, targets) float64."""
        truth: list[np.ndarray] = []
        predictions: list[np.ndarray] = []
        pending = False  # a prediction that waits for the next row's state
        same_row = self.layout.same_row
        for point, targets in self._rows():
            if pending:
                truth.append(point.state.astype(np.float64))
            prediction = _checked(point, model.predict(point), len(self.layout.targets))
            pending = prediction is not None and not same_row
            if prediction is not None:
                predictions.append(prediction)
                if same_row:
                    truth.append(targets.astype(np.float64))
            if on_row is not None:
                on_row()
        if not predictions:
            raise DataError("the table asks for no prediction: need_prediction is False in every row")
        return np.stack(truth), np.stack(predictions)

    def _rows(self) -> Iterator[tuple[DataPoint, np.ndarray]]:
        """Every row as the contest hands it out, its state an array of objects; and its target columns."""
        columns = [*FIRST_COLUMNS, *self.layout.features]
        of_targets = self.layout.targets if self.layout.same_row else ()
        for first in range(0, len(self.table), _ROWS_AT_ONCE):
            part = self.table.iloc[first : first + _ROWS_AT_ONCE]
            values = part[columns].astype(object).to_numpy()
            targets = part[list(of_targets)].to_numpy(dtype=np.float64)
            for row, target in zip(values, targets, strict=True):
                yield DataPoint(int(row[0]), int(row[1]), bool(row[2]), row[3:]), target


def _checked(point: DataPoint, prediction: np.ndarray | None, width: int) -> np.ndarray | None:
    place = f"sequence {point.seq_ix}, step {point.step_in_seq}"
    if prediction is None:
        if point.need_prediction:
            raise DataError(f"{place}: the row asks for a prediction and the solution returned None")
        return None
    if not point.need_prediction:
        raise DataError(f"{place}: the row asks for no prediction and the solution returned one; return None")
    values = np.asarray(prediction, dtype=np.float64)
    if values.shape != (width,):
        raise DataError(f"{place}: expected a prediction of shape ({width},), got {values.shape}")
    if not np.isfinite(values).all():
        raise DataError(f"{place}: the prediction is not finite (NaN or infinite)")
    # A solution may hand out the same buffer each time.
    return values.copy()


def target_scores(
    truth: np.ndarray, predictions: np.ndarray, names: Sequence[str], metric: Metric = "r2"
) -> dict[str, float]:
    """Score (rows, targets) against (rows, targets), pooled over all rows: one number a target, and "mean_<metric>"."""
    if metric == "r2":
        from sklearn.metrics import r2_score

        scores = np.atleast_1d(r2_score(truth, predictions, multioutput="raw_values"))
    else:
        scores = weighted_pearson(truth, predictions)
    return {f"mean_{metric}": float(np.mean(scores)), **dict(zip(names, map(float, scores), strict=True))}


def weighted_pearson(truth: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Pearson's correlation with weights |truth| of (rows, targets), predictions clipped to +-6: (targets,).

    A constant prediction or truth scores 0.
    """
    weights = np.abs(truth)
    weights = weights / np.maximum(weights.sum(axis=0), np.finfo(float).tiny)
    clipped = np.clip(predictions, -PEARSON_CLIP, PEARSON_CLIP)
    y, p = (values - (weights * values).sum(axis=0) for values in (truth, clipped))
    spread = np.sqrt((weights * y * y).sum(axis=0) * (weights * p * p).sum(axis=0))
    covariance = (weights * y * p).sum(axis=0)
    return np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0)
