"""What is usual for a model's inputs is learnt from its own training part."""

import json
from pathlib import Path

import numpy as np
import pytest

from mambakit.errors import ArtefactError
from mambakit.forecast.artefact import save_forecaster
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.dataset import raw_features
from mambakit.forecast.reference import (
    Reference,
    inside,
    load_reference,
    make_reference,
    scaled_crps,
    stability_index,
)
from mambakit.forecast.train import TrainedForecaster


@pytest.fixture(scope="module")
def reference(trained: TrainedForecaster) -> Reference:
    return make_reference(trained)


def training_features(trained: TrainedForecaster) -> np.ndarray:
    prepared = trained.prepared
    last = prepared.origins[prepared.split.training[-1]]
    first = prepared.origins[0] - prepared.config.sequence_length + 1
    return raw_features(prepared.series, prepared.config)[first : last + 1]


def test_the_index_is_its_formula_and_zero_for_equal_shares() -> None:
    assert stability_index(np.array([10, 30]), np.array([100, 300])) == pytest.approx(0, abs=1e-3)
    expected = (0.9 - 0.5) * np.log(0.9 / 0.5) + (0.1 - 0.5) * np.log(0.1 / 0.5)
    assert stability_index(np.array([90_000, 10_000]), np.array([5_000, 5_000])) == pytest.approx(expected, rel=1e-3)
    assert np.isfinite(stability_index(np.array([50, 0]), np.array([0, 50])))


def test_the_training_part_does_not_drift_from_itself(trained: TrainedForecaster, reference: Reference) -> None:
    measured = reference.drift(training_features(trained))
    assert measured is not None
    assert measured[0].max() < 1e-9
    assert (measured[1] > 0).all()


def test_a_stretch_of_the_training_part_is_mostly_within_what_is_usual(
    trained: TrainedForecaster, reference: Reference
) -> None:
    measured = reference.drift(training_features(trained)[40:100])
    assert measured is not None
    assert (measured[0] < measured[1]).mean() > 0.8


def test_a_moved_feature_is_beyond_what_is_usual(trained: TrainedForecaster, reference: Reference) -> None:
    features = training_features(trained)[-60:].copy()
    moved = reference.names.index("log_return")
    features[:, moved] += 1.0
    measured = reference.drift(features)
    assert measured is not None
    assert measured[0][moved] > max(0.25, measured[1][moved])


def test_too_few_days_or_other_features_tell_nothing(trained: TrainedForecaster, reference: Reference) -> None:
    features = training_features(trained)
    assert reference.drift(features[:59]) is None
    assert reference.drift(np.where(np.arange(len(features))[:, None] < 59, features, np.nan)) is None
    assert reference.drift(features[:, :-1]) is None


def test_tied_values_have_fewer_bins_and_a_finite_index(trained: TrainedForecaster, reference: Reference) -> None:
    for edges, counts in zip(reference.edges, reference.counts, strict=True):
        assert (np.diff(edges) > 0).all()
        assert len(counts) == len(edges) + 1
        assert counts.sum() == len(training_features(trained))


def test_the_promise_is_the_coverage_and_loss_of_the_test_part(
    trained: TrainedForecaster, reference: Reference
) -> None:
    for score in trained.evaluation.scores:
        if score.forecaster == "mamba":
            promise = reference.promises[score.horizon]
            assert promise.coverage["0.8"] == pytest.approx(score.coverage_80)
            assert 0 < promise.loss < 2
            assert promise.loss_error > 0
            assert promise.samples == len(trained.prepared.split.test)


def test_the_scaled_crps_of_many_normal_quantiles_is_that_of_the_normal_distribution() -> None:
    from statistics import NormalDist

    levels = (np.arange(1000) + 0.5) / 1000
    quantiles = np.array([NormalDist().inv_cdf(level) for level in levels])
    # Gneiting and Raftery (2007): at its centre, (sqrt 2 - 1) / sqrt pi; half of it in units of twice the deviation.
    crps = scaled_crps(quantiles[None], np.zeros(1), levels, np.full(1, 2.0))
    assert crps[0] == pytest.approx((np.sqrt(2) - 1) / np.sqrt(np.pi) / 2, rel=1e-3)


def test_an_interval_without_its_bounds_is_not_judged() -> None:
    levels, quantiles = np.array([0.1, 0.5, 0.9]), np.array([[-1.0, 0.0, 1.0]])
    assert inside(quantiles, np.array([0.5]), levels, 0.8).tolist() == [True]
    assert inside(quantiles, np.array([1.5]), levels, 0.8).tolist() == [False]
    assert inside(quantiles, np.array([0.5]), levels, 0.95) is None


def test_a_stored_version_carries_its_reference(
    trained: TrainedForecaster, reference: Reference, tmp_path: Path
) -> None:
    save_forecaster(tmp_path, trained, "v1")
    loaded = load_reference(tmp_path)
    assert loaded is not None
    assert loaded.to_json() == reference.to_json()
    assert json.loads((tmp_path / "reference.json").read_text())["names"] == list(trained.prepared.scaler.names)


def test_a_version_without_reference_has_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert load_reference(tmp_path) is None
    for content in ("[]", "{}", '{"names": 3}', "{"):
        (tmp_path / "reference.json").write_text(content)
        with pytest.raises(ArtefactError, match=r"reference\.json"):
            load_reference(tmp_path)
    assert 0.5 in QUANTILES
