"""Series made by chance alone, for tests of the forecasting room."""

import numpy as np

from mambakit.forecast.prices import PriceSeries


def random_walk(days: int = 460, seed: int = 0, symbol: str = "WALK", memory: float = 0.0) -> PriceSeries:
    """A geometric random walk with fat tails, on business days from 2010-01-04.

    With a memory it is none: a share `memory` of each day's return comes again on the next.
    """
    generator = np.random.default_rng(seed)
    returns = 0.0003 + 0.01 * generator.standard_t(5, days - 1)
    for day in range(1, days - 1):
        returns[day] += memory * returns[day - 1]
    prices = 50.0 * np.exp(np.concatenate([[0.0], returns.cumsum()]))
    dates = np.busday_offset("2010-01-04", np.arange(days))
    return PriceSeries(symbol, dates, prices, generator.uniform(1e5, 1e6, days))
