"""The features of `TimeSeriesFeatureEngineer` one day at a time, for a price that has just come in.

What TA-Lib computes by a recursion is carried by that recursion, seeded as TA-Lib seeds it:

    SMA      a sum that gains today's value and then loses the oldest one, rounding errors and all
    EMA      e_t = e_{t-1} + 2 / (n + 1) (P_t - e_{t-1}),                    e = mean of the first n prices
    MACD     EMA_12 - EMA_26, both seeded on the day on which the slower can be, and the EMA_9 of that
    RSI      g_t = (13 g_{t-1} + max(P_t - P_{t-1}, 0)) / 14, l_t likewise,  g / (g + l)

The rest needs the last days alone. So memory is bounded by the longest window, whatever the number of days.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.features import (
    BOLLINGER_DAYS,
    MACD_DAYS,
    RSI_DAYS,
    SMALLEST_DEVIATION,
    TimeSeriesFeatureEngineer,
)


class FeatureStream:
    """Gives each day's row of features as the day's price is pushed.

    The rows are those of `engineer.extract_features`, to about 1e-10 of their size: NaN while an indicator lacks
    history, complete from row `engineer.warm_up` on.

    Args:
        engineer: says which features.

    Example::

        stream = FeatureStream(TimeSeriesFeatureEngineer())
        history = stream.push_many(prices[:-1])   # (days - 1, columns)
        today = stream.push(prices[-1])           # (columns,)
        saved = json.dumps(stream.to_json())      # later: FeatureStream.from_json(json.loads(saved))
    """

    def __init__(self, engineer: TimeSeriesFeatureEngineer) -> None:
        self.engineer = engineer
        self.days = 0  # pushed so far
        self._kept = max(*engineer.windows, BOLLINGER_DAYS) + 1
        self._prices: list[float] = []
        self._returns: list[float] = []
        self._turnovers: list[float] = []
        fast, slow, signal = MACD_DAYS
        self._means = {days: _SlidingMean(days) for days in (*engineer.windows, BOLLINGER_DAYS)}
        self._mean_turnovers = {days: _SlidingMean(days) for days in engineer.windows}
        self._averages = {
            **{f"ema_{days}": _SeededAverage(days) for days in engineer.windows},
            "macd_fast": _SeededAverage(fast, skip=slow - fast),
            "macd_slow": _SeededAverage(slow),
            "macd_signal": _SeededAverage(signal),
        }
        self._strength = _RelativeStrength(RSI_DAYS)

    def push(self, price: float, volume: float | None = None) -> np.ndarray:
        """The features (columns,) float64 of the next day.

        Raises DataError where the price is not positive and finite, or the volume is wanted and missing, not finite
        or negative, or given and unwanted. The stream is then as it was before.
        """
        price = float(price)
        if not (math.isfinite(price) and price > 0):
            raise DataError(f"price must be positive and finite, got {price}")
        if self.engineer.include_volume != (volume is not None):
            raise DataError("volume must be given exactly when include_volume is set")
        if volume is not None and not (math.isfinite(volume) and volume >= 0):
            raise DataError(f"volume must be finite and not negative, got {volume}")
        if self._prices:
            self._append(self._returns, math.log(price) - math.log(self._prices[-1]))
        self._append(self._prices, price)
        if volume is not None:
            self._append(self._turnovers, max(price * float(volume), 1.0))
        self.days += 1
        return np.array(self._row(price))

    def push_many(self, prices: Sequence[float] | np.ndarray, volumes: np.ndarray | None = None) -> np.ndarray:
        """The features (days, columns) of the next days, as so many pushes give them."""
        if volumes is not None and len(volumes) != len(prices):
            raise DataError(f"{len(prices)} prices and {len(volumes)} volumes: one of each is needed for every day")
        each = [None] * len(prices) if volumes is None else volumes
        rows = [self.push(price, volume) for price, volume in zip(np.asarray(prices), each, strict=True)]
        return np.array(rows).reshape(len(rows), len(self.engineer.names))

    def to_json(self) -> dict[str, Any]:
        """All that the stream knows, as dicts, lists and finite numbers; a stream made from it goes on alike."""
        return {
            "windows": list(self.engineer.windows),
            "include_volume": self.engineer.include_volume,
            "days": self.days,
            "prices": list(self._prices),
            "returns": list(self._returns),
            "turnovers": list(self._turnovers),
            "sums": [mean.total for mean in self._means.values()],
            "turnover_sums": [mean.total for mean in self._mean_turnovers.values()],
            "averages": {name: average.to_json() for name, average in self._averages.items()},
            "strength": self._strength.to_json(),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The stream that `to_json` described; raises DataError for what it did not write."""
        try:
            stream = cls(TimeSeriesFeatureEngineer(saved["windows"], saved["include_volume"]))
            stream.days = int(saved["days"])
            stream._prices, stream._returns, stream._turnovers = (
                [float(value) for value in saved[name]] for name in ("prices", "returns", "turnovers")
            )
            for means, totals in (
                (stream._means, saved["sums"]),
                (stream._mean_turnovers, saved["turnover_sums"]),
            ):
                for mean, total in zip(means.values(), totals, strict=True):
                    mean.total = float(total)
            for name, average in stream._averages.items():
                average.restore(saved["averages"][name])
            stream._strength.restore(saved["strength"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no saved feature stream: {type(error).__name__} at {error}") from error
        return stream

    def _append(self, values: list[float], value: float) -> None:
        values.append(value)
        del values[: -self._kept]

    def _row(self, price: float) -> list[float]:
        """In the order of `TimeSeriesFeatureEngineer.names`."""
        windows, prices = self.engineer.windows, np.array(self._prices)
        move = self._returns[-1] if self._returns else math.nan
        longest = max(windows)
        means = {days: mean.push(self._prices) for days, mean in self._means.items()}
        deviation = _at_least(_deviation(prices, longest), SMALLEST_DEVIATION * price)
        row = [(price - means[longest]) / deviation, math.expm1(move), move]
        row += [math.log(price / means[days]) for days in windows]
        row += [math.log(price / self._averages[f"ema_{days}"].push(price)) for days in windows]
        returns = np.array(self._returns)
        deviations = [_at_least(_deviation(returns, days), SMALLEST_DEVIATION) for days in windows]
        row += [math.log(deviation) for deviation in deviations]
        ratios = [price / prices[-1 - days] if len(prices) > days else math.nan for days in windows]
        row += [
            math.log(ratio) / (deviation * math.sqrt(days))
            for days, ratio, deviation in zip(windows, ratios, deviations, strict=True)
        ]
        row += [ratio - 1.0 for ratio in ratios]
        row += [
            _position(price, prices[-days:].min(), prices[-days:].max()) if len(prices) >= days else math.nan
            for days in windows
        ]
        if self._turnovers:
            row += [
                math.log(self._turnovers[-1] / mean.push(self._turnovers)) for mean in self._mean_turnovers.values()
            ]
        row.append(self._strength.push(price))
        middle, width = means[BOLLINGER_DAYS], 2.0 * _deviation(prices, BOLLINGER_DAYS)
        row.append(_position(price, middle - width, middle + width))
        return row + [line / price for line in self._macd(price)]

    def _macd(self, price: float) -> tuple[float, float, float]:
        """The line, its signal and their difference; TA-Lib gives none of them before it can give all."""
        line = self._averages["macd_fast"].push(price) - self._averages["macd_slow"].push(price)
        signal = math.nan if math.isnan(line) else self._averages["macd_signal"].push(line)
        return (line, signal, line - signal) if not math.isnan(signal) else (math.nan, math.nan, math.nan)


class _SlidingMean:
    """The mean of the last `days` values."""

    def __init__(self, days: int) -> None:
        self._days = days
        self.total = 0.0

    def push(self, values: list[float]) -> float:
        """The mean, once the last of these values is counted; called once for each value."""
        self.total += values[-1]
        if len(values) < self._days:
            return math.nan
        mean = self.total / self._days
        self.total -= values[-self._days]
        return mean


class _SeededAverage:
    """Exponential moving average that starts at the mean of `days` values, the first `skip` ones left out."""

    def __init__(self, days: int, skip: int = 0) -> None:
        self._days, self._skip = days, skip
        self._seen = 0
        self._value = 0.0  # the sum of the values until there are enough of them

    def push(self, value: float) -> float:
        self._seen += 1
        counted = self._seen - self._skip
        if counted <= 0:
            return math.nan
        if counted > self._days:
            self._value += (value - self._value) * (2.0 / (self._days + 1))
            return self._value
        self._value += value
        if counted < self._days:
            return math.nan
        self._value /= self._days
        return self._value

    def to_json(self) -> list[float]:
        return [self._seen, self._value]

    def restore(self, saved: Sequence[float]) -> None:
        self._seen, self._value = int(saved[0]), float(saved[1])


class _RelativeStrength:
    """Wilder's RSI, from 0 to 1; 0 where the price has not moved at all."""

    def __init__(self, days: int) -> None:
        self._days = days
        self._seen = 0
        self._last = self._gain = self._loss = 0.0

    def push(self, price: float) -> float:
        change = price - self._last if self._seen else 0.0
        self._last = price
        self._seen += 1
        moves = self._seen - 1
        if moves > self._days:
            self._gain *= self._days - 1
            self._loss *= self._days - 1
        self._gain += max(change, 0.0)
        self._loss += max(-change, 0.0)
        if moves < self._days:
            return math.nan
        self._gain /= self._days
        self._loss /= self._days
        total = self._gain + self._loss
        return self._gain / total if total >= 1e-14 else 0.0  # TA-Lib's zero

    def to_json(self) -> list[float]:
        return [self._seen, self._last, self._gain, self._loss]

    def restore(self, saved: Sequence[float]) -> None:
        self._seen = int(saved[0])
        self._last, self._gain, self._loss = (float(value) for value in saved[1:])


def _deviation(values: np.ndarray, days: int) -> float:
    return float(values[-days:].std()) if len(values) >= days else math.nan


def _at_least(value: float, least: float) -> float:
    return value if math.isnan(value) else max(value, least)


def _position(value: float, low: float, high: float) -> float:
    """As `features._position`: between low (0) and high (1), the middle where there is no width."""
    if high - low <= SMALLEST_DEVIATION * value:
        return 0.5
    return (value - low) / (high - low)
