"""States handed on over the parts of a sequence, in both directions, against the recurrence written out."""

import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from tests.ops.backends import TRITON
from torch import Tensor

from mambakit.ops import triton

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton, on a GPU or interpreted")


def handed_on(parts: Tensor, factors: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The state before each part of one sequence, and the last."""
    order = range(parts.shape[0])
    found = torch.empty_like(parts)
    for k in reversed(order) if reverse else order:
        found[k] = state
        state = factors[k][:, None, None] * state + parts[k]
    return found, state


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 4, 6]])
@pytest.mark.parametrize("started", [False, True])
def test_states_are_those_of_the_recurrence(reverse: bool, bounds: list[int] | None, started: bool) -> None:
    heads, headdim, state = 2, 17, 19  # more than one block, and a rest
    parts, factors = torch.randn(6, heads, headdim, state), torch.rand(6, heads)
    ranges = [0, 3, 6] if bounds is None else bounds
    start = torch.randn(len(ranges) - 1, heads, headdim, state) if started else None
    end = torch.empty(len(ranges) - 1, heads, headdim, state)
    got = parts.clone()
    first_part = None if bounds is None else torch.tensor(bounds)
    triton.Kernels("state_passing").pass_states(got, factors, start, end, first_part, reverse=reverse)
    for i, (first, last) in enumerate(itertools.pairwise(ranges)):
        before = torch.zeros(heads, headdim, state) if start is None else start[i]
        expected, final = handed_on(parts[first:last], factors[first:last], before, reverse)
        torch.testing.assert_close(got[first:last], expected)
        torch.testing.assert_close(end[i], final)


def test_there_may_be_more_sequences_than_a_grid_has_places_along_its_later_axes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = importlib.import_module("mambakit.ops.triton.state_passing")
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *tensors, **constants: None

    monkeypatch.setattr(kernels, "_pass_states", Recorder())
    sequences = 1 << 17
    kernels.pass_states(torch.empty(sequences, 1, 2), torch.empty(sequences, 1), None, torch.empty(sequences, 1, 2))
    assert max(grids[0][1:]) < 1 << 16
