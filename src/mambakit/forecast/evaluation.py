"""How good a forecast was, beside the forecasters to beat, on returns that none of them has seen.

Everything is measured on log returns. A price level hardly moves from one day to the next, so any R2 on levels
flatters whoever repeats the last price; there is none here. The equations are in `metrics`, the tests in
`significance`; here they are put together, for every forecaster at every horizon.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mambakit.forecast import metrics
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import Predictions, pit
from mambakit.forecast.significance import (
    MeanTest,
    binomial_test,
    information_coefficient,
    overlapping_mean_test,
    pesaran_timmermann,
    pit_uniformity,
)

MODEL = "mamba"
UNCALIBRATED = "mamba uncalibrated"  # kept beside the model in a record for study, and not judged as another one
REFERENCES = ("random walk", "drift")  # what an R2 is against
INTERVAL_REFERENCE = "ewma"
PIT_BINS = 10
_ROUNDING = 1e-5  # of a mean squared error, a mean CRPS or a mean interval score


@dataclass(frozen=True)
class Score:
    """One forecaster at one horizon; a figure that it can't have is None. All p-values are one-sided."""

    forecaster: str
    horizon: int  # trading days
    r2_random_walk: float
    r2_random_walk_error: float  # its standard error, from overlapping samples
    r2_drift: float
    r2_drift_error: float
    mase: float
    smape: float
    hit_rate: float | None
    up_rate: float
    hit_p_value: float | None  # of "right more often than always up"; None where it always says up, or nothing
    hit_binomial_p_value: float | None  # the same from every h-th sample, exactly
    excess_hits: float | None  # hit rate less what signs without information would reach
    pesaran_timmermann_p_value: float | None  # of "the excess is above 0"
    ic: float | None  # information coefficient: correlation of mean and outcome
    ic_t: float | None
    rank_ic: float | None
    rank_ic_t: float | None
    crps: float  # in log return, as are the next two
    pinball: float  # mean over the levels
    interval_score_80: float
    coverage_50: float
    coverage_80: float
    coverage_95: float
    pit_kolmogorov_p_value: float | None  # None with fewer than 20 samples that do not overlap
    pit_berkowitz_p_value: float | None
    pit_ljung_box_p_value: float | None


@dataclass(frozen=True)
class Against:
    """The model against one other forecaster at one horizon, by Diebold and Mariano's test."""

    squared_error_ratio: float  # the model's over the other's; below 1 is better
    squared_error_p_value: float  # of "the model's is lower"
    crps_ratio: float
    crps_p_value: float


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
    lowest_crps: bool = False  # lowest CRPS of all forecasters
    against: Mapping[str, Against] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All scores of one symbol's test part, the model's first at each horizon."""

    symbol: str
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    calibration: dict[str, list[float]]  # "nominal" levels; for each horizon, "5d", the share of returns below them
    pit: dict[str, list[float]] = field(default_factory=dict)  # for each horizon, the share in each tenth of [0, 1]
    notes: tuple[str, ...] = ()  # what a reader must know, such as a baseline that was left out

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `to_json` gave."""
        return cls(
            saved["symbol"],
            tuple(Score(**score) for score in saved["scores"]),
            tuple(
                Comparison(
                    **{**comparison, "against": {k: Against(**v) for k, v in comparison.get("against", {}).items()}}
                )
                for comparison in saved["comparisons"]
            ),
            saved["calibration"],
            saved.get("pit", {}),
            tuple(saved.get("notes", ())),
        )


def evaluate(record: OutOfSample, notes: tuple[str, ...] = ()) -> Evaluation:
    """Score every forecaster of a record, which must hold "mamba", "random walk", "drift" and "ewma".

    Args:
        notes: what a reader of the scores must know.
    """
    scores: list[Score] = []
    comparisons = []
    calibration = {"nominal": list(QUANTILES)}
    histogram = {}
    for column, horizon in enumerate(record.horizons):
        actual = record.actual[:, column]
        usual = record.usual_change[:, column]
        own = {name: _column(each, column) for name, each in record.predictions.items() if name != UNCALIBRATED}
        squares = {name: (actual - each.mean[:, 0]) ** 2 for name, each in own.items()}
        costs = {name: metrics.crps(each.quantiles[:, 0], actual, QUANTILES) for name, each in own.items()}
        scores += [_score(name, horizon, actual, each, squares, costs[name], usual) for name, each in own.items()]
        comparisons.append(_compare(horizon, actual, own, squares, costs))
        quantiles = own[MODEL].quantiles[:, 0]
        calibration[f"{horizon}d"] = (actual[:, None] <= quantiles).mean(axis=0).tolist()
        counts = np.histogram(pit(quantiles, actual), bins=PIT_BINS, range=(0.0, 1.0))[0]
        histogram[f"{horizon}d"] = (counts / len(actual)).tolist()
    return Evaluation(record.symbol, tuple(scores), tuple(comparisons), calibration, histogram, notes)


def _column(predictions: Predictions, column: int) -> Predictions:
    return Predictions(predictions.mean[:, [column]], predictions.quantiles[:, [column]])


def _score(
    name: str,
    horizon: int,
    actual: np.ndarray,
    predictions: Predictions,
    squares: Mapping[str, np.ndarray],
    costs: np.ndarray,
    usual_change: np.ndarray,
) -> Score:
    mean, quantiles = predictions.mean[:, 0], predictions.quantiles[:, 0]
    total = {reference: float(squares[reference].mean()) for reference in REFERENCES}
    gains = {
        reference: overlapping_mean_test(gain(squares[reference], squares[name]), horizon) for reference in REFERENCES
    }
    speaks = bool(mean.any())  # "no change" names no direction
    hits = (actual > 0) == (mean > 0)
    leads = speaks and not (mean > 0).all()
    up_rate = float((actual > 0).mean())
    signs = pesaran_timmermann(actual, mean, horizon) if speaks else None
    ic, rank_ic = (information_coefficient(actual, mean, horizon, ranks=ranks) for ranks in (False, True))
    uniform = pit_uniformity(pit(quantiles, actual), horizon)
    lower, upper = (bound[:, 0] for bound in predictions.interval(0.8))
    coverage = {level: float(metrics.covered(quantiles, actual, QUANTILES, level).mean()) for level in (0.5, 0.8, 0.95)}
    return Score(
        forecaster=name,
        horizon=horizon,
        r2_random_walk=gains["random walk"].mean / total["random walk"],
        r2_random_walk_error=gains["random walk"].error / total["random walk"],
        r2_drift=gains["drift"].mean / total["drift"],
        r2_drift_error=gains["drift"].error / total["drift"],
        mase=metrics.mase(actual, mean, usual_change),
        smape=metrics.smape(actual, mean),
        hit_rate=float(hits.mean()) if speaks else None,
        up_rate=up_rate,
        hit_p_value=overlapping_mean_test(hits - (actual > 0.0).astype(float), horizon).p_value if leads else None,
        hit_binomial_p_value=binomial_test(hits, up_rate, horizon) if leads else None,
        excess_hits=None if signs is None else signs.mean,
        pesaran_timmermann_p_value=None if signs is None else signs.p_value,
        ic=None if ic is None else ic.mean,
        ic_t=_t_statistic(ic),
        rank_ic=None if rank_ic is None else rank_ic.mean,
        rank_ic_t=_t_statistic(rank_ic),
        crps=float(costs.mean()),
        pinball=float(metrics.pinball(quantiles, actual, QUANTILES).mean()),
        interval_score_80=float(metrics.interval_score(actual, lower, upper, 0.8).mean()),
        coverage_50=coverage[0.5],
        coverage_80=coverage[0.8],
        coverage_95=coverage[0.95],
        pit_kolmogorov_p_value=None if uniform is None else uniform.kolmogorov,
        pit_berkowitz_p_value=None if uniform is None else uniform.berkowitz,
        pit_ljung_box_p_value=None if uniform is None else uniform.ljung_box,
    )


def _t_statistic(test: MeanTest | None) -> float | None:
    return None if test is None or test.error == 0 else test.mean / test.error


def _compare(
    horizon: int,
    actual: np.ndarray,
    predictions: Mapping[str, Predictions],
    squares: Mapping[str, np.ndarray],
    costs: Mapping[str, np.ndarray],
) -> Comparison:
    total = {name: float(square.mean()) for name, square in squares.items()}
    reference = min(REFERENCES, key=lambda name: total[name])
    others = [name for name in squares if name != MODEL]
    against = {}
    for name in others:
        squared_gain, crps_gain = gain(squares[name], squares[MODEL]), gain(costs[name], costs[MODEL])
        against[name] = Against(
            squared_error_ratio=1.0 - float(squared_gain.mean()) / total[name],
            squared_error_p_value=overlapping_mean_test(squared_gain, horizon).p_value,
            crps_ratio=1.0 - float(crps_gain.mean()) / float(costs[name].mean()),
            crps_p_value=overlapping_mean_test(crps_gain, horizon).p_value,
        )
    interval_scores = {}
    for name in (MODEL, INTERVAL_REFERENCE):
        lower, upper = (bound[:, 0] for bound in predictions[name].interval(0.8))
        interval_scores[name] = metrics.interval_score(actual, lower, upper, 0.8)
    interval_test = overlapping_mean_test(gain(*(interval_scores[n] for n in (INTERVAL_REFERENCE, MODEL))), horizon)
    return Comparison(
        horizon=horizon,
        reference=reference,
        p_value=against[reference].squared_error_p_value,
        lowest_error=all(each.squared_error_ratio < 1.0 for each in against.values()),
        interval_p_value=interval_test.p_value,
        lowest_crps=all(each.crps_ratio < 1.0 for each in against.values()),
        against=against,
    )


def gain(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """How much lower the candidate's losses (samples,) are.

    The network computes in float32: where it stayed the drift, a rounding error must not pass for a small, sure gain.
    """
    difference = reference - candidate
    return np.where(np.abs(difference) <= _ROUNDING * reference.mean(), 0.0, difference)
