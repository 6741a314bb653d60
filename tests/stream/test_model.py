"""The network: its recurrence, its windows, its rivals' size."""

import pytest
import torch
from pydantic import ValidationError
from tests.stream.networks import KINDS
from torch.utils._pytree import tree_leaves

from mambakit.stream.config import StreamConfig
from mambakit.stream.model import StreamModel, untrained_model
from mambakit.stream.train import parameters

INPUTS, TARGETS = 5, 3


def model(**settings):
    made = untrained_model(StreamConfig(**{"d_model": 16, "n_layers": 2, **settings}), INPUTS, TARGETS, seed=0)
    torch.nn.init.normal_(made.head.weight)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_two_parts_is_the_sequence_in_one(kind):
    network = model(kind=kind).eval()
    inputs = torch.randn(2, 30, INPUTS)
    whole, _ = network(inputs)
    first, state = network(inputs[:, :13])
    second, _ = network(inputs[:, 13:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba3", "gru"])
def test_windows_carry_the_state_and_cut_the_gradient(kind):
    network = model(kind=kind, context_length=10).train()
    inputs = torch.randn(2, 30, INPUTS, requires_grad=True)
    y, _ = network(inputs)
    torch.testing.assert_close(y, network.eval()(inputs)[0], atol=1e-5, rtol=1e-5)
    network.train()
    (gradient,) = torch.autograd.grad(network(inputs)[0][:, 25].sum(), inputs)
    assert gradient[:, 20:26].abs().sum(dim=-1).min() > 0
    assert not gradient[:, :20].any()
    (uncut,) = torch.autograd.grad(model(kind=kind).train()(inputs)[0][:, 25].sum(), inputs)
    assert uncut[:, :20].any()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize(("d_model", "n_layers"), [(32, 1), (128, 4)])
def test_a_rival_has_as_many_parameters_as_the_mamba_that_it_is_held_against(kind, d_model, n_layers):
    rival = StreamModel(StreamConfig(kind=kind, d_model=d_model, n_layers=n_layers), 32, 32)
    mamba = StreamModel(StreamConfig(kind="mamba", d_model=d_model, n_layers=n_layers), 32, 32)
    assert 0.95 < parameters(rival) / parameters(mamba) <= 1.0


def test_dropout_is_there_while_training_alone():
    network = model(dropout=0.5)
    inputs = torch.randn(1, 6, INPUTS)
    network.eval()
    assert torch.equal(network(inputs)[0], network(inputs)[0])
    network.train()
    assert not torch.equal(network(inputs)[0], network(inputs)[0])


def test_before_training_it_predicts_zero():
    assert not untrained_model(StreamConfig(d_model=16), INPUTS, TARGETS, 0)(torch.randn(1, 4, INPUTS))[0].any()


def test_the_seed_draws_the_weights_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, same, other = (untrained_model(StreamConfig(d_model=16), INPUTS, TARGETS, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.embed.weight, same.embed.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_engineered_features_widen_the_input():
    assert model(features="engineered").embed.in_features == 13 * INPUTS


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_does_not_grow(kind):
    network = model(kind=kind).eval()
    _, short = network(torch.randn(1, 4, INPUTS))
    _, long = network(torch.randn(1, 40, INPUTS))
    assert [part.shape for part in tree_leaves(short)] == [part.shape for part in tree_leaves(long)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "transformer"}, "kind must be one of mamba"),
        ({"kind": "attention"}, "kind must be one of mamba"),
        ({"kind": "mamba2", "d_model": 50}, "d_model must be a multiple of 16"),
        ({"kind": "gru", "d_state": 16}, "d_state is no setting of gru"),
        ({"d_model": 0}, "d_model"),
        ({"metric": "mse"}, "metric"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        StreamConfig(**settings)
