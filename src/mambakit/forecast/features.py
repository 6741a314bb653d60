"""What the model sees of each day: numbers made from prices up to that day, none of which grows with the price.

A price level drifts away from anything seen in training; ratios, returns and positions within a range do not. So each
indicator is divided by the price, or by its own range. Indicators are TA-Lib's.
"""

from collections.abc import Sequence

import numpy as np
import talib

from mambakit.errors import DataError

RSI_DAYS = 14
BOLLINGER_DAYS = 20
MACD_DAYS = (12, 26, 9)  # fast, slow, signal
SMALLEST_DEVIATION = 1e-6  # of daily log returns, where a price stands still


class TimeSeriesFeatureEngineer:
    """Turns prices into features, one row a day, each from that day and the days before it.

    Args:
        windows: days of the rolling means, volatilities, momenta and ranges; each 2 or more.
        include_volume: also the turnover (price * volume) against its own mean over each window.

    Raises DataError for windows that are none. `FeatureStream` gives the same numbers one day at a time.

    Example::

        engineer = TimeSeriesFeatureEngineer(windows=[5, 10, 20, 60])
        features = engineer.extract_features(prices)   # (days, len(engineer.names))
        usable = features[engineer.warm_up:]
    """

    def __init__(self, windows: Sequence[int] = (5, 10, 20, 60), include_volume: bool = False) -> None:
        self.windows = tuple(windows)
        if not self.windows or len(set(self.windows)) < len(self.windows) or min(self.windows) < 2:
            raise DataError(f"windows must be different numbers of days, each 2 or more, got {list(windows)}")
        self.include_volume = include_volume

    @property
    def warm_up(self) -> int:
        """Rows at the start that lack history; they are NaN in part and must not be used."""
        slowest_macd = MACD_DAYS[1] + MACD_DAYS[2] - 2
        return max(max(self.windows), slowest_macd, BOLLINGER_DAYS, RSI_DAYS)

    @property
    def names(self) -> list[str]:
        """The columns of `extract_features`, in order."""
        rolling = ["sma", "ema", "volatility", "momentum", "rate_of_change", "range_position"]
        if self.include_volume:
            rolling.append("turnover")
        return [
            "normalised_price",
            "simple_return",
            "log_return",
            *(f"{name}_{days}" for name in rolling for days in self.windows),
            f"rsi_{RSI_DAYS}",
            "bollinger_position",
            "macd",
            "macd_signal",
            "macd_histogram",
        ]

    def extract_features(self, prices: np.ndarray, volumes: np.ndarray | None = None) -> np.ndarray:
        """Features (days, len(names)) float64 of prices (days,) and, where volume is included, volumes (days,).

        Rows before `warm_up` hold NaN, no row depends on a later day. Raises DataError where a price is not positive
        and finite (one that is missing would spoil all days after it), or volumes are wanted and missing, or given
        and unwanted.
        """
        if self.include_volume != (volumes is not None):
            raise DataError("volumes must be given exactly when include_volume is set")
        prices = _checked("prices", prices, positive=True)
        if volumes is not None:
            volumes = _checked("volumes", volumes, positive=False)
            if len(volumes) != len(prices):
                raise DataError(f"{len(prices)} prices and {len(volumes)} volumes: one of each is needed for every day")
        log_returns = np.full(len(prices), np.nan)
        log_returns[1:] = np.diff(np.log(prices))
        columns = [self._normalised_price(prices), np.expm1(log_returns), log_returns]
        columns += [np.log(prices / talib.SMA(prices, days)) for days in self.windows]
        columns += [np.log(prices / talib.EMA(prices, days)) for days in self.windows]
        deviations = [_rolling_deviation(log_returns, days) for days in self.windows]
        columns += [np.log(deviation) for deviation in deviations]
        # Momentum in units of its own volatility; the rate of change is the same move in per cent.
        columns += [
            np.log(talib.ROCR(prices, days)) / (deviation * np.sqrt(days))
            for days, deviation in zip(self.windows, deviations, strict=True)
        ]
        columns += [talib.ROCP(prices, days) for days in self.windows]
        columns += [_position(prices, talib.MIN(prices, days), talib.MAX(prices, days)) for days in self.windows]
        if volumes is not None:
            columns += [_relative_turnover(prices * volumes, days) for days in self.windows]
        columns.append(talib.RSI(prices, RSI_DAYS) / 100)
        upper, _, lower = talib.BBANDS(prices, BOLLINGER_DAYS, nbdevup=2.0, nbdevdn=2.0)
        columns.append(_position(prices, lower, upper))
        columns += [line / prices for line in talib.MACD(prices, *MACD_DAYS)]
        return np.stack(columns, axis=1)  # (days, features)

    def _normalised_price(self, prices: np.ndarray) -> np.ndarray:
        """Standard deviations between the price and its mean over the longest window."""
        days = max(self.windows)
        deviation = np.maximum(talib.STDDEV(prices, days), SMALLEST_DEVIATION * prices)
        return (prices - talib.SMA(prices, days)) / deviation


def _checked(name: str, values: np.ndarray, positive: bool) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise DataError(f"{name} must be one-dimensional, with a value for each day, got shape {values.shape}")
    wrong = ~np.isfinite(values) | (values <= 0 if positive else values < 0)
    if wrong.any():
        kind = "positive" if positive else "not negative"
        row = wrong.argmax()
        raise DataError(f"{name} must be finite and {kind}, row {row} is {values[row]:g}")
    return values


def _rolling_deviation(log_returns: np.ndarray, days: int) -> np.ndarray:
    """Standard deviation of the last `days` log returns."""
    deviation = np.full_like(log_returns, np.nan)
    deviation[1:] = talib.STDDEV(log_returns[1:], days)
    return np.maximum(deviation, SMALLEST_DEVIATION)


def _position(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where the value stands between low (0) and high (1); the middle where there is no width."""
    width = high - low
    flat = width <= SMALLEST_DEVIATION * value
    return np.where(flat, 0.5, (value - low) / np.where(flat, 1.0, width))


def _relative_turnover(turnover: np.ndarray, days: int) -> np.ndarray:
    """Log of today's turnover over its mean of the last `days` days; a day without trade counts as one unit."""
    traded = np.maximum(turnover, 1.0)
    return np.log(traded / talib.SMA(traded, days))
