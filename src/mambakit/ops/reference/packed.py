"""Packed sequences by their definition: each sequence on its own, the results laid end to end."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mambakit.ops.packing import sequence_bounds


def over_sequences(
    function: Callable[[Any], tuple[Tensor, Any]], inputs: Any, along_length: Sequence[str]
) -> tuple[Tensor, Any]:
    """`function` of the inputs of each packed sequence: y (1, length, ...) and the final states (sequences, ...).

    Args:
        function: an operation on a NamedTuple of inputs without `cu_seqlens`.
        inputs: such a NamedTuple with `cu_seqlens`, and `initial_state` (sequences, ...), several in a NamedTuple, or
            None.
        along_length: the names of the tensors (1, length, ...) to cut; the first of them is never None.
    """
    rows = {name: getattr(inputs, name) for name in along_length}
    first = rows[along_length[0]]
    bounds = sequence_bounds(first.shape[0], first.shape[1], inputs.cu_seqlens)
    outputs, states = [], []
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = {name: None if row is None else row[:, start:end] for name, row in rows.items()}
        before = None if inputs.initial_state is None else _map(_rows(index, index + 1), inputs.initial_state)
        y, state = function(inputs._replace(**part, initial_state=before, cu_seqlens=None))
        outputs.append(y)
        states.append(state)
    if not outputs:  # a pack of no sequences
        y, state = function(inputs._replace(initial_state=None, cu_seqlens=None))
        return y, _map(_rows(0, 0), state)
    return torch.cat(outputs, dim=1), _map(lambda *parts: torch.cat(parts), *states)


def _rows(start: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda state: state[start:end]


def _map(function: Callable[..., Tensor], *states: Any) -> Any:
    """`function` of states that are tensors, or of each field of states that are NamedTuples."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    return type(first)(*(function(*fields) for fields in zip(*states, strict=True)))
