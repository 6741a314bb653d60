"""The forecast that needs no model: drift, a little momentum, and intervals as wide as today's volatility.

    drift    d = (log P_T - log P_0) / (n + 250)             n daily returns in the whole history
    momentum m = (log P_T - log P_{T-20}) / 20
    mean       = h (d + 0.04 (m - d))
    sigma^2    = 0.94^n 0.02^2 + (1 - 0.94^n) EWMA^2
    quantile   = mean + sigma sqrt(h) z(p)                    z of the normal distribution

By itself, momentum loses to "always up" on every built-in symbol, so it is shrunk to the drift. 0.04 is the least
squares factor for log r = h d + k h (m - d) over the training parts of the four built-in symbols and the horizons 1, 5,
10 and 30, each in units of its own variance (0.036 to 0.050; single symbols range from -0.14 to 0.22). The drift of a
short history is mostly chance: 250 days without drift are added to it. A volatility measured on few days leans on 2% a
day, typical of a share. Standardised so, 82% of daily and 76% of 30-day returns of those training parts lie inside the
normal 80% interval, which Student's t would not bring nearer at both ends.
"""

from statistics import NormalDist

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.predictor import Forecast
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.volatility import DECAY, ewma_volatility

FALLBACK = "fallback"  # what stands in the place of a version
MOMENTUM_DAYS = 20
BELIEF = 0.04  # in momentum, against drift
DRIFTLESS_DAYS = 250
TYPICAL_VOLATILITY = 0.02  # of the daily log return of a share


class FallbackForecaster:
    """Momentum shrunk to drift, for any series with two usable prices.

    Args:
        horizons: trading days ahead.
    """

    def __init__(self, horizons: tuple[int, ...] = (1, 5, 10, 30)) -> None:
        self.horizons = horizons

    def forecast(self, series: PriceSeries, current_price: float | None = None) -> Forecast:
        """Forecast from the last day of a series whose prices are all positive.

        Args:
            current_price: what the returns are applied to; the series' last price where not given.

        Raises:
            DataError: there are fewer than two prices.
        """
        if len(series) < 2:
            raise DataError(
                f"{series.symbol}: {len(series)} usable price{'s' * (len(series) != 1)}; "
                "even the fallback forecast needs 2"
            )
        days = np.array(self.horizons)
        drift = daily_drift(series.prices)
        mean = days * (drift + BELIEF * (_momentum(series.prices) - drift))  # (horizons,)
        scale = cautious_volatility(series.prices) * np.sqrt(days)
        normal = np.array([NormalDist().inv_cdf(level) for level in QUANTILES])
        return Forecast(
            symbol=series.symbol,
            version=FALLBACK,
            as_of=series.dates[-1],
            current_price=float(series.prices[-1]) if current_price is None else current_price,
            horizons=self.horizons,
            mean=mean,
            quantiles=mean[:, None] + scale[:, None] * normal,
            drift=days * drift,
        )


def daily_drift(prices: np.ndarray) -> float:
    """Mean daily log return of prices (days,), as if 250 days without any had come before."""
    return float(np.log(prices[-1] / prices[0]) / (len(prices) - 1 + DRIFTLESS_DAYS))


def cautious_volatility(prices: np.ndarray) -> float:
    """EWMA volatility at the last of prices (days,), which starts from that of a typical share."""
    forgotten = DECAY ** (len(prices) - 1)
    return float(np.sqrt(forgotten * TYPICAL_VOLATILITY**2 + (1 - forgotten) * ewma_volatility(prices)[-1] ** 2))


def _momentum(prices: np.ndarray) -> float:
    """Log return of the last 20 days, a day; days before the first price had none."""
    return float(np.log(prices[-1] / prices[-min(MOMENTUM_DAYS + 1, len(prices))]) / MOMENTUM_DAYS)
