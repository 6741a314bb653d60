"""Which parameters decay, and the learning rate of each step."""

import math

import pytest
import torch
from torch import nn

from mambakit.errors import MambakitError
from mambakit.training import TrainingConfig
from mambakit.training.optimizer import learning_rate, make_optimizer, parameter_groups

STEPS = 100


class Mixer(nn.Module):
    """One parameter of each kind; all with two dimensions or more where the rule goes by name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.tied = self.weight
        self.A_log = nn.Parameter(torch.ones(2, 2))
        self.D = nn.Parameter(torch.ones(2, 2))
        self.B_bias = nn.Parameter(torch.ones(2, 2))
        self.scale = nn.Parameter(torch.ones(2))
        self.norm = nn.LayerNorm((2, 2))
        self.marked = nn.Parameter(torch.ones(2, 2))
        self.marked._no_weight_decay = True
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def config(**settings):
    return TrainingConfig(**{"learning_rate": 1.0, "warmup_fraction": 0.0, "min_learning_rate_ratio": 0.1, **settings})


def rates(settings, losses=()):
    return [learning_rate(settings, step, STEPS, losses) for step in range(STEPS)]


def test_only_weight_matrices_decay_and_each_parameter_comes_once():
    model = Mixer()
    decayed, kept = parameter_groups(model, weight_decay=0.5)
    assert decayed["weight_decay"] == 0.5
    assert kept["weight_decay"] == 0.0
    assert [id(parameter) for parameter in decayed["params"]] == [id(model.weight)]
    others = [model.A_log, model.D, model.B_bias, model.scale, model.marked, model.norm.weight, model.norm.bias]
    assert {id(parameter) for parameter in kept["params"]} == {id(parameter) for parameter in others}
    assert len(kept["params"]) == len(others)


def test_a_step_without_gradient_shrinks_only_what_decays():
    model = Mixer()
    optimizer = make_optimizer(model, config(weight_decay=0.5, learning_rate=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, torch.full((2, 2), 1 - 0.1 * 0.5))
    assert torch.equal(model.A_log, torch.ones(2, 2))


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(MambakitError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)


def test_warm_restarts_go_from_the_full_rate_to_the_lowest_in_cycles_of_doubling_length():
    # 100 steps of 10 epochs: cycles of 1, 2, 4 and the rest of 8 epochs.
    found = rates(config(schedule="restarts", restart_epochs=1, epochs=10))
    for start, length in ((0, 10), (10, 20), (30, 40), (70, 80)):
        cycle = [0.1 + 0.9 * (1 + math.cos(math.pi * step / length)) / 2 for step in range(length)]
        assert found[start : start + length] == pytest.approx(cycle[: STEPS - start])


@pytest.mark.parametrize("settings", [{"schedule": "restarts"}, {"restart_epochs": 2}])
def test_restarts_and_their_length_come_together_or_not_at_all(settings):
    with pytest.raises(ValueError, match="restart_epochs"):
        TrainingConfig(**settings)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "plateau"])
def test_the_warm_up_rises_linearly_to_the_full_rate(schedule):
    rising = rates(config(schedule=schedule, warmup_fraction=0.1))[:11]
    assert rising == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_the_cosine_falls_from_the_full_rate_towards_the_lowest():
    falling = rates(config(schedule="cosine"))
    assert falling[0] == 1.0
    assert falling[STEPS // 2] == pytest.approx((1.0 + 0.1) / 2)
    assert falling[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.99)) / 2)
    assert falling == sorted(falling, reverse=True)


def test_the_constant_schedule_stays():
    assert rates(config(schedule="constant")) == [1.0] * STEPS


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ([], 1.0),
        ([3.0, 2.0, 1.0], 1.0),
        ([1.0, 2.0], 1.0),
        ([1.0, 2.0, 2.0], 0.5),
        ([1.0, 2.0, 2.0, 0.5], 0.5),
        ([1.0, 2.0, 2.0, 2.0, 2.0], 0.25),
        ([1.0] * 50, 0.1),
    ],
)
def test_the_plateau_schedule_halves_the_rate_whenever_the_loss_stands_still_for_two_epochs(losses, rate):
    assert learning_rate(config(schedule="plateau"), 50, STEPS, losses) == rate
