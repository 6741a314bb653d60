"""Trying a challenger beside production: who gets which, and a test of which is better that may be looked at any day.

The split is a hash, so that a key gets the same arm in every process, on every machine and in every version:

    u(key) = first 64 bits of SHA-256(salt ":" key) / 2^64,    challenger if u < share

Both arms forecast, whoever is shown, and the test is paired: d_t is production's loss less the challenger's on day t.
Its mean lies, at all times t at once and with probability 1 - alpha, within

    mean_t +- s_t sqrt( (t + r) / t^2 * log((t + r) / (r alpha^2)) )

the normal mixture of Robbins (1970), in the asymptotic form of Waudby-Smith et al., Time-uniform central limit theory
and asymptotic confidence sequences (2021), theorem 2.2 with 1 / rho^2 = r s^2. So one may stop the first day on which
it leaves 0 out. Forecasts h days ahead overlap, so s_t^2 is the long-run variance with the autocovariances up to lag
h - 1 (see `mambakit.forecast.significance`), and the test starts only when `LEAST_BLOCKS` * h days are there to
estimate it from.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.prediction_log import LoggedForecasts
from mambakit.forecast.reference import scaled_crps
from mambakit.forecast.registry import CHALLENGER, PRODUCTION

ALPHA = 0.05
LEAST_DAYS = 50
LEAST_BLOCKS = 20  # stretches of h days behind the first variance that is believed
TIGHTEST_DAYS = 500  # where the sequence is tightest: about two years of trading days
_BITS = 64
_ROUNDING = 1e-5  # of a mean loss: networks compute in float32


def assign(key: str, share: float, salt: str = "mambakit") -> str:
    """The arm, "production" or "challenger", of a key, such as a customer or "AAPL:2013-03-01".

    Args:
        share: of the keys that get the challenger, 0 to 1.
        salt: another one gives another split, independent of the first.

    Raises:
        DataError: the share is not within 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise DataError(f"the challenger's share must be within 0 and 1, got {share}")
    digest = hashlib.sha256(f"{salt}:{key}".encode()).digest()
    return CHALLENGER if int.from_bytes(digest[: _BITS // 8]) < share * 2**_BITS else PRODUCTION


class ConfidenceSequence(NamedTuple):
    """Bounds of a mean that hold on all days at once; NaN before the first day that can be judged."""

    mean: np.ndarray  # (days,) of all differences up to each day
    lower: np.ndarray  # (days,)
    upper: np.ndarray  # (days,)


@dataclass(frozen=True)
class SequentialResult:
    """Which arm is better at one horizon, as far as is known."""

    horizon: int
    days: int  # on which both arms' outcomes are known
    mean: float  # production's loss less the challenger's, in units of the volatility at that horizon
    lower: float  # of the bounds that hold on all days at once
    upper: float
    winner: str | None  # "production", "challenger", or not known yet
    decided_on: np.datetime64 | None  # the as-of day of the forecast that settled it
    needed: int  # days before the first look


def confidence_sequence(differences: np.ndarray, horizon: int, alpha: float = ALPHA) -> ConfidenceSequence:
    """Bounds of the mean of differences (days,), each of which spans `horizon` days, that may be read every day."""
    count = np.arange(1, len(differences) + 1)
    sums = np.cumsum(differences)
    mean = sums / count
    spread = np.sqrt(_running_variance(differences, horizon))
    spread[: first_look(horizon) - 1] = np.nan
    prior = _prior(alpha)
    half = spread * np.sqrt((count + prior) * np.log((count + prior) / (prior * alpha**2))) / count
    return ConfidenceSequence(mean, mean - half, mean + half)


def first_look(horizon: int) -> int:
    """Days needed before the test says anything."""
    return max(LEAST_DAYS, LEAST_BLOCKS * horizon)


def _prior(alpha: float) -> float:
    """The r for which the bounds are tightest at TIGHTEST_DAYS (Howard et al. 2021, equation 24)."""
    log = -2 * np.log(alpha)
    return float(TIGHTEST_DAYS / (log + np.log(log) + 1))


def _running_variance(values: np.ndarray, horizon: int) -> np.ndarray:
    """Long-run variance of values (days,) as known on each day, with autocovariances up to lag horizon - 1."""
    count = np.arange(1, len(values) + 1)
    sums = np.cumsum(values)
    mean = sums / count
    uniform, falling = np.zeros(len(values)), np.zeros(len(values))
    for lag in range(min(horizon, len(values))):
        later, earlier = values[lag:], values[: len(values) - lag]
        # The products of the pairs up to each day, centred by the mean as of that day.
        covariance = np.cumsum(later * earlier) - mean[lag:] * (np.cumsum(later) + np.cumsum(earlier))
        covariance = (covariance + np.arange(1, len(later) + 1) * mean[lag:] ** 2) / count[lag:]
        uniform[lag:] += covariance * (1 if lag == 0 else 2)
        falling[lag:] += covariance * (1 if lag == 0 else 2 * (1 - lag / horizon))
    return np.where(uniform > 0, uniform, np.maximum(falling, 0.0))


def scaled_losses(forecasts: LoggedForecasts) -> np.ndarray:
    """CRPS (forecasts, horizons) from the quantiles, in units of the volatility at the horizon; NaN where unknown."""
    scale = forecasts.volatility[:, None] * np.sqrt(forecasts.horizons)
    return scaled_crps(forecasts.quantiles, forecasts.outcome, np.array(forecasts.levels), scale)


def compare_arms(
    production: LoggedForecasts, challenger: LoggedForecasts, alpha: float = ALPHA
) -> list[SequentialResult]:
    """Test the two arms at each horizon that both have, on the days on which both forecast.

    alpha is shared out among the horizons, so that the chance of any wrong winner, ever, stays below it.
    """
    horizons = [horizon for horizon in production.horizons if horizon in challenger.horizons]
    days, ours, theirs = np.intersect1d(production.as_of, challenger.as_of, return_indices=True)
    losses = scaled_losses(production)[ours], scaled_losses(challenger)[theirs]
    results = []
    for horizon in horizons:
        columns = production.horizons.index(horizon), challenger.horizons.index(horizon)
        differences = losses[0][:, columns[0]] - losses[1][:, columns[1]]
        # Where both networks stayed the drift, a rounding error must not pass for a small, sure lead.
        negligible = np.abs(differences) <= _ROUNDING * losses[0][:, columns[0]]
        differences = np.where(negligible, 0.0, differences)
        known = np.isfinite(differences)
        results.append(_judge(differences[known], days[known], horizon, alpha / len(horizons)))
    return results


def _judge(differences: np.ndarray, days: np.ndarray, horizon: int, alpha: float) -> SequentialResult:
    needed = first_look(horizon)
    if len(differences) < needed:
        mean = float(differences.mean()) if len(differences) else np.nan
        return SequentialResult(horizon, len(differences), mean, np.nan, np.nan, None, None, needed)
    sequence = confidence_sequence(differences, horizon, alpha)
    apart = (sequence.lower > 0) | (sequence.upper < 0)
    winner = decided_on = None
    if apart.any():
        first = int(apart.argmax())  # the first day counts: stopping there is what the bounds allow
        winner = CHALLENGER if sequence.lower[first] > 0 else PRODUCTION
        decided_on = days[first]
    return SequentialResult(
        horizon,
        len(differences),
        float(sequence.mean[-1]),
        float(sequence.lower[-1]),
        float(sequence.upper[-1]),
        winner,
        decided_on,
        needed,
    )
