"""The compiled recurrence of Mamba-2 and Mamba-3: what native/linear_recurrence.cpp and its backward are given."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops.cpu import native, pack_bounds, rows, whole


class Recurrence(NamedTuple):
    """Inputs of the recurrence, or their gradients; x, B, C and z of one dtype, the rest of that of sums.

    s_t = exp(log_decay_t) s_{t-1} + scale_t v_t k_t^T,   y_t = (exp(log_decay_t) s_{t-1} + own_t v_t k_t^T) q_t + D v_t
    with v = up x, k and q made of B and C by biases and rotations, and y gated by silu(gate z) and summed by down.
    """

    x: Tensor | None  # (batch, length, heads, headdim)
    B: Tensor | None  # (batch, length, rank, groups, state)
    C: Tensor | None  # (batch, length, rank, groups, state)
    z: Tensor | None  # (batch, length, heads, headdim)
    log_decay: Tensor | None  # (batch, length, heads)
    scale: Tensor | None  # (batch, length, heads)
    own: Tensor | None = None  # (batch, length, heads); scale if None
    D: Tensor | None = None  # (heads, headdim)
    up: Tensor | None = None  # (heads, rank, headdim), as gate and down
    gate: Tensor | None = None
    down: Tensor | None = None
    B_bias: Tensor | None = None  # (heads, rank, state), as C_bias
    C_bias: Tensor | None = None
    speeds: Tensor | None = None  # (batch, length, heads or 1, pairs): the angles turn by speeds * steps
    steps: Tensor | None = None  # (batch, length, heads)
    initial_angle: Tensor | None = None  # (sequences, heads, pairs)
    initial_state: Tensor | None = None  # (sequences, heads, headdim, state)


_ROWS = frozenset(Recurrence._fields.index(name) for name in ("x", "B", "C", "z", "speeds"))


def forward(
    recurrence: Recurrence,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    y: Tensor,
    final_state: Tensor,
    kept: Tensor,
) -> None:
    """Fill y, the final state and, unless it is empty, what the backward needs."""
    given = _given(recurrence, interleaved, cu_seqlens, chunk_size)
    native.linear_recurrence(*given, y, final_state, kept if kept.shape[0] else None)


def backward(
    recurrence: Recurrence,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    kept: Tensor,
    grad_y: Tensor,
    grad_final_state: Tensor,
    grads: Recurrence,
) -> None:
    """Fill `grads`, contiguous tensors where `recurrence` has one."""
    given = _given(recurrence, interleaved, cu_seqlens, chunk_size)
    native.linear_recurrence_backward(*given, whole(kept), rows(grad_y), whole(grad_final_state), *grads)


def _given(recurrence: Recurrence, interleaved: bool, cu_seqlens: Tensor | None, chunk_size: int) -> tuple[Any, ...]:
    assert recurrence.x is not None
    views = (rows(t) if i in _ROWS else whole(t) for i, t in enumerate(recurrence))
    bounds = pack_bounds(recurrence.x, cu_seqlens)
    return (*views, interleaved, bounds, chunk_size, torch.get_num_threads())
