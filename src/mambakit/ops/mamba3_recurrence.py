"""The recurrence of Mamba-3, once its keys are turned and its weights are known: the operator behind `mamba3_scan`.

The definition adds each outer product u_t = v_t k_t^T to the state twice, at its own step and at the next:

    h_t = a_t h_{t-1} + b_t u_{t-1} + g_t u_t,   b_t = f_t a_t,   f_t = (1 - l_t) dt_t,   g_t = l_t dt_t

Carried together with what the next step will add, s_t = h_t + f_{t+1} u_t, the state takes it once:

    s_t = a_t s_{t-1} + (g_t + f_{t+1}) u_t
    h_t = a_t s_{t-1} + g_t u_t

With f = 0 after the last step of a sequence s ends equal to h, and from a carried h, u it starts as h + f_0 u. So what
is carried between calls is the definition's own h, whichever way a sequence is cut. `ssd` is the case of
g_t + f_{t+1} = g_t = dt_t; it can't stand in here, since its decay and its weight are one number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops import operator
from mambakit.ops.mamba3_inputs import RecurrenceInputs
from mambakit.ops.packing import sequence_count
from mambakit.ops.portable import mamba3_recurrence as portable

KERNELS = {"portable": portable}


def recurrence(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor,
    present: Tensor,
    following: Tensor,
    h: Tensor,
    previous: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run h_t = a_t h_{t-1} + f_t a_t v_{t-1} k_{t-1}^T + g_t v_t k_t^T and y_t = h_t q_t.

    Args:
        v: (batch, length, rank, heads, headdim); the outer products are summed over the ranks.
        k, q: (batch, length, rank, heads, state).
        log_decay, present, following: log a, g and f, (batch, length, heads).
        h, previous: the state and v k^T before the first step, (sequences, heads, headdim, state).
        cu_seqlens: (sequences + 1,) for packed sequences.
        chunk_size: steps that go into one matrix product.
        backend: one of `KERNELS`.

    Returns:
        y (batch, length, rank, heads, headdim) and the state h after the last step.
    """
    start = h + first(following, cu_seqlens)[..., None, None] * previous
    scale = present + following_step(following, cu_seqlens)
    return _run(RecurrenceInputs(v, k, q, log_decay, scale, present, start, cu_seqlens, chunk_size), backend)


def last(rows: Tensor, before: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last step of every sequence, (sequences, ...), from (batch, length, ...); `before` of an empty one."""
    if rows.shape[1] == 0:
        return before
    if cu_seqlens is None:
        return rows[:, -1]
    found = rows[0, (cu_seqlens[1:] - 1).clamp(min=0)]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).reshape(-1, *[1] * (found.dim() - 1))
    return torch.where(empty, before, found)


def first(rows: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The first step of every sequence, (sequences, heads), zero where there is none."""
    padded = F.pad(rows, (0, 0, 0, 1))
    if cu_seqlens is None:
        return padded[:, 0]
    return padded[0, cu_seqlens[:-1]].masked_fill((cu_seqlens[1:] == cu_seqlens[:-1])[:, None], 0.0)


def following_step(rows: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For every step the one after it in its sequence, zero at the end; (batch, length, heads)."""
    shifted = F.pad(rows, (0, 0, 0, 1))[:, 1:]
    if cu_seqlens is None:
        return shifted
    ends = torch.zeros(rows.shape[1] + 1, dtype=torch.bool, device=rows.device)
    ends[cu_seqlens] = True
    return shifted.masked_fill(ends[1:, None], 0.0)


def _outputs(inputs: RecurrenceInputs, keep: bool, backend: str) -> tuple[Tensor, ...]:
    """y, the final state, and the states kept for the backward, (slots, heads, headdim, state)."""
    (batch, length), state, chunk = inputs.v.shape[:2], inputs.initial_state, inputs.chunk_size
    if inputs.cu_seqlens is None:
        slots = batch * ((length + chunk - 1) // chunk)
    else:
        slots = length // chunk + sequence_count(batch, inputs.cu_seqlens)  # enough, wherever the bounds lie
    y = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    final_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    return y, final_state, state.new_empty(slots if keep else 0, *state.shape[1:])


_run = operator.register("mamba3_recurrence", RecurrenceInputs, _outputs, backends=KERNELS, kept=1)
