"""What the scores of many symbols say together: where there is skill, where there is none, and is it chance?

Symbols move together, so ten of them on one day are not ten observations. Every figure pooled over symbols is a mean
over all pairs of symbol and day, and its error treats a day as one observation and sums the autocovariances of days
whose horizons overlap:

    e_d = sum_{s on day d} (x_sd - mean),   V = HAC(sum_d e_d) / N^2     (N pairs)

Source: Driscoll and Kraay, Review of Economics and Statistics 80 (1998); the lags and weights as in `significance`.
Loss differences are first divided by that symbol's mean loss of the baseline, so every symbol weighs the same.

Tests of single symbols and horizons are many, so their p-values are corrected twice: Holm's (no false claim among all)
and Benjamini and Hochberg's (few among those made). Skill of a distribution means a CRPS below that of every walk with
moving volatility that was made, and skill of the mean a squared error below that of random walk and drift alike; so
the p-value is the largest of those (intersection-union test, Berger 1982).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from mambakit.forecast import metrics
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.evaluation import MODEL, REFERENCES, UNCALIBRATED, Evaluation, gain
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.significance import MeanTest, benjamini_hochberg, holm, overlapping_error

SIGNIFICANCE = 0.05
VOLATILITY_WALKS = ("ewma walk", "garch walk")
ALL_HORIZONS = 0  # the mean over horizons, where a horizon is asked for
LEVELS = (0.5, 0.8, 0.95)
SKILL, NONE, WORSE = "skill", "none", "worse"


@dataclass(frozen=True)
class Pooled:
    """A figure over all symbols and days, with its standard error."""

    name: str  # of the baseline, or of the interval, such as "80%"
    horizon: int  # trading days; 0 for the mean over all horizons
    value: float
    error: float
    p_value: float | None = None  # one-sided, of "the model is better"; where that is the question
    symbols: int | None = None  # over how many symbols, where not over all of them


@dataclass(frozen=True)
class Cell:
    """One symbol at one horizon: has the model skill there?"""

    symbol: str
    horizon: int
    crps_ratio: float  # to the volatility walk that is hardest to beat
    crps_p_value: float  # of "lower than every volatility walk's", as it comes
    crps_holm: float
    crps_benjamini_hochberg: float
    distribution: str  # SKILL, NONE or WORSE, at 5% after Benjamini and Hochberg
    r2_drift: float
    r2_drift_error: float
    mean_p_value: float  # of "squared error lower than random walk's and drift's", as it comes
    mean_holm: float
    mean_benjamini_hochberg: float
    mean: str  # SKILL, NONE or WORSE


@dataclass(frozen=True)
class Criterion:
    """One sentence of what the forecaster has to reach, and whether it does."""

    name: str
    passed: bool | None  # None: it can't be told, the detail says why
    detail: str


@dataclass(frozen=True)
class Summary:
    """Everything over all symbols."""

    symbols: tuple[str, ...]
    horizons: tuple[int, ...]
    samples: int  # pairs of symbol and day
    crps: tuple[Pooled, ...]  # ratio of the model's CRPS to each baseline's
    r2: tuple[Pooled, ...]  # against random walk and drift
    coverage: tuple[Pooled, ...]
    cells: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The summary that `to_json` gave."""
        pooled = {name: tuple(Pooled(**each) for each in saved[name]) for name in ("crps", "r2", "coverage")}
        return cls(
            tuple(saved["symbols"]),
            tuple(saved["horizons"]),
            saved["samples"],
            pooled["crps"],
            pooled["r2"],
            pooled["coverage"],
            tuple(Cell(**each) for each in saved["cells"]),
        )


def summarise(records: Sequence[OutOfSample], evaluations: Sequence[Evaluation]) -> Summary:
    """Pool records of one or many symbols, which must have the same horizons."""
    horizons = records[0].horizons
    crps = []
    for name in dict.fromkeys(name for record in records for name in record.predictions):
        if name not in (MODEL, UNCALIBRATED):
            crps += _crps_ratios(name, [record for record in records if name in record.predictions], len(records))
    return Summary(
        symbols=tuple(record.symbol for record in records),
        horizons=horizons,
        samples=sum(len(record.dates) for record in records),
        crps=tuple(crps),
        r2=tuple(_r2(records)),
        coverage=tuple(_coverage(records)),
        cells=tuple(_cells(evaluations)),
    )


def _crps_ratios(name: str, records: Sequence[OutOfSample], asked: int) -> list[Pooled]:
    """At each horizon and at all of them, over the symbols for which this baseline was made."""
    gains = []
    for record in records:
        theirs, ours = (
            metrics.crps(record.predictions[each].quantiles, record.actual, QUANTILES) for each in (name, MODEL)
        )
        gains.append(_normalised(theirs, ours))
    horizons = records[0].horizons
    tests = [
        (horizon, pooled_mean(records, [each[:, column] for each in gains], horizon))
        for column, horizon in enumerate(horizons)
    ]
    tests.append((ALL_HORIZONS, pooled_mean(records, [each.mean(axis=1) for each in gains], horizons[-1])))
    symbols = None if len(records) == asked else len(records)
    return [Pooled(name, horizon, 1.0 - test.mean, test.error, test.p_value, symbols) for horizon, test in tests]


def pooled_mean(records: Sequence[OutOfSample], values: Sequence[np.ndarray], horizon: int) -> MeanTest:
    """Mean over all symbols and days of values (samples,) of each record, with Driscoll and Kraay's error.

    The p-value is the one-sided one of "above 0", with Harvey's correction for the number of days.
    """
    days, place = np.unique(np.concatenate([record.dates for record in records]), return_inverse=True)
    every = np.concatenate(values)
    mean = float(every.mean())
    total = np.bincount(place, weights=every, minlength=len(days))
    count = np.bincount(place, minlength=len(days))
    left = total - count * mean
    if np.ptp(every) <= np.finfo(np.float64).eps * np.abs(every).max():
        return MeanTest(mean, 0.0, 1.0)
    n = len(days)
    error = overlapping_error(left, horizon) * n / len(every)
    overlap = max((n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n, 0.0)

    from scipy.stats import t

    return MeanTest(mean, error, float(t.sf(mean / error * math.sqrt(overlap), n - 1)))


def _normalised(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Gains (samples, horizons) of the candidate in units of the reference's mean loss at each horizon."""
    columns = [gain(reference[:, column], candidate[:, column]) for column in range(reference.shape[1])]
    return np.stack(columns, axis=1) / reference.mean(axis=0)


def _r2(records: Sequence[OutOfSample]) -> list[Pooled]:
    pooled = []
    for name in REFERENCES:
        gains = []
        for record in records:
            squares = [(record.actual - record.predictions[each].mean) ** 2 for each in (name, MODEL)]
            gains.append(_normalised(*squares))
        for column, horizon in enumerate(records[0].horizons):
            test = pooled_mean(records, [each[:, column] for each in gains], horizon)
            pooled.append(Pooled(name, horizon, test.mean, test.error, test.p_value))
    return pooled


def _coverage(records: Sequence[OutOfSample]) -> list[Pooled]:
    pooled = []
    for level in LEVELS:
        inside = [
            metrics.covered(record.predictions[MODEL].quantiles, record.actual, QUANTILES, level).astype(np.float64)
            for record in records
        ]
        for column, horizon in enumerate(records[0].horizons):
            test = pooled_mean(records, [each[:, column] for each in inside], horizon)
            pooled.append(Pooled(f"{level:.0%}", horizon, test.mean, test.error))
        everywhere = pooled_mean(records, [each.mean(axis=1) for each in inside], records[0].horizons[-1])
        pooled.append(Pooled(f"{level:.0%}", ALL_HORIZONS, everywhere.mean, everywhere.error))
    return pooled


def _cells(evaluations: Sequence[Evaluation]) -> list[Cell]:
    pairs = [(each, comparison) for each in evaluations for comparison in each.comparisons]
    scores = {(each.symbol, score.horizon, score.forecaster): score for each in evaluations for score in each.scores}
    better, worse, mean_better, mean_worse, ratios = [], [], [], [], []
    for _, comparison in pairs:
        walks = [comparison.against[name] for name in VOLATILITY_WALKS if name in comparison.against]
        better.append(max(walk.crps_p_value for walk in walks))
        worse.append(_any_worse([(walk.crps_ratio, walk.crps_p_value) for walk in walks]))
        ratios.append(max(walk.crps_ratio for walk in walks))
        means = [comparison.against[name] for name in REFERENCES]
        mean_better.append(max(each.squared_error_p_value for each in means))
        mean_worse.append(_any_worse([(each.squared_error_ratio, each.squared_error_p_value) for each in means]))
    adjusted = {
        "crps": (holm(better), benjamini_hochberg(better), benjamini_hochberg(worse)),
        "mean": (holm(mean_better), benjamini_hochberg(mean_better), benjamini_hochberg(mean_worse)),
    }
    cells = []
    for place, (evaluation, comparison) in enumerate(pairs):
        score = scores[evaluation.symbol, comparison.horizon, MODEL]
        crps_holm, crps_bh, crps_worse = (values[place] for values in adjusted["crps"])
        mean_holm, mean_bh, mean_worse_bh = (values[place] for values in adjusted["mean"])
        cells.append(
            Cell(
                symbol=evaluation.symbol,
                horizon=comparison.horizon,
                crps_ratio=ratios[place],
                crps_p_value=better[place],
                crps_holm=crps_holm,
                crps_benjamini_hochberg=crps_bh,
                distribution=_word(crps_bh, crps_worse),
                r2_drift=score.r2_drift,
                r2_drift_error=score.r2_drift_error,
                mean_p_value=mean_better[place],
                mean_holm=mean_holm,
                mean_benjamini_hochberg=mean_bh,
                mean=_word(mean_bh, mean_worse_bh),
            )
        )
    return cells


def _any_worse(tests: Sequence[tuple[float, float]]) -> float:
    """P-value of "worse than one of them" (Bonferroni), from ratios and p-values of "better"."""
    return min(1.0, len(tests) * min(1.0 if ratio == 1.0 else 1.0 - p for ratio, p in tests))


def _word(better: float, worse: float) -> str:
    if better < SIGNIFICANCE:
        return SKILL
    return WORSE if worse < SIGNIFICANCE else NONE


def success_criteria(summary: Summary) -> list[Criterion]:
    """What a volatility-aware forecaster of prices has to reach over all symbols, one sentence at a time."""
    return [
        _clearly_better(summary),
        *(_no_worse(summary, name) for name in VOLATILITY_WALKS),
        *(_covers(summary, horizon) for horizon in (*summary.horizons, ALL_HORIZONS)),
        *(_not_below_drift(summary, horizon) for horizon in summary.horizons),
    ]


def _clearly_better(summary: Summary) -> Criterion:
    one = next(each for each in summary.crps if (each.name, each.horizon) == ("random walk", ALL_HORIZONS))
    passed = one.value < 1.0 and one.p_value is not None and one.p_value < SIGNIFICANCE
    return Criterion(
        "CRPS clearly better than the constant-volatility random walk's",
        passed,
        f"ratio {one.value:.4f} ± {one.error:.4f}, p {one.p_value:.2g}",
    )


def _no_worse(summary: Summary, name: str) -> Criterion:
    sentence = f"CRPS no worse than the {name}'s, within a standard error"
    found = [each for each in summary.crps if (each.name, each.horizon) == (name, ALL_HORIZONS)]
    if not found:
        return Criterion(sentence, None, f"{name} was not made")
    one = found[0]
    fewer = "" if one.symbols is None else f", over the {one.symbols} symbols for which it was made"
    return Criterion(sentence, one.value <= 1.0 + one.error, f"ratio {one.value:.4f} ± {one.error:.4f}{fewer}")


def _covers(summary: Summary, horizon: int) -> Criterion:
    one = next(each for each in summary.coverage if (each.name, each.horizon) == ("80%", horizon))
    where = "all horizons" if horizon == ALL_HORIZONS else f"{horizon}d"
    return Criterion(
        f"80% interval covers 77 to 83% at {where}",
        0.77 <= one.value <= 0.83,
        f"{one.value:.1%} ± {one.error:.1%}",
    )


def _not_below_drift(summary: Summary, horizon: int) -> Criterion:
    one = next(each for each in summary.r2 if (each.name, each.horizon) == ("drift", horizon))
    return Criterion(
        f"R² not below drift's by more than its standard error at {horizon}d",
        one.value >= -one.error,
        f"{one.value:+.4f} ± {one.error:.4f}",
    )
