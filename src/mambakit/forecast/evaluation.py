"""How good a forecast was, beside the forecasters to beat, on returns that none of them has seen.

Everything is measured on log returns. A price level hardly moves from one day to the next, so any score on levels
flatters whoever repeats the last price; there is none here.

    R2 against b = 1 - sum (r - f)^2 / sum (r - f_b)^2      above 0: better than b
    MASE         = mean |r - f| / mean |r| of the training part, for the same horizon
    hit rate     = share of samples with the right sign, beside the share of days that rose: whoever always says
                   "up" scores that
    coverage     = share of returns inside the 80% interval
    interval score = width + (2 / 0.2) * distance by which the return missed it; lower is better, and a wide interval
                   is no way to a good one (Gneiting and Raftery, 2007)
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mambakit.forecast.baselines import PointForecast
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.significance import overlapping_mean_test

MODEL = "mamba"
REFERENCES = ("random walk", "drift")  # what an R2 is against
INTERVAL_REFERENCE = "ewma"
_ROUNDING = 1e-5  # of a mean squared error, or a mean interval score


@dataclass(frozen=True)
class Score:
    """One forecaster at one horizon on the test part; a figure that it can't have is None."""

    forecaster: str
    horizon: int  # trading days
    r2_random_walk: float
    r2_random_walk_error: float  # its standard error, from overlapping samples
    r2_drift: float
    mase: float
    hit_rate: float | None
    up_rate: float
    hit_p_value: float | None  # of "right more often than always up"; None where it always says up, or nothing
    coverage_80: float | None
    interval_score_80: float | None  # in log return


@dataclass(frozen=True)
class Comparison:
    """The model at one horizon against the better of random walk and drift, and its intervals against ewma's.

    Both by Diebold and Mariano's test, on squared errors and on interval scores.
    """

    horizon: int
    reference: str
    p_value: float  # of "the model's squared error is lower"
    lowest_error: bool  # lowest squared error of all forecasters
    interval_p_value: float  # of "the interval score of the model's 80% interval is lower than that of ewma's"


@dataclass(frozen=True)
class Evaluation:
    """All scores of one symbol's test part, the model's first at each horizon."""

    symbol: str
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    calibration: dict[str, list[float]]  # "nominal" levels; for each horizon, "5d", the share of returns below them

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `to_json` gave."""
        return cls(
            saved["symbol"],
            tuple(Score(**score) for score in saved["scores"]),
            tuple(Comparison(**comparison) for comparison in saved["comparisons"]),
            saved["calibration"],
        )


def evaluate(
    symbol: str,
    horizons: tuple[int, ...],
    returns: np.ndarray,
    forecasts: Mapping[str, PointForecast],
    quantiles: np.ndarray,
    training_returns: np.ndarray,
) -> Evaluation:
    """Score every forecaster.

    Args:
        returns: (samples, horizons), the log returns of the test part.
        forecasts: each forecaster's for the same samples; must hold "random walk", "drift", and, with intervals,
            "mamba" and "ewma".
        quantiles: (samples, horizons, len(QUANTILES)), the model's.
        training_returns: (samples, horizons), the scale of the MASE.
    """
    scores: list[Score] = []
    comparisons = []
    for column, horizon in enumerate(horizons):
        actual = returns[:, column]
        means = {name: forecast.mean[:, column] for name, forecast in forecasts.items()}
        squares = {name: (actual - mean) ** 2 for name, mean in means.items()}
        usual_change = float(np.abs(training_returns[:, column]).mean())
        intervals = {
            name: (forecast.lower[:, column], forecast.upper[:, column])
            for name, forecast in forecasts.items()
            if forecast.lower is not None and forecast.upper is not None
        }
        scores += [
            _score(name, horizon, actual, means[name], squares, usual_change, intervals.get(name)) for name in forecasts
        ]
        costs = {name: interval_scores(actual, *interval, level=0.8) for name, interval in intervals.items()}
        comparisons.append(_compare(horizon, squares, costs))
    below = (returns[..., None] <= quantiles).mean(axis=0)  # (horizons, quantiles)
    calibration = {"nominal": list(QUANTILES)}
    calibration |= {f"{horizon}d": shares.tolist() for horizon, shares in zip(horizons, below, strict=True)}
    return Evaluation(symbol, tuple(scores), tuple(comparisons), calibration)


def _score(
    name: str,
    horizon: int,
    actual: np.ndarray,
    mean: np.ndarray,
    squares: Mapping[str, np.ndarray],
    usual_change: float,
    interval: tuple[np.ndarray, np.ndarray] | None,
) -> Score:
    total = {reference: float(squares[reference].mean()) for reference in REFERENCES}
    gain = overlapping_mean_test(_gain(squares["random walk"], squares[name]), horizon)
    hit_rate, hit_p_value = _direction(actual, mean, horizon)
    return Score(
        forecaster=name,
        horizon=horizon,
        r2_random_walk=gain.mean / total["random walk"],
        r2_random_walk_error=gain.error / total["random walk"],
        r2_drift=float(_gain(squares["drift"], squares[name]).mean()) / total["drift"],
        mase=float(np.abs(actual - mean).mean()) / usual_change,
        hit_rate=hit_rate,
        up_rate=float((actual > 0).mean()),
        hit_p_value=hit_p_value,
        coverage_80=None if interval is None else float(((interval[0] <= actual) & (actual <= interval[1])).mean()),
        interval_score_80=None if interval is None else float(interval_scores(actual, *interval, level=0.8).mean()),
    )


def interval_scores(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray, level: float) -> np.ndarray:
    """Interval score of each value, in its unit: the width, and a fine for each value outside."""
    missed = np.maximum(lower - actual, 0.0) + np.maximum(actual - upper, 0.0)
    return upper - lower + 2.0 / (1.0 - level) * missed


def _direction(actual: np.ndarray, mean: np.ndarray, horizon: int) -> tuple[float | None, float | None]:
    """Share of right signs, and the p-value of its lead over always saying up."""
    if not mean.any():
        return None, None  # "no change" names no direction
    rose, says_up = actual > 0, mean > 0
    hits = rose == says_up
    if says_up.all():
        return float(hits.mean()), None
    lead = overlapping_mean_test(hits.astype(np.float64) - rose, horizon)
    return float(hits.mean()), lead.p_value


def _compare(horizon: int, squares: Mapping[str, np.ndarray], costs: Mapping[str, np.ndarray]) -> Comparison:
    total = {name: float(square.mean()) for name, square in squares.items()}
    reference = min(REFERENCES, key=lambda name: total[name])
    test = overlapping_mean_test(_gain(squares[reference], squares[MODEL]), horizon)
    best_other = min((name for name in total if name != MODEL), key=lambda name: total[name])
    lowest = float(_gain(squares[best_other], squares[MODEL]).mean()) > 0
    interval_test = overlapping_mean_test(_gain(costs[INTERVAL_REFERENCE], costs[MODEL]), horizon)
    return Comparison(horizon, reference, test.p_value, lowest, interval_test.p_value)


def _gain(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """How much lower the candidate's squared errors, or interval scores, are.

    The network computes in float32: where it stayed the drift, a rounding error must not pass for a small, sure gain.
    """
    gain = reference - candidate
    return np.where(np.abs(gain) <= _ROUNDING * reference.mean(), 0.0, gain)
