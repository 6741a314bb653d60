"""A symbol's series made ready for training: features, scaler, targets and the three parts, and batches of windows.

Windows overlap by all but one row, so they are not stored: a batch gathers its rows when it is asked for.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.forecast.config import SPLIT, MambaConfig
from mambakit.forecast.features import TimeSeriesFeatureEngineer
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.quality import require_quality
from mambakit.forecast.volatility import ewma_volatility
from mambakit.forecast.windows import FeatureScaler, SequenceGenerator, Split, temporal_split

# Fewer samples than these, after the purge, can't be learnt from or judged by.
_LEAST_TRAINING, _LEAST_VALIDATION, _LEAST_TEST = 100, 20, 50


class WindowData:
    """Some samples of a series, in the form that the training loop asks for: a length, and batches by index.

    Args:
        features: (days, columns) float32, standardised.
        volatility: (days,) known at each day's close.
        returns: (samples, horizons), the targets.
        origins: (samples,) each sample's last row of features.
        sequence_length: rows in a window.
    """

    def __init__(
        self,
        features: np.ndarray,
        volatility: np.ndarray,
        returns: np.ndarray,
        origins: np.ndarray,
        sequence_length: int,
    ) -> None:
        self._features = torch.from_numpy(features)
        self._returns = torch.from_numpy(returns.astype(np.float32))
        self._volatility = torch.from_numpy(volatility[origins].astype(np.float32))
        self._rows = torch.from_numpy(origins)[:, None] + torch.arange(1 - sequence_length, 1)  # (samples, length)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Features (batch, length, columns), volatility (batch,) and returns (batch, horizons), all float32."""
        return {
            "features": self._features[self._rows[indices]],
            "volatility": self._volatility[indices],
            "returns": self._returns[indices],
        }

    def everything(self) -> dict[str, Tensor]:
        """All samples as one batch."""
        return self.batch(torch.arange(len(self)))


@dataclass(frozen=True)
class PreparedSeries:
    """All that training and evaluation need of one series; nothing in it looks past its own day but `returns`."""

    series: PriceSeries
    config: MambaConfig
    scaler: FeatureScaler
    features: np.ndarray  # (days, columns) float32, standardised by the training part
    volatility: np.ndarray  # (days,) EWMA of daily log returns
    origins: np.ndarray  # (samples,) last row of each window
    returns: np.ndarray  # (samples, horizons) log returns that follow
    split: Split

    def part(self, samples: np.ndarray) -> WindowData:
        """The samples at these positions, such as `split.training`."""
        return WindowData(
            self.features,
            self.volatility,
            self.returns[samples],
            self.origins[samples],
            self.config.sequence_length,
        )


def minimum_days(config: MambaConfig) -> int:
    """Days that a series needs so that each part, once purged, has samples enough."""
    purge = config.longest_horizon
    samples = max((_LEAST_TRAINING + purge) / SPLIT[0], (_LEAST_VALIDATION + purge) / SPLIT[1], _LEAST_TEST / SPLIT[2])
    engineer = feature_engineer(config)
    return engineer.warm_up + config.sequence_length - 1 + int(np.ceil(samples)) + 1 + purge


def feature_engineer(config: MambaConfig) -> TimeSeriesFeatureEngineer:
    """The features that a model of this configuration reads."""
    return TimeSeriesFeatureEngineer(config.windows, config.include_volume)


def raw_features(series: PriceSeries, config: MambaConfig) -> np.ndarray:
    """Features (days, columns) before any scaling; the same call in training and in serving."""
    volumes = series.volumes if config.include_volume else None
    return feature_engineer(config).extract_features(series.prices, volumes)


def prepare_series(series: PriceSeries, config: MambaConfig, *, split: Split | None = None) -> PreparedSeries:
    """Check the series, compute its features and targets, split it, and fit the scaler on the training part.

    Args:
        split: positions of the samples of each part, such as one fold of a backtest; by default 60, 20 and 20%.

    Raises DataError where the series is too short, incomplete, not positive or out of order.
    """
    needed = minimum_days(config)
    if len(series) < needed:
        raise DataError(
            f"{series.symbol}: {len(series)} days of prices are too few, at least {needed} are needed for windows of "
            f"{config.sequence_length} days and a horizon of {config.longest_horizon}"
        )
    require_quality(series, min_samples=needed)
    raw = raw_features(series, config)
    generator = SequenceGenerator(config.sequence_length, config.prediction_horizons)
    origins = generator.origins(raw)
    split = split or temporal_split(origins, config.longest_horizon, SPLIT)
    seen = raw[origins[split.training[0]] - config.sequence_length + 1 : origins[split.training[-1]] + 1]
    scaler = FeatureScaler.fit(seen, feature_engineer(config).names)
    return PreparedSeries(
        series=series,
        config=config,
        scaler=scaler,
        features=scaler.transform(raw),
        volatility=ewma_volatility(series.prices),
        origins=origins,
        returns=generator.targets(series.prices, origins),
        split=split,
    )
