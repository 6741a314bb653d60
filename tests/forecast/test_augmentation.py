"""What augmentation changes, how much, and all that it leaves alone."""

import numpy as np
import pytest
import torch

from mambakit.errors import DataError
from mambakit.forecast.augmentation import DataAugmentor, spline_basis

SAMPLES, LENGTH, COLUMNS = 400, 30, 3
MEANS, DEVIATIONS = np.array([0.0, 50.0, -2.0]), np.array([1.0, 10.0, 0.01])
OFF = {"noise": 0.0, "warp": 0.0, "dropout": 0.0}


@pytest.fixture
def X() -> np.ndarray:
    return MEANS + DEVIATIONS * np.random.default_rng(1).standard_normal((SAMPLES, LENGTH, COLUMNS))


@pytest.fixture
def y() -> dict[int, np.ndarray]:
    return {horizon: np.random.default_rng(horizon).standard_normal((SAMPLES, 1)) for horizon in (1, 5)}


def changed(augmented: np.ndarray, X: np.ndarray) -> np.ndarray:
    """(samples,) which ones are not bit for bit what they were."""
    return (augmented != X).any(axis=(1, 2))


@pytest.mark.parametrize("technique", [{"noise": 0.1}, {"warp": 0.2}, {"dropout": 0.9}, {}])
def test_about_the_rate_of_the_samples_is_altered_and_the_others_are_as_they_were(X, y, technique) -> None:
    options = {**OFF, **technique} if technique else {}
    augmented, _ = DataAugmentor(0.5, **options).augment(X, y)
    assert 0.4 < changed(augmented, X).mean() < 0.6
    assert augmented.shape == X.shape


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_none_or_all_are_altered(X, y, rate: float, share: float) -> None:
    assert changed(DataAugmentor(rate).augment(X, y)[0], X).mean() == share


def test_the_input_is_never_changed(X, y) -> None:
    before, targets = X.copy(), {horizon: target.copy() for horizon, target in y.items()}
    X.setflags(write=False)  # as a view of windows is
    augmented, altered_targets = DataAugmentor(1.0).augment(X, y)
    np.testing.assert_array_equal(X, before)
    augmented[:] = 0.0
    for horizon, target in altered_targets.items():
        np.testing.assert_array_equal(target, targets[horizon])  # targets stay
        target[:] = 0.0
        np.testing.assert_array_equal(y[horizon], targets[horizon])


def test_a_view_of_overlapping_windows_is_augmented_window_by_window() -> None:
    rows = np.random.default_rng(0).standard_normal((60, 2))
    windows = np.lib.stride_tricks.sliding_window_view(rows, 10, axis=0).transpose(0, 2, 1)
    augmented, _ = DataAugmentor(1.0, **{**OFF, "noise": 0.1}).augment(windows, {1: np.zeros((51, 1))})
    difference = augmented - windows
    assert not np.allclose(difference[0, 1:], difference[1, :-1])  # one row, two windows, two draws


def test_noise_is_in_deviations_of_each_column(X, y) -> None:
    augmented, _ = DataAugmentor(1.0, **{**OFF, "noise": 0.1}).augment(X, y)
    np.testing.assert_allclose((augmented - X).std(axis=(0, 1)) / DEVIATIONS, 0.1, rtol=0.05)
    np.testing.assert_allclose((augmented - X).mean(axis=(0, 1)) / DEVIATIONS, 0.0, atol=0.005)


def test_warping_is_a_smooth_factor_of_the_distance_from_the_mean(X, y) -> None:
    augmented, _ = DataAugmentor(1.0, **{**OFF, "warp": 0.2}).augment(X, y)
    mean = X.mean(axis=(0, 1))
    factor = (augmented - mean) / (X - mean)
    assert abs(factor.mean() - 1.0) < 0.01
    np.testing.assert_allclose(factor[:, [0, -1]].std(axis=(0, 2)), 0.2, rtol=0.1)  # at the outer knots
    # Four knots make one cubic: its fourth differences vanish.
    np.testing.assert_allclose(np.diff(factor, n=4, axis=1), 0.0, atol=1e-7)
    assert factor[0, 0, 0] != factor[0, 0, 1]  # each column has its own


def test_a_dropped_column_is_at_its_mean_for_the_whole_window(X, y) -> None:
    augmented, _ = DataAugmentor(1.0, **{**OFF, "dropout": 0.3}).augment(X, y)
    dropped = np.isclose(augmented, X.mean(axis=(0, 1)), rtol=1e-12, atol=1e-12).all(axis=1)  # (samples, columns)
    assert abs(dropped.mean() - 0.3) < 0.05
    kept = ~dropped[:, None, :]
    np.testing.assert_allclose(np.where(kept, augmented, 0.0), np.where(kept, X, 0.0), rtol=1e-12)


def test_one_seed_gives_one_result_and_each_call_another(X, y) -> None:
    first, second = DataAugmentor(seed=3), DataAugmentor(seed=3)
    once, again = first.augment(X, y)[0], first.augment(X, y)[0]
    np.testing.assert_array_equal(once, second.augment(X, y)[0])
    np.testing.assert_array_equal(again, second.augment(X, y)[0])
    assert changed(once, again).any()
    assert changed(once, DataAugmentor(seed=4).augment(X, y)[0]).any()


def test_single_precision_stays_single(X, y) -> None:
    assert DataAugmentor().augment(X.astype(np.float32), y)[0].dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_values_are_refused(X, y, value: float) -> None:
    X[7, 3, 1] = value
    with pytest.raises(DataError, match="X must be finite, sample 7 is not"):
        DataAugmentor().augment(X, y)
    X[7, 3, 1] = 0.0
    y[5][9] = value
    with pytest.raises(DataError, match=r"y\[5\] must be finite, sample 9"):
        DataAugmentor().augment(X, y)


def test_shapes_that_do_not_fit_are_refused(X, y) -> None:
    with pytest.raises(DataError, match=r"must be \(samples, length, columns\), got shape \(400, 30\)"):
        DataAugmentor().augment(X[..., 0], y)
    with pytest.raises(DataError, match=r"y\[1\] has 399 targets for 400 samples"):
        DataAugmentor().augment(X, {1: y[1][1:]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augmentation_rate": 1.5}, "augmentation_rate must be a probability"),
        ({"dropout": -0.1}, "dropout must be a probability"),
        ({"noise": -1.0}, "noise must be 0 or more"),
        ({"warp": np.nan}, "warp must be 0 or more"),
        ({"knots": 3}, "knots must be 4 or more"),
    ],
)
def test_a_parameter_out_of_range_is_named(options, words: str) -> None:
    with pytest.raises(DataError, match=words):
        DataAugmentor(**options)


def test_the_splines_pass_through_their_knots_and_keep_a_constant() -> None:
    basis = spline_basis(31, 4)  # rows 0, 10, 20 and 30 are knots
    np.testing.assert_allclose(basis[::10], np.eye(4), atol=1e-12)
    np.testing.assert_allclose(basis.sum(axis=1), 1.0)


@pytest.mark.parametrize("technique", [{"noise": 0.1}, {"warp": 0.2}, {"dropout": 0.5}])
def test_a_batch_of_tensors_is_altered_as_the_arrays_are(technique) -> None:
    features = torch.randn(2000, LENGTH, COLUMNS, dtype=torch.float64)
    before = features.clone()
    augmentor = DataAugmentor(0.5, **{**OFF, **technique})
    altered = augmentor.augment_batch(features, torch.Generator().manual_seed(0))
    assert torch.equal(features, before)
    hit = (altered != features).any(dim=2).any(dim=1)
    expected = 0.5 if "dropout" not in technique else 0.5 * (1 - 0.5**COLUMNS)
    assert abs(hit.double().mean() - expected) < 0.05
    arrays, _ = DataAugmentor(1.0, **{**OFF, **technique}).augment(features.numpy(), {})
    ours = (altered - features)[hit].square().mean().sqrt().item()
    difference = arrays - features.numpy()
    theirs = np.sqrt((difference[np.abs(difference).max(axis=(1, 2)) > 1e-9] ** 2).mean())
    assert ours == pytest.approx(theirs, rel=0.05)


def test_a_batch_follows_its_generator_and_keeps_its_dtype() -> None:
    features = torch.randn(8, LENGTH, COLUMNS)
    results = [DataAugmentor(1.0).augment_batch(features, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].dtype == torch.float32
