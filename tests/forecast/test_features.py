"""Features against independent formulas in pandas, and the two properties they live by: causal, and free of scale."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.forecast.walks import random_walk

from mambakit.errors import DataError
from mambakit.forecast.features import TimeSeriesFeatureEngineer

DAYS = 10  # one of the windows, for the formulas below


def wilder_rsi(prices: pd.Series, days: int) -> pd.Series:
    """RSI with Wilder's smoothing, seeded by the mean of the first `days` changes."""
    change = prices.diff()
    sides = []
    for side in (change.clip(lower=0), -change.clip(upper=0)):
        smooth = pd.Series(np.nan, prices.index)
        smooth[days] = side[1 : days + 1].mean()
        for day in range(days + 1, len(prices)):
            smooth[day] = (smooth[day - 1] * (days - 1) + side[day]) / days
        sides.append(smooth)
    return sides[0] / (sides[0] + sides[1])


def seeded_ema(values: pd.Series, days: int) -> pd.Series:
    """EMA that starts at the mean of the first `days` values."""
    first = values.first_valid_index()
    smooth = pd.Series(np.nan, values.index)
    start = first + days - 1
    smooth[start] = values[first : start + 1].mean()
    for day in range(start + 1, len(values)):
        smooth[day] = smooth[day - 1] + (values[day] - smooth[day - 1]) * 2 / (days + 1)
    return smooth


P = pd.Series(random_walk().prices)
R = np.log(P).diff()
FORMULAS = {
    "normalised_price": (P - P.rolling(60).mean()) / P.rolling(60).std(ddof=0),
    "simple_return": P.pct_change(),
    "log_return": R,
    f"sma_{DAYS}": np.log(P / P.rolling(DAYS).mean()),
    f"ema_{DAYS}": np.log(P / seeded_ema(P, DAYS)),
    f"volatility_{DAYS}": np.log(R.rolling(DAYS).std(ddof=0)),
    f"momentum_{DAYS}": np.log(P / P.shift(DAYS)) / (R.rolling(DAYS).std(ddof=0) * np.sqrt(DAYS)),
    f"rate_of_change_{DAYS}": P / P.shift(DAYS) - 1,
    f"range_position_{DAYS}": (P - P.rolling(DAYS).min()) / (P.rolling(DAYS).max() - P.rolling(DAYS).min()),
    "rsi_14": wilder_rsi(P, 14),
    "bollinger_position": (P - P.rolling(20).mean() + 2 * P.rolling(20).std(ddof=0)) / (4 * P.rolling(20).std(ddof=0)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_feature_is_its_formula(name: str) -> None:
    engineer = TimeSeriesFeatureEngineer()
    features = engineer.extract_features(P.to_numpy())[:, engineer.names.index(name)]
    expected = FORMULAS[name].to_numpy()
    np.testing.assert_allclose(features[engineer.warm_up :], expected[engineer.warm_up :], rtol=1e-6, atol=1e-9)


def test_macd_is_the_difference_of_two_averages_relative_to_the_price() -> None:
    engineer = TimeSeriesFeatureEngineer()
    features = pd.DataFrame(engineer.extract_features(P.to_numpy()), columns=engineer.names)
    # TA-Lib starts the fast average where the slow one starts, so only a seed that has faded is compared.
    line = (P.ewm(span=12, adjust=False).mean() - P.ewm(span=26, adjust=False).mean())[250:]
    np.testing.assert_allclose(features["macd"][250:], line / P[250:], atol=1e-6)
    np.testing.assert_allclose(features["macd_histogram"], features["macd"] - features["macd_signal"], atol=1e-12)


def test_turnover_is_relative_to_its_own_mean(make_series) -> None:
    series = make_series()
    engineer = TimeSeriesFeatureEngineer(include_volume=True)
    features = engineer.extract_features(series.prices, series.volumes)[:, engineer.names.index(f"turnover_{DAYS}")]
    turnover = pd.Series(series.prices * series.volumes)
    np.testing.assert_allclose(features[DAYS:], np.log(turnover / turnover.rolling(DAYS).mean())[DAYS:], rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), last=st.integers(62, 199), volume=st.booleans())
def test_no_feature_of_a_day_depends_on_a_later_day(seed: int, last: int, volume: bool) -> None:
    series = random_walk(days=200, seed=seed)
    engineer = TimeSeriesFeatureEngineer(include_volume=volume)

    def features(days: int) -> np.ndarray:
        return engineer.extract_features(series.prices[:days], series.volumes[:days] if volume else None)

    np.testing.assert_array_equal(features(last), features(200)[:last])


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(1e-2, 1e3))
def test_features_do_not_know_the_level_of_the_price(factor: float) -> None:
    engineer = TimeSeriesFeatureEngineer()
    ours = engineer.extract_features(P.to_numpy())[engineer.warm_up :]
    scaled = engineer.extract_features(P.to_numpy() * factor)[engineer.warm_up :]
    np.testing.assert_allclose(scaled, ours, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("windows", [(5, 10, 20, 60), (5,), (100,)])
def test_warm_up_is_exactly_the_rows_that_lack_history(windows: tuple[int, ...]) -> None:
    engineer = TimeSeriesFeatureEngineer(windows)
    complete = np.isfinite(engineer.extract_features(P.to_numpy())).all(axis=1)
    assert complete.argmax() == engineer.warm_up
    assert complete[engineer.warm_up :].all()


def test_a_price_that_stands_still_for_weeks_gives_finite_features() -> None:
    prices = P.to_numpy().copy()
    prices[200:300] = prices[200]
    engineer = TimeSeriesFeatureEngineer()
    assert np.isfinite(engineer.extract_features(prices)[engineer.warm_up :]).all()


def test_there_is_a_name_for_every_column(make_series) -> None:
    series = make_series()
    for engineer, volumes in (
        (TimeSeriesFeatureEngineer([7, 30]), None),
        (TimeSeriesFeatureEngineer([7, 30], include_volume=True), series.volumes),
    ):
        features = engineer.extract_features(series.prices, volumes)
        assert features.shape == (len(series), len(engineer.names))
        assert len(set(engineer.names)) == len(engineer.names)


def test_volumes_are_given_exactly_when_they_are_used(make_series) -> None:
    series = make_series()
    with pytest.raises(DataError, match="volumes"):
        TimeSeriesFeatureEngineer(include_volume=True).extract_features(series.prices)
    with pytest.raises(DataError, match="volumes"):
        TimeSeriesFeatureEngineer().extract_features(series.prices, series.volumes)


def test_every_feature_that_is_promised_has_a_column() -> None:
    promised = ["normalised_price", "simple_return", "log_return", "rsi_14", "bollinger_position"]
    promised += ["macd", "macd_signal", "macd_histogram"]
    for days in (5, 10, 20, 60):
        promised += [f"sma_{days}", f"ema_{days}", f"volatility_{days}", f"momentum_{days}"]
        promised += [f"rate_of_change_{days}", f"range_position_{days}"]
    assert sorted(TimeSeriesFeatureEngineer(windows=[5, 10, 20, 60], include_volume=False).names) == sorted(promised)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_price_that_would_spoil_the_days_after_it_is_named(value: float) -> None:
    prices = P.to_numpy().copy()
    prices[77] = value
    with pytest.raises(DataError, match=f"prices must be finite and positive, row 77 is {value:g}"):
        TimeSeriesFeatureEngineer().extract_features(prices)


def test_unknown_volumes_can_not_be_a_feature(make_series) -> None:
    series = make_series()
    with pytest.raises(DataError, match="volumes must be finite and not negative, row 0 is nan"):
        TimeSeriesFeatureEngineer(include_volume=True).extract_features(series.prices, np.full(len(series), np.nan))
    with pytest.raises(DataError, match="460 prices and 459 volumes"):
        TimeSeriesFeatureEngineer(include_volume=True).extract_features(series.prices, series.volumes[1:])


def test_a_table_of_prices_is_refused() -> None:
    with pytest.raises(DataError, match=r"prices must be one-dimensional, .* got shape \(230, 2\)"):
        TimeSeriesFeatureEngineer().extract_features(P.to_numpy().reshape(230, 2))


@pytest.mark.parametrize("windows", [(), (5, 5), (1, 5)])
def test_windows_that_are_none_are_refused(windows: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="windows must be different numbers of days, each 2 or more"):
        TimeSeriesFeatureEngineer(windows)
