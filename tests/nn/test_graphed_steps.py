"""Steps in fixed buffers, as a CUDA graph replays them: without a GPU the same code runs without the graph."""

from collections.abc import Callable

import pytest
import torch
from tests.nn.mixers import MIXERS
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from mambakit.nn import Backbone, Stepper
from mambakit.nn.graphed_steps import GraphedSteps

STEADY = {name: make for name, make in MIXERS.items() if "attention" not in name and "hybrid" not in name}


@pytest.mark.parametrize("make", STEADY.values(), ids=STEADY)
@torch.no_grad()
def test_steps_in_buffers_are_the_steps_of_the_layer(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    expected, _ = layer(x)
    _, state = layer(x[:, :4])
    kept = tree_map(torch.clone, state)
    steps = GraphedSteps(layer, x[:, 0], state, captured=False)
    for t in range(4, 7):
        torch.testing.assert_close(steps.step(x[:, t]), expected[:, t])
    halfway = steps.state
    torch.testing.assert_close(steps.step(x[:, 7]), expected[:, 7])
    steps.load(halfway)
    torch.testing.assert_close(steps.step(x[:, 7]), expected[:, 7])
    torch.testing.assert_close(tree_leaves(state), tree_leaves(kept), rtol=0, atol=0)  # theirs is left alone


@pytest.mark.parametrize("make", STEADY.values(), ids=STEADY)
@torch.no_grad()
def test_a_short_sequence_that_comes_again_is_read_in_pieces(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = torch.randn(2, 14, 8, dtype=torch.float64)
    expected, last = layer(x)
    _, state = layer(x[:, :3])
    steps = GraphedSteps(layer, x[:, 0], state, captured=False)
    for _ in range(2):
        assert steps.read(x[:, 3:]) is None  # 11 steps are 8, 2 and 1
        torch.testing.assert_close(tree_leaves(steps.state), tree_leaves(state))
    torch.testing.assert_close(steps.read(x[:, 3:]), expected[:, -1])
    torch.testing.assert_close(tree_leaves(steps.state), tree_leaves(last))
    steps.load(state)
    assert steps.read(x[:, 3:7]) is None  # 4 steps have not come up
    torch.testing.assert_close(steps.read(x[:, 3:13]), expected[:, 12])
    assert steps.read(torch.randn(2, 300, 8)) is None  # too long for launches to count
    assert steps.read(x[:, :0]) is None


def test_a_state_that_grows_can_not_stay_in_its_buffer() -> None:
    layer = MIXERS["attention"]()
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grows with every step"):
        GraphedSteps(layer, x[:, 0], layer(x)[1], captured=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
@torch.no_grad()
def test_a_captured_step_gives_what_the_layers_give(mixer: str, dtype: torch.dtype) -> None:
    options = {} if mixer == "mamba" else {"headdim": 16}
    layer = Backbone(32, 2, mixer, {"d_state": 16, **options}, device="cuda", dtype=dtype)
    x = torch.randn(3, 12, 32, device="cuda")
    expected, last = layer(x)
    _, state = layer(x[:, :5])
    stepper = Stepper(layer, 3)
    stepper.load(state)
    bound = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for t in range(5, 12):
        torch.testing.assert_close(stepper(x[:, t]), expected[:, t].float(), **bound)
    assert (stepper.backend, stepper.reason) == ("graph", "")
    torch.testing.assert_close(tree_leaves(stepper.state), tree_leaves(last), **bound)
    with torch.no_grad():  # weights are read where they are
        layer.norm_f.weight.mul_(2)
    twice = stepper.fork()
    torch.testing.assert_close(twice(x[:, 0]), stepper(x[:, 0]), **bound)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
@torch.no_grad()
def test_captured_pieces_give_what_the_layers_give(mixer: str, dtype: torch.dtype) -> None:
    options = {} if mixer == "mamba" else {"headdim": 16}
    layer = Backbone(32, 2, mixer, {"d_state": 16, **options}, device="cuda", dtype=dtype)
    x = torch.randn(3, 90, 32, device="cuda")
    expected, last = layer(x)
    _, state = layer(x[:, :5])
    stepper = Stepper(layer, 3)
    stepper.load(state)
    stepper(x[:, 5])  # captures the step
    bound = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    read = []
    for _ in range(5):
        stepper.load(state)
        read.append(stepper.read(x[:, 5:]))
    assert [y is None for y in read] == [True, True, False, False, False]
    for y in read[2:]:
        torch.testing.assert_close(y, expected[:, -1].float(), **bound)
    torch.testing.assert_close(tree_leaves(stepper.state), tree_leaves(last), **bound)
    stepper.load(state)
    torch.testing.assert_close(stepper(x[:, 5]), expected[:, 5].float(), **bound)  # the graph of a step is left alone


@pytest.mark.gpu
def test_what_can_not_be_captured_is_stepped_by_the_layers_and_says_why() -> None:
    layer = Backbone(32, 1, "attention", {"n_heads": 2}, device="cuda")
    stepper = Stepper(layer)
    stepper(torch.randn(1, 32, device="cuda"))
    assert stepper.backend == "layers"
    assert "grows with every step" in stepper.reason
