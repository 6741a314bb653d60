"""Intervals that hold what they promise: two ways to correct quantiles by how often outcomes fell below them.

**Split conformal** (Vovk et al. 2005; Romano, Patterson and Candes, "Conformalized Quantile Regression", NeurIPS 2019):
on a calibration part that the model has not learnt from, the scores are s = (r - q_p) / scale, and

    offset_p = the k-th smallest of the n scores,   k = ceil((n + 1) p) above the median, floor((n + 1) p) below,

added to q_p in units of the day's scale. Where calibration and later samples are exchangeable, an interval between
corrected quantiles at levels l and u then covers at least u - l. Returns over overlapping horizons are not: n of them
made every day hold about n / h independent ones, so chance moves the observed share by sqrt(p (1 - p) h / n). Hence
the offset is shrunk as a normal prior would: levels of a sensible forecaster are off by PRIOR, so

    offset_p * PRIOR^2 / (PRIOR^2 + p (1 - p) h / n).

**Adaptive** (Gibbs and Candes, "Adaptive Conformal Inference Under Distribution Shift", NeurIPS 2021, equation 2): the
level that is read off the forecast in the place of p moves with each outcome as it becomes known, h days later,

    a_p <- a_p + rate / h * (p - 1{r <= quantile at level a_p}),

which makes the share of outcomes below converge to p whatever the returns do; steps are divided by h because h
overlapping outcomes tell about as much as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import Predictions, pit, quantiles_at

PRIOR = 0.05  # standard deviation of how far a forecaster's levels are off, before any outcome is seen
RATE = 0.005  # of the adaptive levels, at a horizon of one day: that of Gibbs and Candes
_OUTERMOST = 1e-6  # where a level that left (0, 1) is read: 4.8 standard deviations out on the probability plot


def conformal_offsets(
    quantiles: np.ndarray,
    actual: np.ndarray,
    scale: np.ndarray,
    levels: Sequence[float] = QUANTILES,
    horizons: Sequence[int] | None = None,
) -> np.ndarray:
    """What to add to each quantile, in units of scale: (horizons, levels). Corrected samples stay increasing.

    Args:
        quantiles: (samples, horizons, levels) of a calibration part, one sample a day.
        actual: (samples, horizons), the returns that came.
        scale: (samples, horizons), such as the day's volatility times the square root of the horizon.
        levels: of the quantiles, increasing.
        horizons: days of each horizon, by which samples overlap; without it they count as independent and the
            offsets are not shrunk, which gives exchangeable samples their guarantee.

    Raises:
        DataError: shapes that do not fit, no sample, or a scale that is not positive.
    """
    p = np.asarray(levels, dtype=np.float64)
    _check(quantiles, actual, scale, p, horizons)
    count = len(actual)
    scores = np.sort((actual[..., None] - quantiles) / scale[..., None], axis=0)  # (samples, horizons, levels)
    wanted = (count + 1) * p
    rank = np.where(p > 0.5, np.ceil(wanted - 1e-9), np.floor(wanted + 1e-9))
    rank = np.where(p == 0.5, np.round(wanted), rank)
    # Where there are too few samples for a level, the guarantee would ask for an infinite bound: the outermost it is.
    offsets = scores[np.clip(rank.astype(int), 1, count) - 1, :, np.arange(len(p))].T  # (horizons, levels)
    if horizons is not None:
        independent = count / np.asarray(horizons, dtype=np.float64)[:, None]
        offsets = offsets * PRIOR**2 / (PRIOR**2 + p * (1 - p) / independent)
    return _without_crossing(offsets, np.diff(quantiles, axis=-1) / scale[..., None], p)


def _without_crossing(offsets: np.ndarray, gaps: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Offsets (horizons, levels) moved outwards from the median as far as the narrowest gap of any sample asks."""
    narrowest = gaps.min(axis=0)  # (horizons, levels - 1)
    kept = offsets.copy()
    middle = int(np.abs(levels - 0.5).argmin())
    for level in range(middle + 1, len(levels)):
        kept[:, level] = np.maximum(kept[:, level], kept[:, level - 1] - narrowest[:, level - 1])
    for level in range(middle - 1, -1, -1):
        kept[:, level] = np.minimum(kept[:, level], kept[:, level + 1] + narrowest[:, level])
    return kept


def add_offsets(quantiles: np.ndarray, scale: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Corrected quantiles (samples, horizons, levels), which never cross.

    Where a later sample's quantiles stand closer than any of the calibration part, offsets might cross them; sorting
    mends that and never raises the pinball loss (Chernozhukov, Fernandez-Val and Galichon, Econometrica 78, 2010).
    """
    return np.sort(quantiles + offsets * scale[..., None], axis=-1)


def _check(
    quantiles: np.ndarray, actual: np.ndarray, scale: np.ndarray, levels: np.ndarray, horizons: Sequence[int] | None
) -> None:
    if quantiles.shape != (*actual.shape, len(levels)) or scale.shape != actual.shape or actual.ndim != 2:
        raise DataError(
            f"quantiles must be (samples, horizons, {len(levels)}) and actual and scale (samples, horizons), "
            f"got {quantiles.shape}, {actual.shape} and {scale.shape}"
        )
    if not len(actual):
        raise DataError("conformal offsets need at least one sample to calibrate on")
    if not (np.diff(levels) > 0).all() or levels[0] <= 0 or levels[-1] >= 1:
        raise DataError(f"levels must increase within (0, 1), got {levels.tolist()}")
    if not (scale > 0).all():
        raise DataError("scale must be positive")
    if horizons is not None and len(horizons) != actual.shape[1]:
        raise DataError(f"horizons must name {actual.shape[1]} horizons, got {len(horizons)}")


@dataclass
class AdaptiveLevels:
    """The levels to read off a forecaster's distribution now, moved by each outcome that becomes known.

    For serving: `calibrate` a forecast before it is given out, keep its raw quantiles, and `update` with each outcome.
    """

    horizons: tuple[int, ...]
    now: np.ndarray  # (horizons, levels); may leave (0, 1), as the guarantee asks
    levels: tuple[float, ...] = QUANTILES
    rate: float = RATE

    @classmethod
    def start(cls, horizons: Sequence[int], levels: Sequence[float] = QUANTILES, rate: float = RATE) -> Self:
        """At the nominal levels; raises DataError unless the rate is within [0, 1]."""
        if not 0.0 <= rate <= 1.0:
            raise DataError(f"rate must be within [0, 1], got {rate}")
        return cls(tuple(horizons), np.tile(levels, (len(horizons), 1)), tuple(levels), rate)

    def readable(self) -> np.ndarray:
        """The levels as they can be read: increasing, and inside (0, 1)."""
        return np.sort(np.clip(self.now, _OUTERMOST, 1.0 - _OUTERMOST), axis=-1)

    def calibrate(self, quantiles: np.ndarray) -> np.ndarray:
        """Quantiles (horizons, levels), corrected."""
        return quantiles_at(quantiles, self.readable(), self.levels)

    def update(self, transform: np.ndarray, used: np.ndarray) -> None:
        """Learn from outcomes.

        Args:
            transform: (horizons,) the raw forecast's `pit` of each outcome that has become known; NaN for none.
            used: (horizons, levels) what `now` was when that forecast was made.
        """
        steps = self.rate / np.asarray(self.horizons, dtype=np.float64)[:, None]
        moved = self.now + steps * (np.asarray(self.levels) - (transform[:, None] <= used))
        self.now = np.where(np.isnan(transform)[:, None], self.now, moved)

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {
            "horizons": list(self.horizons),
            "now": self.now.tolist(),
            "levels": list(self.levels),
            "rate": self.rate,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The levels that `to_json` gave."""
        return cls(tuple(saved["horizons"]), np.array(saved["now"]), tuple(saved["levels"]), saved["rate"])


def adaptive_predictions(record: OutOfSample, name: str, *, rate: float = RATE) -> Predictions:
    """A forecaster's predictions with adaptive levels, as they would have been given out day by day.

    The outcome of a forecast over h days moves the levels from h samples later on: at the close of the day on which it
    becomes known, before that day's forecast is made. Samples must be consecutive trading days.
    """
    raw = record.predictions[name]
    transforms = pit(raw.quantiles, record.actual)  # (samples, horizons)
    state = AdaptiveLevels.start(record.horizons, rate=rate)
    history: list[np.ndarray] = []
    read: list[np.ndarray] = []
    for sample in range(len(transforms)):
        known = np.array([sample - horizon for horizon in record.horizons])
        if (known >= 0).any():
            columns = np.arange(len(known))
            arrived = np.where(known >= 0, transforms[np.maximum(known, 0), columns], np.nan)
            used = np.stack([history[max(day, 0)][column] for column, day in enumerate(known)])
            state.update(arrived, used)
        history.append(state.now)
        read.append(state.readable())
    return Predictions(raw.mean, quantiles_at(raw.quantiles, np.stack(read)))
