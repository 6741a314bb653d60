"""A loss that is not finite stops the run, and the message says where it began."""

import pytest
import torch
from tests.training.toy import squared_error, toy_model, training_data, validation_data
from torch import nn

from mambakit.errors import TrainingDiverged
from mambakit.training import TrainingConfig, fit

CONFIG = TrainingConfig(epochs=3, batch_size=8)


class BreaksInEpochTwo(nn.Module):
    """Passes its input on; from the given training step on, what `broken` makes of it."""

    def __init__(self, broken, at_step):
        super().__init__()
        self.broken = broken
        self.at_step = at_step
        self.step = 0

    def forward(self, x):
        self.step += self.training
        return self.broken(x) if self.step >= self.at_step else x


def diverge(model, objective=squared_error, training=None, validation=None, config=CONFIG):
    with pytest.raises(TrainingDiverged) as caught:
        fit(model, objective, training or training_data(), validation or validation_data(), config, quiet=True)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_a_layer(layer):
    model = toy_model()
    model[2] = layer
    return model


def test_the_message_names_epoch_step_module_and_a_way_out():
    # Three steps an epoch: step 5 is the second of epoch 2.
    message = diverge(with_a_layer(BreaksInEpochTwo(lambda x: x / 0, at_step=5)))
    assert message.startswith("training diverged in epoch 2, step 2 of 3: the loss is ")
    assert "The data of the batch is finite." in message
    assert "The first values that are not finite come from the module '2' (BreaksInEpochTwo)." in message
    assert message.endswith("lower learning_rate (now 0.001), or lower clip_norm (now 1.0).")


def test_without_clipping_the_message_says_to_clip():
    message = diverge(
        with_a_layer(BreaksInEpochTwo(lambda x: x / 0, at_step=1)), config=CONFIG.model_copy(update={"clip_norm": None})
    )
    assert message.endswith("or set clip_norm (1.0 is usual).")


def test_data_that_was_not_standardised_is_named():
    data = training_data()
    data.x[:, 1] *= 1e6
    message = diverge(with_a_layer(BreaksInEpochTwo(lambda x: x / 0, at_step=1)), training=data)
    assert "is finite, but reaches " in message
    assert "in batch['x']: standardise it." in message


def test_bad_data_is_named_with_its_place_and_sample():
    data = training_data()
    data.x[13, 2] = float("nan")
    message = diverge(toy_model(), training=data)
    assert "the loss is nan" in message
    assert "not finite, in batch['x'], first at sample 13." in message


def test_a_gradient_that_is_not_finite_is_named_though_the_loss_is_finite():
    def root_of_zero(x):
        return x + (x * 0).abs().sqrt()

    message = diverge(with_a_layer(BreaksInEpochTwo(root_of_zero, at_step=1)))
    assert "but its gradient is not finite" in message
    assert "come from the gradient of '0." in message


def test_a_loss_that_breaks_outside_the_modules_is_told_apart():
    def objective(model, batch):
        return squared_error(model, batch)[0] * torch.inf, {}

    assert "began in the computation of the loss" in diverge(toy_model(), objective)


def test_weights_that_came_broken_are_named():
    model = toy_model()
    with torch.no_grad():
        model[3].weight[0, 0] = float("inf")
    message = diverge(model)
    assert "epoch 0, in validation" in message
    assert "first '3.weight'" in message


def test_bad_validation_data_is_named():
    data = validation_data()
    data.y[8, 0] = float("inf")
    message = diverge(toy_model(), validation=data)
    assert "epoch 0, in validation: the loss is inf" in message
    assert "in batch['y'], first at sample 8." in message


def test_gradients_too_large_for_their_norm_are_told_apart():
    def objective(model, batch):
        return squared_error(model, batch)[0] * (1e200 if model.training else 1.0), {}

    assert "too large for their norm" in diverge(toy_model(), objective)


def test_the_weights_stay_as_they_were_before_the_bad_step():
    model = with_a_layer(BreaksInEpochTwo(lambda x: x / 0, at_step=1))
    before = [parameter.clone() for parameter in model.parameters()]
    diverge(model)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
