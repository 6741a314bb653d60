"""The EWMA volatility against pandas, and what it may know."""

import numpy as np
import pandas as pd

from mambakit.forecast.volatility import DECAY, FLOOR, ewma_volatility


def test_it_is_the_exponentially_weighted_mean_of_pandas(make_series) -> None:
    prices = make_series().prices
    squares = pd.Series(np.log(prices)).diff() ** 2
    expected = np.sqrt(squares.ewm(alpha=1 - DECAY, adjust=True).mean())
    np.testing.assert_allclose(ewma_volatility(prices)[1:], expected[1:], rtol=1e-12)


def test_the_first_day_has_none(make_series) -> None:
    assert np.isnan(ewma_volatility(make_series(days=5).prices)).tolist() == [True, False, False, False, False]


def test_it_never_looks_ahead(make_series) -> None:
    prices = make_series().prices
    np.testing.assert_array_equal(ewma_volatility(prices[:200]), ewma_volatility(prices)[:200])


def test_prices_that_stand_still_have_the_floor() -> None:
    np.testing.assert_array_equal(ewma_volatility(np.full(10, 3.0))[1:], FLOOR)
