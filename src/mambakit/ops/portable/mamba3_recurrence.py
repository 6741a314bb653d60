"""The recurrence of Mamba-3 in chunks of plain PyTorch: within a chunk it is a matrix, between chunks a state.

    s_t = a_t s_{t-1} + scale_t v_t k_t^T,   y_t = (a_t s_{t-1} + gamma_t v_t k_t^T) q_t,   a_t = exp(log_decay_t)

Over a chunk that begins with the state s, writing E_tj = a_{j+1} ... a_t and e_t = a_1 ... a_t,

    y_t  = e_t s q_t + sum_j W_tj (q_t . k_j) v_j,   W_tj = E_tj scale_j below the diagonal, gamma_t on it, 0 above
    s'   = e_T s + sum_j E_Tj scale_j v_j k_j^T

A step has one v, k and q for each rank: they stand as neighbouring rows, (steps * rank), and share the weights of their
step. E is formed from sums over the span that it covers, never from the difference of two long sums, whose rounding
a step of strong decay would carry into every later one.
"""

import torch
from torch import Tensor

from mambakit.ops.mamba3_inputs import RecurrenceInputs
from mambakit.ops.portable.spans import Span, spans


def forward(inputs: RecurrenceInputs, y: Tensor, final_state: Tensor, before: Tensor) -> None:
    """Fill y, the final state and, unless it is empty, the state before every chunk."""
    final_state.copy_(inputs.initial_state)
    for span in _spans(inputs):
        state = final_state[span.states]
        if before.shape[0]:
            before[span.slots] = state
        c = _Chunk(span, inputs, state)
        c.from_rows(c.from_state.add_((c.scores * c.spread(c.weights)) @ c.v), span.rows(y))
        final_state[span.states] = c.total * state + (c.spread(c.tail) * c.v).mT @ c.k


def backward(
    inputs: RecurrenceInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_final_state: Tensor,
    grads: RecurrenceInputs,
) -> None:
    """Fill `grads`."""
    carry = grads.initial_state.copy_(grad_final_state)  # of the state after the chunk at hand
    for span in reversed(_spans(inputs)):
        state, dstate = kept[0][span.slots], carry[span.states]
        c = _Chunk(span, inputs, state)
        dy = c.to_rows(span.rows(grad_y))
        weights, tail = c.spread(c.weights), c.spread(c.tail)

        dmixed = dy @ c.v.mT  # of scores * weights
        dscores = dmixed * weights
        v_dstate = c.v @ dstate  # (batch, heads, rows, state)
        c.from_rows((c.scores * weights).mT @ dy + tail * (c.k @ dstate.mT), span.rows(grads.v))
        c.from_rows(dscores.mT @ c.q + tail * v_dstate, span.rows(grads.k))
        c.from_rows(dscores @ c.k + c.spread(c.head) * (dy @ state), span.rows(grads.q))

        dweights = c.per_step(dmixed * c.scores)  # (batch, heads, steps, steps)
        dtail = c.per_step((v_dstate * c.k).sum(-1, keepdim=True))  # (batch, heads, steps, 1)
        below = dweights.tril(-1) * c.decay
        dscale = below.sum(-2) + (dtail * c.decay[..., -1:, :].mT).squeeze(-1)
        dbetween = below * c.scale[..., None, :]  # of log E, whose last row the tail shares
        dbetween[..., -1, :] += (dtail * c.tail).squeeze(-1)
        dhead = c.per_step((dy * c.from_state).sum(-1, keepdim=True))  # of log e, (batch, heads, steps, 1)
        dhead[..., -1, 0] += (c.total * dstate * state).sum((-2, -1))
        dlog_decay = _sum_of_later(dbetween).tril(-1).sum(-1) + _sum_of_later(dhead).squeeze(-1)

        span.rows(grads.scale).copy_(dscale.mT)
        span.rows(grads.gamma).copy_(dweights.diagonal(dim1=-2, dim2=-1).mT)
        span.rows(grads.log_decay).copy_(dlog_decay.mT)
        carry[span.states] = c.total * dstate + (c.spread(c.head) * dy).mT @ c.q


def _spans(inputs: RecurrenceInputs) -> list[Span]:
    return spans(inputs.v.shape[0], inputs.v.shape[1], inputs.cu_seqlens, inputs.chunk_size)


def _sum_of_later(x: Tensor) -> Tensor:
    """Sums of x (..., steps, columns) over its own step and all later ones."""
    return x.flip(-2).cumsum(-2).flip(-2)


class _Chunk:
    """The inputs of a chunk and its weights; rows are steps * rank."""

    def __init__(self, span: Span, inputs: RecurrenceInputs, state: Tensor) -> None:
        self.rank = inputs.v.shape[2]
        self.v, self.k, self.q = (self.to_rows(span.rows(t)) for t in (inputs.v, inputs.k, inputs.q))
        log_decay, self.scale, gamma = (
            span.rows(t).mT for t in (inputs.log_decay, inputs.scale, inputs.gamma)
        )  # (batch, heads, steps)
        steps = log_decay.shape[-1]
        between = log_decay[..., None].expand(*log_decay.shape, steps).tril(-1).cumsum(-2)  # log E
        self.decay = between.exp_().tril_()  # E, (batch, heads, steps, steps)
        self.weights = self.decay * self.scale[..., None, :]  # W
        self.weights.diagonal(dim1=-2, dim2=-1).copy_(gamma)
        self.tail = (self.decay[..., -1, :] * self.scale)[..., None]  # (batch, heads, steps, 1)
        self.head = torch.exp(log_decay.cumsum(-1))[..., None]  # e, (batch, heads, steps, 1)
        self.total = self.head[..., -1:, :]  # (batch, heads, 1, 1)
        self.scores = self.q @ self.k.mT  # (batch, heads, rows, rows)
        self.from_state = self.spread(self.head) * (self.q @ state.mT)  # (batch, heads, rows, headdim)

    def to_rows(self, x: Tensor) -> Tensor:
        """(batch, steps, rank, heads, size) as (batch, heads, rows, size)."""
        return x.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def from_rows(self, x: Tensor, out: Tensor) -> None:
        """Write (batch, heads, rows, size) into (batch, steps, rank, heads, size)."""
        out.copy_(x.unflatten(2, (-1, self.rank)).permute(0, 2, 3, 1, 4))

    def spread(self, x: Tensor) -> Tensor:
        """A value for each step, (..., steps, 1 or steps), for each row: (..., rows, 1 or rows)."""
        if self.rank == 1:
            return x
        rows = x.repeat_interleave(self.rank, dim=-2)
        return rows if x.shape[-1] == 1 else rows.repeat_interleave(self.rank, dim=-1)

    def per_step(self, x: Tensor) -> Tensor:
        """The adjoint of `spread`: summed over the ranks of each step."""
        if self.rank == 1:
            return x
        rows = x.unflatten(-2, (-1, self.rank)).sum(-2)
        return rows if x.shape[-1] == 1 else rows.unflatten(-1, (-1, self.rank)).sum(-1)
