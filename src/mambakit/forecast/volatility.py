"""Today's volatility, as RiskMetrics estimates it: the unit in which returns are learnt.

    sigma_t^2 = sum_k lambda^k r_{t-k}^2 / sum_k lambda^k,   k = 0 .. t-1

is an exponentially weighted mean of the squared daily log returns r up to and including day t. Dividing by the sum
of the weights seeds it without looking ahead. Source: J.P. Morgan, RiskMetrics Technical Document (1996), 5.2, with
their decay of 0.94 for daily data.
"""

import numpy as np

DECAY = 0.94
FLOOR = 1e-4  # a hundredth of a per cent a day: no listed share is calmer, and a halted one must not divide by zero


def ewma_volatility(prices: np.ndarray, decay: float = DECAY, floor: float = FLOOR) -> np.ndarray:
    """Volatility (days,) of prices (days,), known at each day's close; NaN on the first, which has no return.

    In units of the daily log return: 0.01 is one per cent a day. It grows with the square root of time.
    """
    squares = np.diff(np.log(prices)) ** 2
    variance = np.full(len(prices), np.nan)
    total = weights = 0.0
    for day, square in enumerate(squares.tolist(), start=1):
        total = decay * total + square
        weights = decay * weights + 1.0
        variance[day] = total / weights
    return np.maximum(np.sqrt(variance), floor)
