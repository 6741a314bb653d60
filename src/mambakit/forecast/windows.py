"""From rows of features to samples: windows, the returns that follow, and a split through which no future leaks.

A sample is named by its origin t, the last day of its window. Its features are the rows t-L+1 .. t; its target for the
horizon h is the log return

    r_h(t) = log(P[t+h] / P[t])

The parts follow one another in time. A sample of one part whose target reaches the first origin of the next part
is dropped (purged): otherwise its target would hold returns on which the next part is judged. Source of the purge:
Lopez de Prado, Advances in Financial Machine Learning (2018), chapter 7.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from mambakit.errors import DataError

# Standardised features beyond this many deviations are cut there, so that a crash unlike any in training stays finite.
CLIP = 5.0


class SequenceGenerator:
    """Cuts features and prices into windows and the returns that follow them.

    Args:
        sequence_length: rows in a window.
        prediction_horizons: trading days from a window's last row to its targets.
        stride: rows from one window to the next.
    """

    def __init__(
        self, sequence_length: int = 60, prediction_horizons: Sequence[int] = (1, 5, 10, 30), stride: int = 1
    ) -> None:
        self.sequence_length = sequence_length
        self.prediction_horizons = tuple(prediction_horizons)
        self.stride = stride

    def origins(self, features: np.ndarray) -> np.ndarray:
        """Last rows (samples,) of the windows that lie after the warm-up and have every target.

        Raises DataError where features (days, columns) hold NaN after their first complete row, or give no sample.
        """
        complete = np.isfinite(features).all(axis=1)
        first = int(complete.argmax()) if complete.any() else len(features)
        if not complete[first:].all():
            raise DataError(
                f"features must be finite after the warm-up, row {first + (~complete[first:]).argmax()} is not"
            )
        origins = np.arange(
            first + self.sequence_length - 1, len(features) - max(self.prediction_horizons), self.stride
        )
        if not len(origins):
            raise DataError(
                f"{len(features) - first} days after the warm-up are too few for windows of {self.sequence_length} "
                f"days and a horizon of {max(self.prediction_horizons)}"
            )
        return origins

    def targets(self, prices: np.ndarray, origins: np.ndarray) -> np.ndarray:
        """Log returns (samples, horizons) from each origin to each horizon."""
        logs = np.log(prices)
        return np.stack([logs[origins + horizon] - logs[origins] for horizon in self.prediction_horizons], axis=1)

    def generate_sequences(self, features: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Windows X (samples, sequence_length, columns) and targets y {horizon: (samples, 1)}, oldest first.

        X is a view of `features` (days, columns), whatever the stride: it costs no memory, and is read-only.
        """
        origins = self.origins(features)
        every = np.lib.stride_tricks.sliding_window_view(features, self.sequence_length, axis=0)  # (n, columns, length)
        first = origins[0] - self.sequence_length + 1
        X = every[first : origins[-1] - self.sequence_length + 2 : self.stride].transpose(0, 2, 1)
        targets = self.targets(prices, origins)
        return X, {horizon: targets[:, [column]] for column, horizon in enumerate(self.prediction_horizons)}


@dataclass(frozen=True)
class Split:
    """Positions of the samples of each part, oldest first, none of which shares a return with the next part."""

    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def temporal_split(origins: np.ndarray, longest_horizon: int, shares: tuple[float, float, float]) -> Split:
    """Split samples at origins (samples,) by time into shares, purged so that no target crosses into the next part.

    Raises DataError where a part is left without samples.
    """
    ends = (np.cumsum(shares) / sum(shares) * len(origins)).round().astype(int)
    training, validation, test = np.split(np.arange(len(origins)), ends[:-1])
    if len(validation):
        training = training[origins[training] + longest_horizon < origins[validation[0]]]
    if len(test):
        validation = validation[origins[validation] + longest_horizon < origins[test[0]]]
    split = Split(training, validation, test)
    if not (len(training) and len(validation) and len(test)):
        raise DataError(
            f"{len(origins)} windows leave a part of the split empty: {longest_horizon} days are purged between parts"
        )
    return split


@dataclass(frozen=True)
class FeatureScaler:
    """Means and standard deviations (columns,) of the training part's features, and the names that they belong to."""

    names: tuple[str, ...]
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, names: Sequence[str]) -> Self:
        """Measure features (rows, columns); a column that never changes keeps its scale."""
        deviation = features.std(axis=0)
        return cls(tuple(names), features.mean(axis=0), np.where(deviation > 0, deviation, 1.0))

    def transform(self, features: np.ndarray) -> np.ndarray:
        """Standardised features (rows, columns) float32, cut at +-CLIP; NaN stay NaN."""
        return np.clip((features - self.mean) / self.deviation, -CLIP, CLIP).astype(np.float32)

    def to_json(self) -> dict[str, list[str] | list[float]]:
        """As plain lists, every float in full."""
        return {"names": list(self.names), "mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_json(cls, saved: dict[str, list]) -> Self:
        """The scaler that `to_json` wrote."""
        return cls(tuple(saved["names"]), np.array(saved["mean"]), np.array(saved["deviation"]))
