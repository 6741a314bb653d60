"""A symbol's series made ready for training: features, scaler, targets and the three parts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from mambakit.errors import DataError
from mambakit.forecast.config import SPLIT, MambaConfig
from mambakit.forecast.features import TimeSeriesFeatureEngineer
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.quality import require_quality
from mambakit.forecast.samples import DaySequence, SequenceData, WindowData
from mambakit.forecast.volatility import ewma_volatility, volatility_terms
from mambakit.forecast.windows import FeatureScaler, SequenceGenerator, Split, temporal_split

# Fewer samples than these, after the purge, can't be learnt from or judged by.
_LEAST_TRAINING, _LEAST_VALIDATION, _LEAST_TEST = 100, 20, 50

# Sequences are learnt from in runs of about so many days: steps enough in an epoch, and a past behind most days.
DAYS_IN_A_RUN = 125


@dataclass(frozen=True)
class PreparedSeries:
    """All that training and evaluation need of one series; nothing in it looks past its own day but `returns`."""

    series: PriceSeries
    config: MambaConfig
    scaler: FeatureScaler
    features: np.ndarray  # (days, columns) float32, standardised by the training part
    volatility: np.ndarray  # (days,) EWMA of daily log returns
    terms: np.ndarray  # (days, len(TERMS)), how it is expected to go on
    origins: np.ndarray  # (samples,) last row of each window
    returns: np.ndarray  # (samples, horizons) log returns that follow
    split: Split
    covariates: Mapping[str, np.ndarray] = field(default_factory=dict)  # (days,) each, as they were given

    def part(self, samples: np.ndarray) -> WindowData | SequenceData:
        """The samples at these positions, such as `split.validation`, in the form that the mode of the model asks for.

        Of a sequence the days before are read as well, from the first of the series, and do not count.
        """
        if self.config.training_mode == "sequence":
            return SequenceData([self.days(self.first_row, self.origins[samples])])
        return WindowData(
            self.features,
            self.volatility,
            self.terms,
            self.returns[samples],
            self.origins[samples],
            self.config.sequence_length,
        )

    def training_part(self) -> WindowData | SequenceData:
        """What is learnt from: the samples of the training part; for sequences also the days of its first window."""
        training = self.split.training
        if self.config.training_mode == "windows":
            return self.part(training)
        first = self.origins[training[0]] - self.config.sequence_length + 1
        whole = self.days(first, np.arange(first, self.origins[training[-1]] + 1))
        return SequenceData(whole.cut(max(1, len(whole) // DAYS_IN_A_RUN)))

    @property
    def covariates_fingerprint(self) -> str | None:
        """SHA-256 of names and values of the covariates; None where there are none."""
        if not self.covariates:
            return None
        digest = hashlib.sha256()
        for name in self.config.covariates:
            digest.update(name.encode() + b"\0" + np.asarray(self.covariates[name], dtype="<f8").tobytes())
        return digest.hexdigest()

    @property
    def first_row(self) -> int:
        """The first day of which every feature is known."""
        return int(self.origins[0]) - self.config.sequence_length + 1

    def days(self, first: int, counted: np.ndarray, symbol: int = 0) -> DaySequence:
        """The days from row `first` to the last of the rows `counted`, of which only these count."""
        end = int(counted[-1]) + 1
        logs = np.log(self.series.prices)
        returns = np.zeros((end - first, len(self.config.prediction_horizons)))
        for column, horizon in enumerate(self.config.prediction_horizons):
            known = logs[first + horizon : end + horizon] - logs[first:end][: len(logs) - first - horizon]
            returns[: len(known), column] = known
        counts = np.zeros(end - first, dtype=np.float32)
        counts[counted - first] = 1.0
        return DaySequence(
            torch.from_numpy(self.features[first:end]),
            torch.from_numpy(self.volatility[first:end].astype(np.float32)),
            torch.from_numpy(self.terms[first:end].astype(np.float32)),
            torch.from_numpy(returns.astype(np.float32)),
            torch.from_numpy(counts),
            symbol,
        )

    def at_origins(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns (samples, horizons), volatility (samples,) and terms (samples, len(TERMS)), all float32."""
        origins = self.origins[samples]
        values = {
            "returns": self.returns[samples],
            "volatility": self.volatility[origins],
            "terms": self.terms[origins],
        }
        return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


def minimum_days(config: MambaConfig) -> int:
    """Days that a series needs so that each part, once purged, has samples enough."""
    purge = config.longest_horizon
    samples = max((_LEAST_TRAINING + purge) / SPLIT[0], (_LEAST_VALIDATION + purge) / SPLIT[1], _LEAST_TEST / SPLIT[2])
    engineer = feature_engineer(config)
    return engineer.warm_up + config.sequence_length - 1 + int(np.ceil(samples)) + 1 + purge


def shortest_history(config: MambaConfig) -> int:
    """Days that a forecast needs."""
    return feature_engineer(config).warm_up + config.sequence_length


def feature_engineer(config: MambaConfig) -> TimeSeriesFeatureEngineer:
    """The features that a model of this configuration reads."""
    return TimeSeriesFeatureEngineer(config.windows, config.include_volume)


def column_names(config: MambaConfig) -> list[str]:
    """The columns that a model of this configuration reads: features, then covariates."""
    return [*feature_engineer(config).names, *config.covariates]


def raw_features(
    series: PriceSeries, config: MambaConfig, covariates: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """Features and covariates (days, columns) before any scaling; the same call in training and in serving.

    Raises DataError unless the covariates are those that the configuration names, one number a day.
    """
    volumes = series.volumes if config.include_volume else None
    features = feature_engineer(config).extract_features(series.prices, volumes)
    given = {} if covariates is None else covariates
    if set(given) != set(config.covariates):
        wanted = ", ".join(config.covariates) or "none"
        raise DataError(
            f"{series.symbol}: the model reads the covariates {wanted}, got {', '.join(given) or 'none'}; "
            "give each of them, as it was given in training, and no other"
        )
    columns = [_covariate(series, name, given[name]) for name in config.covariates]
    return np.concatenate([features, *columns], axis=1)


def _covariate(series: PriceSeries, name: str, values: np.ndarray) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (len(series),):
        raise DataError(
            f"{series.symbol}: the covariate {name} must have one number for each of {len(series)} days, "
            f"got shape {column.shape}"
        )
    return column[:, None]


def days_with_prices(
    series: PriceSeries, covariates: Mapping[str, np.ndarray] | None, min_samples: int
) -> tuple[PriceSeries, Mapping[str, np.ndarray] | None]:
    """The series as `require_quality` leaves it, and of the covariates (days,) the same days."""
    usable = require_quality(series, min_samples)
    if covariates is None or len(usable) == len(series):
        return usable, covariates
    kept = ~np.isnan(series.prices)
    return usable, {name: _covariate(series, name, values)[kept, 0] for name, values in covariates.items()}


def prepare_series(
    series: PriceSeries,
    config: MambaConfig,
    *,
    split: Split | None = None,
    covariates: Mapping[str, np.ndarray] | None = None,
) -> PreparedSeries:
    """Check the series, compute its features and targets, split it, and fit the scaler on the training part.

    Args:
        split: positions of the samples of each part, such as one fold of a backtest; by default 60, 20 and 20% of
            them, purged. Sample i is the i-th day on which a window and every target are complete.
        covariates: (days,) each, by the names in the configuration, known at each day's close.

    Raises DataError where the series is too short, incomplete, not positive or out of order, and where the split
    names samples that do not exist, has an empty part other than the test's, or lets a target reach into the next part.
    """
    engineer = feature_engineer(config)
    shortest = engineer.warm_up + config.sequence_length + config.longest_horizon
    needed = minimum_days(config) if split is None else shortest
    if len(series) < needed:
        raise DataError(
            f"{series.symbol}: {len(series)} days of prices are too few, at least {needed} are needed for windows of "
            f"{config.sequence_length} days and a horizon of {config.longest_horizon}"
        )
    series, covariates = days_with_prices(series, covariates, min_samples=needed)
    raw = raw_features(series, config, covariates)
    generator = SequenceGenerator(config.sequence_length, config.prediction_horizons)
    origins = generator.origins(raw)
    if split is None:
        split = temporal_split(origins, config.longest_horizon, SPLIT)
    else:
        _require_purged(split, origins, config.longest_horizon)
    first = origins[split.training[0]] - config.sequence_length + 1
    seen = raw[first : origins[split.training[-1]] + 1]
    scaler = FeatureScaler.fit(seen, column_names(config))
    return PreparedSeries(
        series=series,
        config=config,
        scaler=scaler,
        features=scaler.transform(raw),
        volatility=ewma_volatility(series.prices),
        terms=volatility_terms(series.prices),
        origins=origins,
        returns=generator.targets(series.prices, origins),
        split=split,
        covariates={} if covariates is None else dict(covariates),
    )


def _require_purged(split: Split, origins: np.ndarray, longest_horizon: int) -> None:
    parts = {"training": split.training, "validation": split.validation, "test": split.test}
    for name, samples in parts.items():
        if not len(samples):
            if name == "test":  # which what is trained for use, and not to be judged, does without
                continue
            raise DataError(f"split: the {name} part is empty")
        if samples.min() < 0 or samples.max() >= len(origins):
            raise DataError(
                f"split: the {name} part must name samples from 0 to {len(origins) - 1}, "
                f"got {samples.min()} to {samples.max()}"
            )
        if (np.diff(samples) <= 0).any():
            raise DataError(f"split: the samples of the {name} part must increase")
    for earlier, later in (("training", "validation"), ("validation", "test")):
        if len(parts[later]) and origins[parts[earlier][-1]] + longest_horizon >= origins[parts[later][0]]:
            raise DataError(
                f"split: targets of the {earlier} part reach into the {later} part; "
                f"leave {longest_horizon} samples between them"
            )
