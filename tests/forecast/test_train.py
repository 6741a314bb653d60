"""Training on series whose secret is known: it is found where there is one, and not where there is none."""

import numpy as np
import pytest
import torch
from tests.forecast.walks import random_walk

from mambakit.forecast.config import SEQUENCE_TRAINING, WINDOW_TRAINING
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.report import skill_line, verdict
from mambakit.forecast.shrinkage import choose_factor, measure_shrinkage
from mambakit.forecast.train import forecast_samples, train_prepared, untrained_model

QUICK = SEQUENCE_TRAINING.model_copy(update={"epochs": 60, "patience": 40, "learning_rate": 1e-2})


def test_a_planted_signal_is_found(small_config) -> None:
    series = random_walk(days=1200, memory=0.7)
    trained = train_prepared(prepare_series(series, small_config), QUICK, quiet=True)
    tomorrow = trained.evaluation.scores[0]
    assert (tomorrow.forecaster, tomorrow.horizon) == ("mamba", 1)
    assert tomorrow.r2_drift > 0.2  # all of the signal would be 0.49
    assert tomorrow.hit_p_value < 0.01
    assert "lower squared error than random walk and drift at 1d" in skill_line(trained.evaluation)


def test_no_skill_is_claimed_on_a_random_walk(small_config) -> None:
    evaluations = [
        train_prepared(prepare_series(random_walk(seed=seed), small_config), QUICK, quiet=True).evaluation
        for seed in range(3)
    ]
    assert "did not beat the baselines: 0 of 12" in verdict(evaluations)


def test_one_seed_gives_one_result(prepared) -> None:
    training = QUICK.model_copy(update={"epochs": 1})
    first, second, other = (
        train_prepared(prepared, training.model_copy(update={"seed": seed}), quiet=True).model.state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_making_an_untrained_model_leaves_the_callers_randomness_alone(prepared) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    untrained_model(prepared, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_the_shrinkage_is_least_squares_less_one_standard_error() -> None:
    generator = np.random.default_rng(0)
    departure = generator.normal(size=4000)
    noise = generator.normal(size=4000)
    best = (departure * (0.5 * departure + noise)).sum() / (departure**2).sum()
    error = (departure * (0.5 * departure + noise - best * departure)).std() / np.sqrt(4000) / (departure**2).mean()
    assert measure_shrinkage(departure, 0.5 * departure + noise, horizon=1) == pytest.approx(best - error, rel=1e-6)


@pytest.mark.parametrize(("true", "expected"), [(3.0, 1.0), (-3.0, 0.0)])
def test_the_shrinkage_stays_between_nothing_and_all(true: float, expected: float) -> None:
    departure = np.random.default_rng(1).normal(size=500)
    assert measure_shrinkage(departure, true * departure, horizon=5) == expected


def test_no_departure_has_no_shrinkage() -> None:
    assert measure_shrinkage(np.zeros(50), np.random.default_rng(2).normal(size=50), horizon=5) == 0.0


def test_the_mean_departs_from_the_drift_exactly_where_validation_supports_it(trained) -> None:
    model, prepared = trained.model, trained.prepared
    forecast = forecast_samples(model, prepared.part(prepared.split.test))
    moves = (forecast.mean - model.drift).abs().amax(dim=0) > 0
    assert torch.equal(moves, model.shrinkage > 0)
    assert moves.any()


def test_training_does_no_worse_on_the_validation_part_than_the_untrained_model(trained) -> None:
    losses = [entry["validation_loss"] for entry in trained.record.history]
    assert trained.record.best_validation_loss == min(losses) < losses[0]


def test_training_comes_out_alike_for_any_number_of_threads(prepared) -> None:
    training = QUICK.model_copy(update={"epochs": 2})
    before = torch.get_num_threads()
    weights = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weights.append(train_prepared(prepared, training, quiet=True).model.state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_does_not_depend_on_what_was_trained_before(prepared, small_config) -> None:
    training = QUICK.model_copy(update={"epochs": 1})
    first = train_prepared(prepared, training, quiet=True).model.state_dict()
    train_prepared(prepare_series(random_walk(seed=5), small_config), training, quiet=True)
    again = train_prepared(prepared, training, quiet=True).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_windows_find_the_planted_signal_too(window_config) -> None:
    prepared = prepare_series(random_walk(days=1200, memory=0.7), window_config)
    training = WINDOW_TRAINING.model_copy(update={"epochs": 12, "learning_rate": 1e-2})
    tomorrow = train_prepared(prepared, training, quiet=True).evaluation.scores[0]
    assert tomorrow.r2_drift > 0.2


def test_a_width_that_helps_is_kept_and_one_that_does_not_is_dropped() -> None:
    generator = np.random.default_rng(3)
    cautious = generator.exponential(size=400)
    assert choose_factor(np.stack([cautious, cautious - 0.5], axis=1), 1) == 1
    assert choose_factor(np.stack([cautious, cautious + generator.normal(0, 1, 400)], axis=1), 1) == 0
    assert choose_factor(np.stack([cautious, cautious], axis=1), 1) == 0


def test_samples_of_one_day_count_as_one() -> None:
    generator = np.random.default_rng(0)
    departure, residual = np.repeat(generator.normal(size=(2, 300)), 4, axis=1)
    days = np.repeat(np.arange(300), 4)
    once = measure_shrinkage(departure[::4], 0.5 * departure[::4] + residual[::4], horizon=1)
    assert measure_shrinkage(departure, 0.5 * departure + residual, 1, days) == pytest.approx(once)
    assert measure_shrinkage(departure, 0.5 * departure + residual, 1) > once
