"""The EWMA volatility against pandas, and what it may know."""

import numpy as np
import pandas as pd

from mambakit.forecast.volatility import (
    DECAY,
    DECAYS,
    FLOOR,
    MOMENTUM_DECAY,
    TERMS,
    ewma_volatility,
    prior_weights,
    volatility_terms,
)


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


def test_the_terms_are_the_logs_of_other_memories_over_todays_and_the_last_returns(make_series) -> None:
    prices = make_series().prices
    returns = pd.Series(np.log(prices)).diff()
    base = ewma_volatility(prices)
    terms = volatility_terms(prices)
    for column, decay in enumerate(DECAYS.values()):
        other = np.sqrt((returns**2).ewm(alpha=1 - decay, adjust=True).mean())
        np.testing.assert_allclose(terms[1:, column], np.log(other / base)[1:].clip(-3, 3), rtol=1e-9, atol=1e-12)
    momentum = returns.ewm(alpha=1 - MOMENTUM_DECAY, adjust=True).mean() / base
    np.testing.assert_allclose(terms[1:, -1], momentum[1:].clip(-3, 3), rtol=1e-9, atol=1e-12)


def test_the_terms_never_look_ahead(make_series) -> None:
    prices = make_series().prices
    np.testing.assert_array_equal(volatility_terms(prices[:200]), volatility_terms(prices)[:200])


def test_the_terms_stay_finite_where_prices_stand_still(make_series) -> None:
    prices = make_series().prices
    prices[100:300] = prices[100]
    assert np.isfinite(volatility_terms(prices)[1:]).all()


def test_the_further_ahead_the_longer_the_memory() -> None:
    near, far = prior_weights(1), prior_weights(250)
    assert near[TERMS.index("fast")] > far[TERMS.index("fast")] >= 0
    assert near[TERMS.index("slowest")] < far[TERMS.index("slowest")]
