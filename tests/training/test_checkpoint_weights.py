"""Weights survive the way to the CPU and back, tied or not, and misfits are named."""

import pytest
import torch
from safetensors.torch import load, save
from tests.training.toy import toy_model
from torch import nn

from mambakit.errors import ArtefactError
from mambakit.training import copy_weights, load_weights


class Tied(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.transposed = nn.Parameter(torch.randn(3, 2).T)
        self.register_buffer("count", torch.tensor(7 + seed))


def test_tied_weights_are_stored_once_and_stay_tied():
    model, other = Tied(0), Tied(1)
    weights = load(save(copy_weights(model)))
    assert sorted(weights) == ["count", "embedding.weight", "transposed"]
    load_weights(other, weights)
    assert other.head.weight is other.embedding.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_copy_does_not_follow_the_model():
    model = toy_model()
    weights = copy_weights(model)
    before = weights["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(weights["0.weight"], before)


def test_a_weight_of_another_shape_is_named():
    weights = {**copy_weights(toy_model()), "0.bias": torch.zeros(1)}
    with pytest.raises(ArtefactError, match=r"0\.bias is \(1,\) there and \(8,\) in the model"):
        load_weights(toy_model(), weights)


def test_a_weight_too_many_is_named():
    weights = {**copy_weights(toy_model()), "extra": torch.zeros(1)}
    with pytest.raises(ArtefactError, match=r"extra is \(1,\) there and missing in the model"):
        load_weights(toy_model(), weights)
