"""Is a model still as good as it was? Recent forecasts beside their outcomes, and beside what the test part promised.

A model has decayed when, over its last forecasts,

- its intervals no longer hold what they say: coverage beyond what chance explains, or
- its loss is higher than on the test part, beyond what chance explains in both, or
- most of its inputs have shifted: PSI above 0.25 and above what is usual, see `mambakit.forecast.reference`.

Forecasts h days ahead, made every day, overlap. Chance is therefore measured with the autocovariances up to lag h - 1
(`mambakit.forecast.significance`), and a horizon is judged only once 30 forecasts and 8 stretches of h days have
outcomes. The p-values
of all horizons and levels are adjusted together (Holm), so that watching more of them raises no more false alarms.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from mambakit.forecast.prediction_log import LoggedForecasts
from mambakit.forecast.reference import LEVELS, Promise, Reference, inside, scaled_crps
from mambakit.forecast.significance import holm, overlapping_error


@dataclass(frozen=True)
class Thresholds:
    """What counts as decay."""

    window: int = 250  # forecasts that are looked at, the latest
    significance: float = 0.01  # of coverage and loss, over all horizons and levels together
    least_outcomes: int = 30  # before a horizon is judged
    least_stretches: int = 8  # of h days with outcomes, before it is
    psi: float = 0.25  # a feature has shifted where its PSI is above this and above what is usual
    shifted_share: float = 0.5  # of the features that have shifted

    def needed(self, horizon: int) -> int:
        """Outcomes before a horizon is judged."""
        return max(self.least_outcomes, self.least_stretches * horizon)


@dataclass(frozen=True)
class Coverage:
    """How often outcomes lay in an interval."""

    level: float
    share: float
    low: float  # of the shares that chance explains
    high: float
    p_value: float  # of a share so far from the level
    promised: float | None  # on the test part


@dataclass(frozen=True)
class HorizonReport:
    """Recent accuracy at one horizon."""

    horizon: int
    outcomes: int
    judged: bool  # enough of them to tell
    r2_drift: float | None  # against the training part's drift; above 0 is better
    hit_rate: float | None
    up_rate: float | None
    loss: float | None  # CRPS in units of the volatility at the horizon
    promised_loss: float | None
    loss_p_value: float | None  # of a loss so much higher than promised
    coverages: tuple[Coverage, ...]


@dataclass(frozen=True)
class InputDrift:
    """How far one feature has moved from the training part."""

    name: str
    psi: float
    usual: float  # 95% of stretches of the training part stay below
    shifted: bool


@dataclass(frozen=True)
class MonitorReport:
    """The recent life of one version."""

    symbol: str
    version: str
    forecasts: int
    first_day: str | None
    last_day: str | None
    horizons: tuple[HorizonReport, ...]
    inputs: tuple[InputDrift, ...]  # furthest first; empty where there are too few days to tell
    findings: tuple[str, ...]  # signs of decay, in words
    unknown: tuple[str, ...] = field(default=())  # what could not be judged, in words

    @property
    def decayed(self) -> bool:
        """Whether there is any sign of decay."""
        return bool(self.findings)

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        who = f"{self.symbol} {self.version}"
        if not self.forecasts:
            return f"{who}: no predictions yet"
        since = f"{self.forecasts} forecast{'s' * (self.forecasts != 1)}, {self.first_day} to {self.last_day}"
        if self.decayed:
            return (
                f"{who} has decayed ({since}): {'; '.join(self.findings)}. "
                f"Train again with: mambakit forecast train --symbols {self.symbol}"
            )
        if not any(each.judged for each in self.horizons) and not self.inputs:
            return f"{who}: too early to tell ({since}): {'; '.join(self.unknown)}"
        return f"{who}: no sign of decay ({since})"


def monitor(
    symbol: str,
    version: str,
    forecasts: LoggedForecasts,
    reference: Reference | None,
    thresholds: Thresholds | None = None,
) -> MonitorReport:
    """Judge a version by its logged forecasts: the latest `window`, and at each horizon those with an outcome.

    Args:
        reference: of the version; without it neither loss nor inputs are judged.
    """
    limits = thresholds or Thresholds()
    days = forecasts.as_of[-limits.window :]
    promises = {} if reference is None else reference.promises
    reports = tuple(
        _horizon(forecasts, column, promises.get(horizon), limits) for column, horizon in enumerate(forecasts.horizons)
    )
    inputs = () if reference is None else _inputs(reference, forecasts.features[-limits.window :], limits)
    return MonitorReport(
        symbol=symbol,
        version=version,
        forecasts=len(days),
        first_day=str(days[0]) if len(days) else None,
        last_day=str(days[-1]) if len(days) else None,
        horizons=reports,
        inputs=inputs,
        findings=(*_failures(reports, limits), *_shift(inputs, limits)),
        unknown=tuple(_unknown(reports, inputs, reference, limits)),
    )


def _horizon(forecasts: LoggedForecasts, column: int, promise: Promise | None, limits: Thresholds) -> HorizonReport:
    horizon, levels = forecasts.horizons[column], np.array(forecasts.levels)
    known = np.flatnonzero(np.isfinite(forecasts.outcome[:, column]))[-limits.window :]
    outcome, mean = forecasts.outcome[known, column], forecasts.mean[known, column]
    count = len(outcome)
    if count == 0:
        return HorizonReport(horizon, 0, False, None, None, None, None, None, None, ())
    judged = count >= limits.needed(horizon)
    quantiles = forecasts.quantiles[known, column]
    losses = scaled_crps(quantiles, outcome, levels, forecasts.volatility[known] * np.sqrt(horizon))
    reference_error = ((outcome - forecasts.drift[known, column]) ** 2).sum()
    hits = {level: inside(quantiles, outcome, levels, level) for level in LEVELS}
    return HorizonReport(
        horizon=horizon,
        outcomes=count,
        judged=judged,
        r2_drift=float(1 - ((outcome - mean) ** 2).sum() / reference_error) if reference_error > 0 else None,
        hit_rate=float(((outcome > 0) == (mean > 0)).mean()),
        up_rate=float((outcome > 0).mean()),
        loss=float(losses.mean()),
        promised_loss=None if promise is None else promise.loss,
        loss_p_value=None if promise is None or not judged else _higher_than_promised(losses, promise, horizon),
        coverages=tuple(
            _coverage(hit, level, horizon, promise, limits) for level, hit in hits.items() if hit is not None and judged
        ),
    )


def _higher_than_promised(losses: np.ndarray, promise: Promise, horizon: int) -> float:
    """P-value of a mean loss so far above that of the test part, both uncertain."""
    from scipy.stats import t

    error = np.hypot(overlapping_error(losses, horizon), promise.loss_error)
    return float(t.sf((losses.mean() - promise.loss) / error, max(1.0, len(losses) / horizon - 1)))


def _coverage(hits: np.ndarray, level: float, horizon: int, promise: Promise | None, limits: Thresholds) -> Coverage:
    """A share of hits beside the binomial distribution of as many hits as are independent."""
    from scipy.stats import binom, binomtest

    independent = max(1, round(independent_count(hits.astype(np.float64), horizon, level)))
    tail = limits.significance / 2
    low, high = binom.ppf([tail, 1 - tail], independent, level) / independent
    return Coverage(
        level,
        float(hits.mean()),
        float(low),
        float(high),
        float(binomtest(round(hits.mean() * independent), independent, level).pvalue),
        None if promise is None else promise.coverage.get(f"{level:g}"),
    )


def independent_count(hits: np.ndarray, horizon: int, level: float) -> float:
    """As how many independent ones hits (samples,) over `horizon` days each count: samples / horizon to samples.

    The variance of their mean is inflated by what is measured, and by no less than if returns were normal and
    independent from day to day: a few misses, which come in a row, tell too little to measure it.
    """
    spread = float(hits.var())
    measured = overlapping_error(hits, horizon) ** 2 * len(hits) / spread if spread > 0 else float(horizon)
    return len(hits) / min(max(measured, _inflation(horizon, level)), float(horizon))


@cache
def _inflation(horizon: int, level: float) -> float:
    """1 + 2 sum of the autocorrelations of hits, where neighbours of normal returns share all but one of h days."""
    from scipy.stats import multivariate_normal, norm

    bound = norm.ppf((1 + level) / 2)
    total = 1.0
    for lag in range(1, horizon):
        shared = 1 - lag / horizon
        pair = multivariate_normal([0.0, 0.0], [[1.0, shared], [shared, 1.0]])
        both = pair.cdf([bound, bound], lower_limit=[-bound, -bound])
        total += 2 * float(both - level**2) / (level * (1 - level))
    return total


def _inputs(reference: Reference, features: np.ndarray, limits: Thresholds) -> tuple[InputDrift, ...]:
    measured = reference.drift(features)
    if measured is None:
        return ()
    drifts = [
        InputDrift(name, float(psi), float(usual), bool(psi > max(limits.psi, usual)))
        for name, psi, usual in zip(reference.names, *measured, strict=True)
    ]
    return tuple(sorted(drifts, key=lambda drift: -drift.psi))


def _failures(reports: tuple[HorizonReport, ...], limits: Thresholds) -> list[str]:
    """Coverage and loss that chance does not explain, once all of them are counted."""
    tests: list[tuple[float, str]] = []
    for report in reports:
        tests += [
            (
                each.p_value,
                f"its {each.level:.0%} interval at {report.horizon}d held {each.share:.0%} of {report.outcomes} "
                f"outcomes ({each.low:.0%} to {each.high:.0%} would be chance)",
            )
            for each in report.coverages
        ]
        if report.loss_p_value is not None:
            tests.append(
                (
                    report.loss_p_value,
                    f"its loss at {report.horizon}d is {report.loss:.3f} and was {report.promised_loss:.3f} on the "
                    "test part",
                )
            )
    adjusted = holm([p_value for p_value, _ in tests])
    return [words for (_, words), p_value in zip(tests, adjusted, strict=True) if p_value < limits.significance]


def _shift(inputs: tuple[InputDrift, ...], limits: Thresholds) -> list[str]:
    shifted = [drift for drift in inputs if drift.shifted]
    if not inputs or len(shifted) <= limits.shifted_share * len(inputs):
        return []
    furthest = ", ".join(f"{drift.name} {drift.psi:.2f}" for drift in shifted[:3])
    return [f"{len(shifted)} of {len(inputs)} inputs have shifted (PSI above {limits.psi:g} and the usual: {furthest})"]


def _unknown(
    reports: tuple[HorizonReport, ...],
    inputs: tuple[InputDrift, ...],
    reference: Reference | None,
    limits: Thresholds,
) -> list[str]:
    words = [
        f"{report.horizon}d has {report.outcomes} of {limits.needed(report.horizon)} outcomes"
        + (f" and only the last {limits.window} are looked at" if short else "")
        for report in reports
        if not report.judged
        for short in [limits.window < limits.needed(report.horizon)]
    ]
    if reference is None:
        words.append("the version was stored without reference.json, so its losses and inputs have no standard")
    elif not inputs:
        words.append(f"inputs need {min(reference.usual, default=60)} days")
    return words
