"""Features one day at a time are the features of the whole series."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.forecast.walks import random_walk

from mambakit.errors import DataError
from mambakit.forecast.feature_stream import FeatureStream
from mambakit.forecast.features import TimeSeriesFeatureEngineer
from mambakit.forecast.prices import fetch_historical_prices

# A position or a difference may be next to nothing: then it counts against the size that such columns have.
NEXT_TO_NOTHING = 1e-11


def assert_same(streamed: np.ndarray, batch: np.ndarray) -> None:
    np.testing.assert_allclose(streamed, batch, rtol=1e-9, atol=NEXT_TO_NOTHING)


@pytest.mark.parametrize("symbol", ["AAPL", "IBM"])
@pytest.mark.parametrize("include_volume", [False, True])
def test_thirteen_years_one_day_at_a_time_are_the_batch(symbol: str, include_volume: bool) -> None:
    series = fetch_historical_prices([symbol])[symbol]
    engineer = TimeSeriesFeatureEngineer(include_volume=include_volume)
    volumes = series.volumes if include_volume else None
    assert_same(
        FeatureStream(engineer).push_many(series.prices, volumes), engineer.extract_features(series.prices, volumes)
    )


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    windows=st.lists(st.integers(2, 70), min_size=1, max_size=4, unique=True),
    volume=st.booleans(),
    level=st.floats(1e-2, 1e5),
)
def test_any_windows_and_any_level_give_the_batch(seed: int, windows: list[int], volume: bool, level: float) -> None:
    series = random_walk(days=160, seed=seed)
    prices, volumes = level * series.prices, series.volumes if volume else None
    engineer = TimeSeriesFeatureEngineer(windows, volume)
    assert_same(FeatureStream(engineer).push_many(prices, volumes), engineer.extract_features(prices, volumes))


def test_a_price_that_stands_still_gives_the_batch() -> None:
    prices = random_walk(days=300).prices.copy()
    prices[100:200] = prices[100]
    engineer = TimeSeriesFeatureEngineer()
    assert_same(FeatureStream(engineer).push_many(prices), engineer.extract_features(prices))


def test_rows_are_nan_exactly_while_the_batch_warms_up() -> None:
    prices = random_walk(days=120).prices
    engineer = TimeSeriesFeatureEngineer()
    streamed = FeatureStream(engineer).push_many(prices)
    np.testing.assert_array_equal(np.isnan(streamed), np.isnan(engineer.extract_features(prices)))
    assert np.isfinite(streamed[engineer.warm_up :]).all()
    assert np.isnan(streamed[engineer.warm_up - 1]).any()


def test_one_push_is_one_row_of_many() -> None:
    prices = random_walk(days=120).prices
    engineer = TimeSeriesFeatureEngineer()
    one, many = FeatureStream(engineer), FeatureStream(engineer)
    rows = many.push_many(prices)
    assert rows.shape == (120, len(engineer.names))
    for price, row in zip(prices, rows, strict=True):
        np.testing.assert_array_equal(one.push(price), row)
    assert one.days == many.days == 120
    assert many.push_many([]).shape == (0, len(engineer.names))


@pytest.mark.parametrize("pushed", [0, 1, 13, 25, 59, 100])
@pytest.mark.parametrize("include_volume", [False, True])
def test_a_stream_saved_as_json_goes_on_bit_for_bit(pushed: int, include_volume: bool) -> None:
    series = random_walk(days=150)
    volumes = series.volumes if include_volume else np.full(150, None)
    stream = FeatureStream(TimeSeriesFeatureEngineer(include_volume=include_volume))
    for price, volume in zip(series.prices[:pushed], volumes[:pushed], strict=True):
        stream.push(price, volume)
    restored = FeatureStream.from_json(json.loads(json.dumps(stream.to_json(), allow_nan=False)))
    assert restored.days == pushed
    for price, volume in zip(series.prices[pushed:], volumes[pushed:], strict=True):
        np.testing.assert_array_equal(restored.push(price, volume), stream.push(price, volume))


def test_what_is_kept_does_not_grow_with_the_days() -> None:
    stream = FeatureStream(TimeSeriesFeatureEngineer(include_volume=True))
    series = random_walk(days=1000)

    def numbers() -> int:
        saved = stream.to_json()
        return sum(len(value) for value in saved.values() if isinstance(value, list | dict))

    stream.push_many(series.prices[:100], series.volumes[:100])
    after_a_hundred = numbers()
    stream.push_many(series.prices[100:], series.volumes[100:])
    assert numbers() == after_a_hundred


@pytest.mark.parametrize("price", [np.nan, np.inf, 0.0, -1.0])
def test_an_impossible_price_is_refused_and_forgotten(price: float) -> None:
    prices = random_walk(days=120).prices
    engineer = TimeSeriesFeatureEngineer()
    stream = FeatureStream(engineer)
    stream.push_many(prices[:100])
    with pytest.raises(DataError, match="price must be positive and finite"):
        stream.push(price)
    assert_same(stream.push_many(prices[100:]), engineer.extract_features(prices)[100:])


def test_volumes_are_given_exactly_when_they_are_used() -> None:
    with_volume = FeatureStream(TimeSeriesFeatureEngineer(include_volume=True))
    with pytest.raises(DataError, match="exactly when include_volume"):
        with_volume.push(10.0)
    with pytest.raises(DataError, match="volume must be finite and not negative"):
        with_volume.push(10.0, np.nan)
    with pytest.raises(DataError, match="2 prices and 1 volumes"):
        with_volume.push_many([1.0, 2.0], np.ones(1))
    with pytest.raises(DataError, match="exactly when include_volume"):
        FeatureStream(TimeSeriesFeatureEngineer()).push(10.0, 1.0)
    assert with_volume.days == 0


def test_what_is_no_saved_stream_is_refused() -> None:
    saved = FeatureStream(TimeSeriesFeatureEngineer()).to_json()
    del saved["averages"]
    with pytest.raises(DataError, match="no saved feature stream: KeyError at 'averages'"):
        FeatureStream.from_json(saved)
