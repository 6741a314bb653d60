"""The random walk with GARCH(1,1) volatility: fitted on the training part, filtered forward with fixed parameters.

    s^2_{t+1} = omega + alpha r_t^2 + beta s^2_t
    sum_{k=1}^{h} E_t s^2_{t+k} = h S + (s^2_{t+1} - S) (1 - p^h) / (1 - p),   p = alpha + beta,  S = omega / (1 - p)

The innovations are Student-t. A sum of h of them is nearer to normal: its excess kurtosis is an h-th of one day's, so
h days get 4 + h (nu - 4) degrees of freedom. Source: Bollerslev, Journal of Econometrics 31 (1986), and 69 (1987) of
the Review of Economics and Statistics for the t; the parameters are estimated by the package `arch`.
"""

import warnings

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.baselines.walks import training_days
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.dataset import PreparedSeries
from mambakit.forecast.predictions import Predictions

_PER_CENT = 100.0  # arch estimates best where returns are near 1
_MOST_PERSISTENT = 0.9999  # at 1 the variance has no level to return to
_NEARLY_NORMAL = 1e6  # degrees of freedom
_FEWEST_FREEDOMS = 4.1  # below 4 there is no kurtosis to thin out


def garch_walk(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """Mean 0; raises DataError where the fit fails."""
    from scipy.stats import t

    daily = _PER_CENT * np.diff(np.log(prepared.series.prices))
    days = training_days(prepared)
    omega, alpha, beta, freedoms = fit_garch(daily[days.start : days.stop - 1])  # return i belongs to day i + 1
    variance = next_day_variance(daily, omega, alpha, beta)[prepared.origins[samples] - 1]
    horizons = np.array(prepared.config.prediction_horizons)
    deviation = np.sqrt(summed_variance(variance, horizons, omega, alpha, beta)) / _PER_CENT
    nu = np.where(horizons == 1, freedoms, 4.0 + horizons * (max(freedoms, _FEWEST_FREEDOMS) - 4.0))
    shape = t.ppf(np.array(QUANTILES), nu[:, None]) * np.sqrt((nu - 2.0) / nu)[:, None]  # (horizons, quantiles)
    return Predictions(np.zeros_like(deviation), deviation[..., None] * shape)


def fit_garch(returns: np.ndarray) -> tuple[float, float, float, float]:
    """omega, alpha, beta and the degrees of freedom of returns (days,) in per cent.

    Where the likelihood of Student-t innovations can't be climbed, normal ones are tried, of infinite degrees.
    Raises DataError where neither converges.
    """
    from arch import arch_model

    for innovations in ("t", "normal"):
        model = arch_model(returns, mean="Zero", vol="GARCH", p=1, q=1, dist=innovations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = model.fit(disp="off", show_warning=False)
        omega, alpha, beta = (float(fitted.params[name]) for name in ("omega", "alpha[1]", "beta[1]"))
        if fitted.convergence_flag == 0 and np.isfinite([omega, alpha, beta]).all():
            freedoms = float(fitted.params.get("nu", np.inf))
            return omega, alpha, min(beta, _MOST_PERSISTENT - alpha), min(freedoms, _NEARLY_NORMAL)
    raise DataError(f"the GARCH fit did not converge on {len(returns)} returns")


def next_day_variance(returns: np.ndarray, omega: float, alpha: float, beta: float) -> np.ndarray:
    """s^2_{t+1} (days,) after each of the returns (days,), the first day's s^2 being the long-run variance."""
    from scipy.signal import lfilter

    start = omega / (1.0 - alpha - beta)
    return lfilter([1.0], [1.0, -beta], omega + alpha * returns**2, zi=[beta * start])[0]


def summed_variance(variance: np.ndarray, horizons: np.ndarray, omega: float, alpha: float, beta: float) -> np.ndarray:
    """Variance (samples, horizons) of the sum over each horizon, from tomorrow's (samples,)."""
    persistence = alpha + beta
    level = omega / (1.0 - persistence)
    days = (1.0 - persistence**horizons) / (1.0 - persistence)
    return horizons * level + (variance[:, None] - level) * days
