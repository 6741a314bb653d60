"""What a model was made from and what it promised, kept beside it, so that its life can be held against its birth.

`reference.json` has, for every feature, the deciles of the training part, and how far stretches of the training part
themselves stray from the rest of it, as the population stability index

    PSI = sum_b (a_b - e_b) log(a_b / e_b),    a, e the shares of recent and reference days in bin b

A rule of thumb calls 0.25 a shift. But a feature that averages over 60 days takes few independent values in a year, and
strays by more than that for no reason at all. So what counts as unusual is the 95% quantile of the PSI of stretches of
the training part against the rest of it.

For every horizon it has the loss (CRPS from the quantiles, in units of the volatility at the horizon) and the coverage
on the test part.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mambakit.errors import ArtefactError
from mambakit.forecast.config import QUANTILES
from mambakit.training.artefacts import read_json

if TYPE_CHECKING:
    from mambakit.forecast.train import TrainedForecaster

REFERENCE = "reference.json"
LEVELS = (0.5, 0.8, 0.95)  # of the intervals that are watched
STRETCHES = (60, 120, 250, 500)  # days
_UNUSUAL = 0.95
_STEP = 5  # days from one stretch to the next
_PRIOR = 0.5  # days added to each bin, so that an empty one is finite


@dataclass(frozen=True)
class Promise:
    """How a model did at one horizon on its test part."""

    samples: int
    loss: float
    loss_error: float  # its standard error, for overlapping samples
    coverage: dict[str, float]  # of the 50, 80 and 95% intervals, by "0.5" and so on


@dataclass(frozen=True)
class Reference:
    """The content of reference.json."""

    names: tuple[str, ...]  # of the features
    edges: tuple[np.ndarray, ...]  # of each feature's bins, increasing; fewer than nine where values are tied
    counts: tuple[np.ndarray, ...]  # of training days in each of these bins
    usual: dict[int, np.ndarray]  # (features,) PSI that 95% of stretches so long stay below
    promises: dict[int, Promise]  # by horizon

    def drift(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """PSI (features,) of recent days (days, features), and what is usual for so many; None for too few days.

        Days with a value that is not finite are left out.
        """
        features = features[np.isfinite(features).all(axis=1)]
        lengths = [length for length in self.usual if length <= len(features)]
        if not lengths or features.shape[1] != len(self.names):
            return None
        index = [
            stability_index(np.bincount(_bins(column, edges), minlength=len(counts)), counts)
            for column, edges, counts in zip(features.T, self.edges, self.counts, strict=True)
        ]
        return np.array(index), self.usual[max(lengths)]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return {
            "names": list(self.names),
            "edges": [edges.tolist() for edges in self.edges],
            "counts": [counts.tolist() for counts in self.counts],
            "usual_psi": {str(length): values.tolist() for length, values in self.usual.items()},
            "test": {str(horizon): vars(promise) for horizon, promise in self.promises.items()},
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Reference":
        """The reference that `to_json` gave."""
        return cls(
            tuple(saved["names"]),
            tuple(np.array(edges) for edges in saved["edges"]),
            tuple(np.array(counts) for counts in saved["counts"]),
            {int(length): np.array(values) for length, values in saved["usual_psi"].items()},
            {int(horizon): Promise(**promise) for horizon, promise in saved["test"].items()},
        )


def make_reference(trained: "TrainedForecaster") -> Reference:
    """Measure the training part's features and the test part's losses of a trained forecaster."""
    from mambakit.forecast.dataset import raw_features
    from mambakit.forecast.evaluation import MODEL

    prepared = trained.prepared
    split, config = prepared.split, prepared.config
    last = prepared.origins[split.training[-1]]
    seen = raw_features(prepared.series, config, prepared.covariates)[
        prepared.origins[0] - config.sequence_length + 1 : last + 1
    ]
    edges = tuple(np.unique(np.quantile(column, np.arange(1, 10) / 10)) for column in seen.T)
    bins = [_bins(column, each) for column, each in zip(seen.T, edges, strict=True)]
    counts = tuple(np.bincount(each, minlength=len(edge) + 1) for each, edge in zip(bins, edges, strict=True))
    # A stretch longer than half of the training part would mostly be compared with itself.
    usual = {
        length: np.array([_usual_index(each, len(count), length) for each, count in zip(bins, counts, strict=True)])
        for length in STRETCHES
        if 2 * length <= len(seen)
    }
    quantiles = trained.test.predictions[MODEL].quantiles
    volatility = prepared.volatility[prepared.origins[split.test]]
    promises = {
        horizon: _promise(quantiles[:, column], prepared.returns[split.test, column], volatility, horizon)
        for column, horizon in enumerate(config.prediction_horizons)
    }
    return Reference(prepared.scaler.names, edges, counts, usual, promises)


def load_reference(folder: Path) -> Reference | None:
    """The reference of a stored version; None where it was stored without. Raises ArtefactError where it is damaged."""
    path = folder / REFERENCE
    if not path.exists():
        return None
    try:
        return Reference.from_json(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error


def stability_index(recent: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """PSI between counts (..., bins)."""
    actual, expected = _shares(recent), _shares(reference)
    return ((actual - expected) * np.log(actual / expected)).sum(axis=-1)


def scaled_crps(quantiles: np.ndarray, outcome: np.ndarray, levels: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """CRPS (...) from quantiles (..., levels), in units of the scale (...); NaN where the outcome is."""
    error = outcome[..., None] - quantiles
    return 2 * np.maximum(levels * error, (levels - 1) * error).mean(axis=-1) / scale


def inside(quantiles: np.ndarray, outcome: np.ndarray, levels: np.ndarray, level: float) -> np.ndarray | None:
    """Whether outcomes (...) lie in the central interval of quantiles (..., levels); None without its bounds."""
    low, high = (np.flatnonzero(np.isclose(levels, bound)) for bound in ((1 - level) / 2, (1 + level) / 2))
    if not (len(low) and len(high)):
        return None
    return (quantiles[..., low[0]] <= outcome) & (outcome <= quantiles[..., high[0]])


def _promise(quantiles: np.ndarray, returns: np.ndarray, volatility: np.ndarray, horizon: int) -> Promise:
    from mambakit.forecast.significance import overlapping_error

    levels = np.array(QUANTILES)
    losses = scaled_crps(quantiles, returns, levels, volatility * np.sqrt(horizon))
    hits = {level: inside(quantiles, returns, levels, level) for level in LEVELS}
    coverage = {f"{level:g}": float(hit.mean()) for level, hit in hits.items() if hit is not None}
    return Promise(len(losses), float(losses.mean()), overlapping_error(losses, horizon), coverage)


def _bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.searchsorted(edges, values, side="right")


def _usual_index(bins: np.ndarray, count: int, length: int) -> float:
    """The PSI that 95% of stretches of `length` days stay below, each against all other days."""
    days = np.eye(count)[bins]  # (days, bins)
    total = np.concatenate([np.zeros((1, count)), days.cumsum(axis=0)])
    stretches = (total[length:] - total[:-length])[::_STEP]  # (stretches, bins)
    return float(np.quantile(stability_index(stretches, total[-1] - stretches), _UNUSUAL))


def _shares(counts: np.ndarray) -> np.ndarray:
    smoothed = counts + _PRIOR
    return smoothed / smoothed.sum(axis=-1, keepdims=True)
