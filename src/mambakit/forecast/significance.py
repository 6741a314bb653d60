"""Is a mean difference more than chance? Tests for forecasts whose horizons overlap.

A forecast h days ahead, made every day, has errors that share h-1 days with their neighbours, so hundreds of them
may hold only dozens of independent ones. The variance of their mean therefore sums the autocovariances up to lag h-1,

    V = (g_0 + 2 sum_{k=1}^{h-1} g_k) / n,

the estimate of Hansen and Hodrick, which Diebold and Mariano (1995) take, with the correction for short samples of
Harvey, Leybourne and Newbold (1997). Newey and West's falling weights on the same lags would halve the far
autocovariances: on overlapping returns without any skill they call 9% of the tests significant at the 5% level, this
one 5 to 6.5% (620 and 400 samples, horizons 5 to 30). Where V is not positive, which can happen, they step in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MeanTest:
    """A mean, its standard error, and the one-sided p-value of "the mean is greater than 0"."""

    mean: float
    error: float
    p_value: float


def overlapping_mean_test(differences: np.ndarray, horizon: int) -> MeanTest:
    """Test whether differences (samples,), made every day over `horizon` days each, have a mean above 0.

    Differences that are all alike say nothing about chance: they give an error of 0 and a p-value of 1.
    """
    count = len(differences)
    mean = float(differences.mean())
    if np.ptp(differences) <= np.finfo(np.float64).eps * np.abs(differences).max():
        return MeanTest(mean, 0.0, 1.0)
    error = overlapping_error(differences, horizon)
    overlap = (count + 1 - 2 * horizon + horizon * (horizon - 1) / count) / count
    statistic = mean / error * math.sqrt(max(overlap, 0.0))

    from scipy.stats import t

    return MeanTest(mean, error, float(t.sf(statistic, count - 1)))


def overlapping_error(values: np.ndarray, horizon: int) -> float:
    """Standard error of the mean of values (samples,), each of which spans `horizon` days from one day on."""
    from statsmodels.regression.linear_model import OLS

    centred = OLS(values - values.mean(), np.ones(len(values)))
    for kernel in ("uniform", "bartlett"):
        options = {"maxlags": min(horizon, len(values)) - 1, "kernel": kernel, "use_correction": False}
        variance = float(centred.fit(cov_type="HAC", cov_kwds=options).cov_params()[0, 0])
        if variance > 0:
            break
    return math.sqrt(variance)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having tested them all: of families without effect, 5% hold one below 5% (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
