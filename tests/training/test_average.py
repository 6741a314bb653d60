"""The average of the weights along a run."""

import pytest
import torch
from test_resume import Interrupted, assert_same, interrupt_after, run, without_seconds
from tests.training.toy import squared_error, toy_model, training_data, validation_data

from mambakit.training import TrainingConfig, fit
from mambakit.training.average import WeightAverage

CONFIG = TrainingConfig(epochs=4, batch_size=8, learning_rate=0.05, average_decay=0.9)


def test_the_average_is_the_recurrence_with_a_decay_that_grows_into_its_value():
    weight = torch.zeros(2, dtype=torch.float64)
    average = WeightAverage([weight], decay=0.3)
    expected = weight.clone()
    for step in range(20):
        weight += 1
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(average.copy()["0"], expected)


def test_the_parameters_are_their_average_inside_the_block_alone():
    weight = torch.ones(2)
    average = WeightAverage([weight], decay=0.5)
    weight.fill_(5.0)
    with average.in_place():
        assert weight.tolist() == [1.0, 1.0]
    assert weight.tolist() == [5.0, 5.0]
    assert average.copy()["0"].tolist() == [1.0, 1.0]


def test_the_averaged_weights_are_what_is_validated_and_kept():
    model = toy_model()
    record = fit(model, squared_error, training_data(), validation_data(), CONFIG, quiet=True)
    data = validation_data()
    with torch.no_grad():
        loss = float(squared_error(model, data.batch(torch.arange(len(data))))[0])
    assert record.best_epoch > 0
    assert loss == pytest.approx(record.best_validation_loss)
    plain = toy_model()
    fit(
        plain,
        squared_error,
        training_data(),
        validation_data(),
        CONFIG.model_copy(update={"average_decay": None}),
        quiet=True,
    )
    assert not torch.equal(plain[0].weight, model[0].weight)


def test_a_resumed_run_goes_on_with_the_average(tmp_path):
    whole, weights = run(tmp_path / "whole", CONFIG)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", CONFIG, on_epoch=interrupt_after(2))
    resumed, same = run(tmp_path / "cut", CONFIG, resume=True)
    assert without_seconds(resumed) == without_seconds(whole)
    assert_same(same, weights)
