"""Features and normaliser: their definitions, and that ticks and whole sequences give the same."""

import numpy as np
import pytest

from mambakit.stream import FeatureEngineer, SequenceNormalizer
from mambakit.stream.plain.features import AVERAGES, DEVIATIONS, FEATURES_PER_INPUT, MEANS, feature_names

STATES = np.random.default_rng(0).standard_normal((3, 60, 4)).astype(np.float32)


def by_ticks(maker, states):
    return np.stack([maker.update(state) for state in states])


def columns(features, kind):
    names = feature_names(["a", "b", "c", "d"])
    return features[..., [position for position, name in enumerate(names) if name[2:] == kind]]


def test_there_are_thirteen_features_for_each_input():
    assert FEATURES_PER_INPUT == 13
    assert FeatureEngineer(4).transform(STATES).shape == (3, 60, 52)
    names = feature_names(["a", "b", "c", "d"])
    assert len(names) == len(set(names)) == 52


def test_windows_and_decays_are_those_of_the_contestants():
    assert MEANS == (3, 5, 10, 20)
    assert DEVIATIONS == (5, 10, 20)
    assert AVERAGES == (0.1, 0.3, 0.5)


@pytest.mark.parametrize("step", [0, 1, 2, 4, 19, 20, 59])
def test_every_feature_is_its_definition(step):
    x = STATES[0].astype(np.float64)
    found = FeatureEngineer(4).transform(STATES)[0, step]
    delta = np.diff(x, axis=0, prepend=x[:1])
    assert columns(found, "raw") == pytest.approx(x[step])
    assert columns(found, "delta") == pytest.approx(delta[step], abs=1e-6)
    assert columns(found, "acceleration") == pytest.approx(np.diff(delta, axis=0, prepend=delta[:1])[step], abs=1e-6)
    for width in MEANS:
        window = x[max(0, step - width + 1) : step + 1]
        assert columns(found, f"mean_{width}") == pytest.approx(window.mean(axis=0), abs=1e-6)
    for width in DEVIATIONS:
        window = x[max(0, step - width + 1) : step + 1]
        assert columns(found, f"deviation_{width}") == pytest.approx(window.std(axis=0), abs=1e-6)
    for a in AVERAGES:
        weights = np.array([(1 - a) ** step, *(a * (1 - a) ** (step - s) for s in range(1, step + 1))])
        assert columns(found, f"average_{a}") == pytest.approx(weights @ x[: step + 1], abs=1e-6)


@pytest.mark.parametrize("maker", [FeatureEngineer, SequenceNormalizer])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_ticks_and_whole_sequences_agree_to_rounding(maker, offset):
    states = STATES + np.float32(offset)
    whole = maker(4).transform(states)
    for sequence, expected in zip(states, whole, strict=True):
        np.testing.assert_allclose(by_ticks(maker(4), sequence), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("maker", [FeatureEngineer, SequenceNormalizer])
def test_a_reset_forgets_the_sequence_before(maker):
    used = maker(4)
    by_ticks(used, STATES[0])
    used.reset()
    assert np.array_equal(by_ticks(used, STATES[1]), by_ticks(maker(4), STATES[1]))


@pytest.mark.parametrize("maker", [FeatureEngineer, SequenceNormalizer])
def test_what_was_returned_does_not_change_later(maker):
    made = maker(4)
    first = made.update(STATES[0, 0])
    copy = first.copy()
    by_ticks(made, STATES[0, 1:])
    assert np.array_equal(first, copy)


def test_the_normaliser_gives_the_score_within_the_sequence_so_far():
    x = STATES[0].astype(np.float64)
    found = SequenceNormalizer(4).transform(STATES)[0]
    for step in (1, 7, 59):
        seen = x[: step + 1]
        assert found[step] == pytest.approx((x[step] - seen.mean(axis=0)) / seen.std(axis=0), abs=1e-5)


def test_the_first_tick_and_a_feature_that_never_moves_are_zero_and_not_nan():
    states = np.full((1, 30, 4), 7.5, dtype=np.float32)
    assert not SequenceNormalizer(4).transform(states).any()
    assert not by_ticks(SequenceNormalizer(4), states[0]).any()
    assert not SequenceNormalizer(4).transform(STATES)[:, 0].any()


def test_welford_keeps_its_digits_far_from_zero():
    """With E[x^2] - E[x]^2 in float32, or even float64, a million and a spread of 1e-3 would be lost."""
    states = (1e6 + 1e-3 * np.random.default_rng(0).standard_normal((1, 500, 4))).astype(np.float64)
    found = SequenceNormalizer(4).transform(states)[0, -1]
    assert found == pytest.approx((states[0, -1] - states[0].mean(axis=0)) / states[0].std(axis=0), rel=1e-3)


@pytest.mark.parametrize("maker", [FeatureEngineer, SequenceNormalizer])
def test_a_wrong_width_is_refused(maker):
    with pytest.raises(ValueError, match="4 inputs, got 3"):
        maker(4).transform(STATES[..., :3])
