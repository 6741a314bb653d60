"""Every mixer as torch.compile and torch.export see it: whole, and with equal results."""

from typing import Any

import pytest
import torch
from tests.nn.mixers import MIXERS, WIDTH
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@pytest.fixture(params=MIXERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return MIXERS[request.param]()


def sequence() -> Tensor:
    return torch.randn(2, 20, WIDTH, dtype=torch.float64)


def state_of(layer: nn.Module) -> Any:
    return tree_map(torch.detach, layer(sequence())[1])


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_compiled_with_no_graph_break_and_a_state(layer: nn.Module) -> None:
    x, state = sequence(), state_of(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, after = layer(x, state)
    y_compiled, after_compiled = compiled(x, state)
    assert_same((y_compiled, after_compiled), (y, after))
    parameters = list(layer.parameters())
    assert_same(
        torch.autograd.grad(y_compiled.square().sum(), parameters, allow_unused=True),
        torch.autograd.grad(y.square().sum(), parameters, allow_unused=True),
    )


def test_an_exported_program_gives_what_the_layer_gives(layer: nn.Module) -> None:
    x, state = sequence(), state_of(layer)
    assert_same(torch.export.export(layer, (x,)).module()(x), layer(x))
    assert_same(torch.export.export(layer, (x, state)).module()(x, state), layer(x, state))
