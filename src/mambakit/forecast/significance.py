"""Is a mean difference more than chance? Tests for forecasts whose horizons overlap.

A forecast h days ahead, made every day, has errors that share h-1 days with their neighbours, so hundreds of them
may hold only dozens of independent ones. The variance of their mean therefore sums the autocovariances up to lag h-1,

    V = (g_0 + 2 sum_{k=1}^{h-1} g_k) / n,

the estimate of Hansen and Hodrick, which Diebold and Mariano (1995) take, with the correction for short samples of
Harvey, Leybourne and Newbold (1997). Newey and West's falling weights on the same lags would halve the far
autocovariances: on overlapping returns without any skill they call 9% of the tests significant at the 5% level, this
one 5 to 6.5% (620 and 400 samples, horizons 5 to 30). Where V is not positive, which can happen, they step in.

Tests that ask for independent samples (binomial, Kolmogorov-Smirnov, Berkowitz, Ljung-Box) get every h-th one.
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


def diebold_mariano(reference_loss: np.ndarray, model_loss: np.ndarray, horizon: int) -> MeanTest:
    """Is the model's expected loss lower? Losses (samples,) of any kind; the mean is that of reference less model.

    Source: Diebold and Mariano, Journal of Business and Economic Statistics 13 (1995), with the correction of Harvey,
    Leybourne and Newbold, International Journal of Forecasting 13 (1997), equation 9.
    """
    return overlapping_mean_test(reference_loss - model_loss, horizon)


def pesaran_timmermann(actual: np.ndarray, mean: np.ndarray, horizon: int) -> MeanTest | None:
    """Do the forecasts' signs go with the outcomes', beyond what always saying "up" would reach?

        excess hits = P(hit) - [P(r > 0) P(f > 0) + P(r <= 0) P(f <= 0)] = 2 cov(1{r > 0}, 1{f > 0})

    At a horizon of one day the test of Pesaran and Timmermann, Journal of Business and Economic Statistics 10 (1992),
    equation 6. It asks for independent samples; longer horizons overlap, so there the covariance's products are
    tested as a mean with `overlapping_mean_test`, which is the regression of one sign on the other with HAC errors of
    Pesaran and Timmermann, Journal of the American Statistical Association 104 (2009), section 2.

    Args: outcomes and forecasts (samples,). None where either never changes its sign: there is nothing to go with.
    """
    rose, up = actual > 0, mean > 0
    if rose.all() or up.all() or not (rose.any() and up.any()):
        return None
    products = 2.0 * (rose - rose.mean()) * (up - up.mean())
    if horizon > 1:
        return overlapping_mean_test(products, horizon)

    from scipy.stats import norm

    n, hits, p_rose, p_up = len(rose), float((rose == up).mean()), float(rose.mean()), float(up.mean())
    expected = p_rose * p_up + (1 - p_rose) * (1 - p_up)
    of_hits = expected * (1 - expected) / n
    of_expected = (
        (2 * p_rose - 1) ** 2 * p_up * (1 - p_up) / n
        + (2 * p_up - 1) ** 2 * p_rose * (1 - p_rose) / n
        + 4 * p_rose * p_up * (1 - p_rose) * (1 - p_up) / n**2
    )
    error = math.sqrt(max(of_hits - of_expected, np.finfo(np.float64).tiny))
    return MeanTest(hits - expected, error, float(norm.sf((hits - expected) / error)))


def binomial_test(hits: np.ndarray, rate: float, horizon: int) -> float:
    """One-sided p-value of "more hits (samples,) than this rate", from every h-th sample, exact (Clopper-Pearson)."""
    from scipy.stats import binomtest

    independent = hits[::horizon]
    return float(binomtest(int(independent.sum()), len(independent), rate, alternative="greater").pvalue)


def information_coefficient(
    actual: np.ndarray, mean: np.ndarray, horizon: int, *, ranks: bool = False
) -> MeanTest | None:
    """Correlation over time of forecast and outcome (samples,), with a HAC standard error and p-value; None if
    either is constant.

    The mean of the products of standardised values; of their ranks for the rank IC. The t-statistic is mean / error.
    Source: Grinold and Kahn, Active Portfolio Management (1999), chapter 6; the error as everywhere here.
    """
    if np.ptp(mean) <= np.finfo(np.float32).eps * np.abs(mean).max() or np.ptp(actual) == 0:
        return None
    if ranks:
        from scipy.stats import rankdata

        actual, mean = rankdata(actual), rankdata(mean)
    standardised = [(values - values.mean()) / values.std() for values in (actual, mean)]
    return overlapping_mean_test(standardised[0] * standardised[1], horizon)


@dataclass(frozen=True)
class UniformityTest:
    """Are probability integral transforms what a right distribution gives? A low p-value says no."""

    kolmogorov: float  # p-value: uniform on [0, 1]
    berkowitz: float  # p-value: their normal scores have mean 0, variance 1 and no memory
    ljung_box: float  # p-value: no memory in the normal scores, over ten lags
    samples: int  # independent ones that were tested


def pit_uniformity(transforms: np.ndarray, horizon: int) -> UniformityTest | None:
    """Test PITs (samples,) on every h-th of them; None where fewer than 20 are left.

    Source: Berkowitz, Journal of Business and Economic Statistics 19 (2001), equation 8: z_t - mu = rho (z_{t-1} - mu)
    + e_t is fitted by maximum likelihood given z_1, and twice the log likelihood that it gains over mu = 0, rho = 0,
    var e = 1 is chi-squared with 3 degrees of freedom.
    """
    from scipy.special import ndtri
    from scipy.stats import chi2, kstest
    from statsmodels.stats.diagnostic import acorr_ljungbox

    independent = transforms[::horizon]
    if len(independent) < 20:
        return None
    z = ndtri(np.clip(independent, 1e-9, 1 - 1e-9))
    design = np.stack([np.ones(len(z) - 1), z[:-1]], axis=1)
    left = z[1:] - design @ np.linalg.lstsq(design, z[1:], rcond=None)[0]
    variance = float((left**2).mean())
    gained = float((z[1:] ** 2).sum()) - (len(z) - 1) * (1.0 + math.log(variance))
    lags = min(10, len(z) // 5)
    return UniformityTest(
        kolmogorov=float(kstest(independent, "uniform").pvalue),
        berkowitz=float(chi2.sf(gained, 3)),
        ljung_box=float(acorr_ljungbox(z, lags=[lags])["lb_pvalue"].iloc[0]),
        samples=len(independent),
    )


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that of those called significant at 5%, 5% are expected to be chance (their paper, 1995)."""
    from scipy.stats import false_discovery_control

    return list(map(float, false_discovery_control(p_values))) if len(p_values) else []


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having tested them all: of families without effect, 5% hold one below 5% (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
