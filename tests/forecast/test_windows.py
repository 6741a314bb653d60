"""Windows, targets, the purged split and the scaler, against examples small enough to count by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambakit.errors import DataError
from mambakit.forecast.windows import CLIP, FeatureScaler, SequenceGenerator, temporal_split


def test_windows_and_targets_of_a_series_counted_by_hand() -> None:
    features = np.arange(10.0)[:, None]  # row t holds t
    prices = 2.0 ** np.arange(10)  # each day doubles
    X, y = SequenceGenerator(sequence_length=3, prediction_horizons=(1, 4)).generate_sequences(features, prices)
    assert X[:, :, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]  # origin 5 is the last with day 9
    np.testing.assert_allclose(y[1], np.full((4, 1), np.log(2)))
    np.testing.assert_allclose(y[4], np.full((4, 1), 4 * np.log(2)))


def test_a_target_belongs_to_the_days_after_its_window() -> None:
    features = np.arange(8.0)[:, None]
    prices = np.array([1.0, 1, 1, 1, 5, 5, 5, 5])  # rises between day 3 and day 4
    X, y = SequenceGenerator(sequence_length=2, prediction_horizons=(1,)).generate_sequences(features, prices)
    jump = y[1][:, 0].argmax()
    assert X[jump, -1, 0] == 3
    assert y[1][:, 0].astype(bool).sum() == 1


def test_a_stride_skips_origins() -> None:
    features = np.arange(20.0)[:, None]
    X, y = SequenceGenerator(3, (1, 4), stride=5).generate_sequences(features, np.exp(features[:, 0]))
    assert X[:, -1, 0].tolist() == [2, 7, 12]
    assert y[4].shape == (3, 1)


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_windows_are_a_view_whatever_the_stride(stride: int) -> None:
    features = np.zeros((50, 2))
    X, _ = SequenceGenerator(5, (1,), stride).generate_sequences(features, np.ones(50))
    assert len(X) == len(range(4, 49, stride))
    assert np.shares_memory(X, features)
    features[4] = 1.0  # seen through every window that holds the row
    assert X[0, -1].tolist() == [1.0, 1.0]
    assert X[:, :, 0].sum() == len(range(0, 5, stride))
    assert not X.flags.writeable


def test_rows_of_the_warm_up_are_in_no_window() -> None:
    features = np.arange(12.0)[:, None]
    features[:4] = np.nan
    X, _ = SequenceGenerator(3, (2,)).generate_sequences(features, np.ones(12))
    assert np.isfinite(X).all()
    assert X[0, :, 0].tolist() == [4, 5, 6]
    assert X[-1, -1, 0] == 9


def test_a_hole_in_the_features_is_named() -> None:
    features = np.zeros((30, 2))
    features[11, 1] = np.nan
    with pytest.raises(DataError, match="row 11"):
        SequenceGenerator(3, (2,)).origins(features)


def test_too_few_rows_for_one_sample_are_refused() -> None:
    with pytest.raises(DataError, match="7 days after the warm-up are too few"):
        SequenceGenerator(5, (3,)).origins(np.zeros((7, 1)))
    assert SequenceGenerator(5, (3,)).origins(np.zeros((8, 1))).tolist() == [4]


def test_the_split_of_twenty_samples_purged_by_two_days() -> None:
    split = temporal_split(np.arange(100, 120), longest_horizon=2, shares=(0.6, 0.2, 0.2))
    assert split.training.tolist() == list(range(10))  # 10 and 11 see day 112, the first origin of validation
    assert split.validation.tolist() == [12, 13]
    assert split.test.tolist() == [16, 17, 18, 19]


@given(
    samples=st.integers(60, 400),
    stride=st.integers(1, 7),
    horizon=st.integers(1, 10),
)
def test_no_target_reaches_the_first_origin_of_the_next_part(samples: int, stride: int, horizon: int) -> None:
    origins = 13 + stride * np.arange(samples)
    split = temporal_split(origins, horizon, (0.6, 0.2, 0.2))
    for part, later in ((split.training, split.validation), (split.validation, split.test)):
        assert origins[part[-1]] + horizon < origins[later[0]]
        # One more sample would reach it: nothing is thrown away needlessly.
        assert origins[part[-1] + 1] + horizon >= origins[later[0]] or part[-1] + 1 == later[0]


def test_a_split_that_the_purge_empties_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        temporal_split(np.arange(100), longest_horizon=20, shares=(0.6, 0.2, 0.2))


def test_the_scaler_standardises_what_it_was_fitted_on() -> None:
    features = np.random.default_rng(0).normal(5.0, 3.0, (1000, 2))
    scaled = FeatureScaler.fit(features, ["a", "b"]).transform(features)
    np.testing.assert_allclose(scaled.mean(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=0), 1.0, atol=1e-6)


def test_a_column_that_never_changes_becomes_zero() -> None:
    scaler = FeatureScaler.fit(np.full((10, 1), 7.0), ["a"])
    assert scaler.transform(np.array([[7.0]])).tolist() == [[0.0]]


def test_a_crash_unlike_any_before_is_cut() -> None:
    scaler = FeatureScaler.fit(np.array([[-1.0], [1.0]]), ["a"])
    assert scaler.transform(np.array([[-1e9], [1e9]])).tolist() == [[-CLIP], [CLIP]]


def test_a_scaler_survives_json_bit_for_bit() -> None:
    scaler = FeatureScaler.fit(np.random.default_rng(1).normal(size=(30, 3)), ["a", "b", "c"])
    back = FeatureScaler.from_json(scaler.to_json())
    assert back.names == scaler.names
    np.testing.assert_array_equal(back.mean, scaler.mean)
    np.testing.assert_array_equal(back.deviation, scaler.deviation)
