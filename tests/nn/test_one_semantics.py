"""One semantics for every mixer on every backend: the conformance test.

A whole sequence, any way of cutting it into chunks, single steps and packed sequences give the same y and the same
final state, and gradients flow through y, through the final state and into the initial state. In float64; the kernels
of a GPU, which take none, in float32.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.nn.mixers import MIXERS, WIDTH, state_of_sequence
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

BACKENDS = [None, "portable", "reference", pytest.param("gpu", marks=pytest.mark.gpu)]
Sequence = Callable[..., Tensor]
LENGTH = 41  # longer than a kernel's chunk, and no multiple of anything


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend or "fastest", autouse=True)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """The dtype of a test, on its device and its backend."""
    if request.param == "gpu":
        with torch.device("cuda"):
            yield torch.float32
        return
    if request.param:
        monkeypatch.setenv("MAMBAKIT_BACKEND", request.param)
    yield torch.float64


@pytest.fixture(params=MIXERS)
def layer(request: pytest.FixtureRequest, place: torch.dtype) -> nn.Module:
    return MIXERS[request.param]().to(place)


@pytest.fixture
def sequence(place: torch.dtype) -> Sequence:
    return lambda batch=2, length=LENGTH: torch.randn(batch, length, WIDTH, dtype=place)


def assert_same(got: Any, expected: Any) -> None:
    got_leaves, expected_leaves = tree_leaves(got), tree_leaves(expected)
    assert len(got_leaves) == len(expected_leaves)
    for a, b in zip(got_leaves, expected_leaves, strict=True):
        if b.dtype == torch.float32:
            # Sums in another order; a gradient of few digits is measured by the largest of its tensor.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item() if b.numel() else 0))
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def in_chunks(layer: nn.Module, x: Tensor, sizes: list[int], state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for chunk in x.split(sizes, dim=1):
        y, state = layer(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("sizes", [[20, 21], [1, 39, 1], [3, 0, 38], [2] * 20 + [1]])
def test_chunks_give_what_the_whole_gives(layer: nn.Module, sequence: Sequence, sizes: list[int]) -> None:
    x = sequence()
    assert_same(in_chunks(layer, x, sizes), layer(x))


def test_steps_give_what_the_whole_gives(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence()
    assert_same(in_chunks(layer, x, [1] * LENGTH), layer(x))


def test_the_future_does_not_change_the_past(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence()
    changed = x.clone()
    changed[:, 20:] += 1
    before, after = layer(x)[0], layer(changed)[0]
    assert_same(after[:, :20], before[:, :20])
    assert not torch.allclose(after[:, 20:], before[:, 20:])


def test_packed_sequences_give_what_separate_ones_give(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence(1)
    bounds = [0, 5, 5, 6, 30, LENGTH]
    y, state = layer(x, cu_seqlens=torch.tensor(bounds))
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone, alone_state = layer(x[:, start:end])
        assert_same(y[:, start:end], alone)
        assert_same(state_of_sequence(state, i), alone_state)


def test_packed_sequences_carry_on_from_their_states(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence(1)
    first, second = torch.tensor([0, 5, 20]), torch.tensor([0, 11, 21])
    _, state = layer(x[:, :20], cu_seqlens=first)
    y, state = layer(x[:, 20:], state, cu_seqlens=second)
    one = in_chunks(layer, torch.cat([x[:, :5], x[:, 20:31]], dim=1), [5, 11])
    two = in_chunks(layer, torch.cat([x[:, 5:20], x[:, 31:]], dim=1), [15, 10])
    assert_same(y, torch.cat([one[0][:, 5:], two[0][:, 15:]], dim=1))
    assert_same((state_of_sequence(state, 0), state_of_sequence(state, 1)), (one[1], two[1]))


def test_a_batch_gives_what_its_sequences_give(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence(3)
    y, state = layer(x)
    for i in range(3):
        assert_same((y[i : i + 1], state_of_sequence(state, i)), layer(x[i : i + 1]))


def test_gradients_through_the_carried_state_are_those_of_the_whole(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence().requires_grad_()
    leaves = [x, *layer.parameters()]

    def gradients(y: Tensor, state: Any) -> tuple[Tensor, ...]:
        loss = y.square().mean() + sum(leaf.square().mean() for leaf in tree_leaves(state) if leaf.is_floating_point())
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    whole = gradients(*layer(x))
    assert_same(gradients(*in_chunks(layer, x, [13, 1, 27])), whole)
    assert all(grad is not None and grad.abs().max() > 0 for grad in whole)


def test_gradients_reach_the_initial_state(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence()
    _, state = layer(x[:, :20])
    state = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), state)
    leaves = [leaf for leaf in tree_leaves(state) if leaf.requires_grad]
    y, _ = layer(x[:, 20:], state)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    assert all(grad.abs().max() > 0 for grad in grads)


def test_a_sequence_of_length_zero_changes_nothing(layer: nn.Module, sequence: Sequence) -> None:
    x = sequence()
    _, state = layer(x)
    y, after = layer(x[:, :0], state)
    assert y.shape == (2, 0, WIDTH)
    assert_same(after, state)
