"""The scan of Mamba-2 as matrix products over chunks of steps: the SSD algorithm (arXiv 2405.21060, section 6).

With a_t = dt_t A the logarithm of a step's decay, S the state before a chunk, and i, j steps of the chunk:

    L_ij = exp(a_{j+1} + ... + a_i) for j <= i, else 0        decay between two steps
    M_ij = (C_i . B_j) L_ij
    y_i  = sum_j M_ij dt_j x_j + exp(a_1 + ... + a_i) S C_i
    S'   = exp(a_1 + ... + a_last) S + sum_j exp(a_{j+1} + ... + a_last) dt_j x_j B_j^T

B and C are never expanded over the heads of a group: what multiplies them has the heads and headdim of the group as
one axis. The chunks follow one another, and the backward forms each again from the state kept before it, so that
memory is linear in the length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import SsdInputs
from mambakit.ops.portable.spans import Span, spans


def forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every chunk."""
    D, z, state = inputs.D, inputs.z, inputs.initial_state
    final_state.copy_(torch.zeros_like(final_state) if state is None else state)
    for span in _spans(inputs):
        S = final_state[span.states]
        if kept_states.shape[0]:
            kept_states[span.slots] = S
        c = _Chunk(span, inputs)
        out = c.from_state(S)
        out += c.within(c.times_CB(c.decays()))
        if D is not None:
            out.addcmul_(D, c.x)
        if z is not None:
            out *= F.silu(span.rows(z).to(out.dtype))
        span.rows(y).copy_(out)
        S *= c.whole_decay[..., None, None]
        S += c.outer(c.dtx * c.decay_to_end, c.B)


def backward(
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: SsdInputs
) -> None:
    """Fill `grads`."""
    A, D, z, (kept_states,) = inputs.A, inputs.D, inputs.z, kept
    for parameter in (grads.A, grads.D, grads.dt_bias):
        if parameter is not None:
            parameter.zero_()
    carry = grad_final_state.clone()  # of the state after the chunk at hand
    for span in reversed(_spans(inputs)):
        S, dS = kept_states[span.slots], carry[span.states]
        c = _Chunk(span, inputs)
        decays = c.decays()
        M = c.times_CB(decays)
        from_state = c.from_state(S)
        dy = span.rows(grad_y).to(A.dtype)
        if z is not None and grads.z is not None:
            out = c.within(M) + from_state
            if D is not None:
                out.addcmul_(D, c.x)
            dy, dz = _through_gate(dy, out, span.rows(z).to(A.dtype))
            span.rows(grads.z).copy_(dz)

        # Between the steps of the chunk: dM_ij = dy_i . dt_j x_j.
        dM = (dy.transpose(1, 2) @ c.dtx.permute(0, 2, 3, 1)).mul_(decays)  # of C_i . B_j, for each head
        dCB = c.sum_over_heads(dM)  # (batch, groups, steps, steps)
        da = _sum_across(c.times_CB(dM))
        ddtx = c.within(M.transpose(2, 3), dy)
        # Into the state after the chunk and out of the state before it.
        to_end = c.read(c.B, dS) * c.decay_to_end
        dy_from_start = dy * c.decay_from_start
        da += _after((dy * from_state).sum(-1)) + _before((c.dtx * to_end).sum(-1))
        da += (c.whole_decay * (dS * S).sum((2, 3)))[:, None]
        ddtx += to_end

        span.rows(grads.C).copy_(c.steps_first(dCB @ c.B + c.per_group(dy_from_start) @ c.grouped(S)))
        dB = dCB.transpose(2, 3) @ c.C + c.per_group(c.dtx * c.decay_to_end) @ c.grouped(dS)
        span.rows(grads.B).copy_(c.steps_first(dB))
        dx = ddtx * c.dt[..., None]
        if D is not None:
            dx.addcmul_(D, dy)
        span.rows(grads.x).copy_(dx)
        ddt = ((ddtx * c.x).sum(-1) + da * A) * c.slope
        span.rows(grads.dt).copy_(ddt)
        grads.A.add_((da * c.dt).sum((0, 1)))
        if grads.D is not None:
            grads.D.add_((dy * c.x).sum((0, 1)))
        if grads.dt_bias is not None:
            grads.dt_bias.add_(ddt.sum((0, 1)))
        dS *= c.whole_decay[..., None, None]
        dS += c.outer(dy_from_start, c.C)
    if grads.initial_state is not None:
        grads.initial_state.copy_(carry)


def _spans(inputs: SsdInputs) -> list[Span]:
    batch, length, *_ = inputs.x.shape
    return spans(batch, length, inputs.cu_seqlens, inputs.chunk_size)


class _Chunk:
    """The inputs of a chunk in the dtype of sums, its decays, and the products that they enter."""

    def __init__(self, span: Span, inputs: SsdInputs) -> None:
        x, dt, A, B, C = inputs[:5]
        self.groups = B.shape[2]
        self.x = span.rows(x).to(A.dtype)  # (batch, steps, heads, headdim)
        self.B, self.C = (span.rows(t).to(A.dtype).transpose(1, 2) for t in (B, C))  # (batch, groups, steps, state)
        raw = span.rows(dt).to(A.dtype)
        if inputs.dt_bias is not None:
            raw = raw + inputs.dt_bias
        wide = F.softplus(raw) if inputs.dt_softplus else raw
        self.dt = wide.clamp(inputs.dt_min, inputs.dt_max)  # (batch, steps, heads)
        self.slope = ((wide >= inputs.dt_min) & (wide <= inputs.dt_max)).to(A.dtype)  # of dt over raw
        if inputs.dt_softplus:
            self.slope *= torch.sigmoid(raw)
        self.dtx = self.x * self.dt[..., None]

        self.coarse, self.fine = _running_sums(self.dt * A)  # (batch, steps, heads) each
        self.decay_from_start = torch.exp(self.coarse + self.fine)[..., None]  # (batch, steps, heads, 1)
        to_end = (self.coarse[:, -1:] - self.coarse) + (self.fine[:, -1:] - self.fine)
        self.decay_to_end = torch.exp(to_end)[..., None]  # (batch, steps, heads, 1)
        self.whole_decay = self.decay_from_start[:, -1, :, 0]  # (batch, heads)
        self.CB = self.C @ self.B.transpose(2, 3)  # (batch, groups, steps, steps)

    def decays(self) -> Tensor:
        """L (batch, heads, steps, steps)."""
        coarse, fine = (t.transpose(1, 2).contiguous() for t in (self.coarse, self.fine))  # (batch, heads, steps)
        between = coarse[..., :, None] - coarse[..., None, :]
        between += fine[..., :, None]
        between -= fine[..., None, :]
        # Above the diagonal the sums have the wrong sign: they may overflow, and are set to zero, not multiplied by it.
        return between.exp_().tril_()

    def times_CB(self, matrices: Tensor) -> Tensor:
        """(batch, heads, steps, steps) with each entry multiplied by C_i . B_j of the head's group."""
        return (matrices.unflatten(1, (self.groups, -1)) * self.CB[:, :, None]).flatten(1, 2)

    def within(self, M: Tensor, rows: Tensor | None = None) -> Tensor:
        """sum_j M_ij rows_j for each head, of dt x if no rows are given; (batch, steps, heads, headdim)."""
        rows = self.dtx if rows is None else rows
        return (M @ rows.transpose(1, 2)).transpose(1, 2)

    def from_state(self, S: Tensor) -> Tensor:
        """exp(a_1 + ... + a_i) S C_i, (batch, steps, heads, headdim)."""
        return self.read(self.C, S) * self.decay_from_start

    def read(self, vectors: Tensor, S: Tensor) -> Tensor:
        """S v_i for the vectors (batch, groups, steps, state): (batch, steps, heads, headdim)."""
        found = vectors @ self.grouped(S).transpose(2, 3)  # (batch, groups, steps, heads of the group * headdim)
        return found.transpose(1, 2).reshape(self.x.shape)

    def outer(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """sum_i rows_i v_i^T: (batch, heads, headdim, state)."""
        return (self.per_group(rows).transpose(2, 3) @ vectors).unflatten(2, (-1, self.x.shape[3])).flatten(1, 2)

    def per_group(self, rows: Tensor) -> Tensor:
        """(batch, steps, heads, headdim) as (batch, groups, steps, heads of the group * headdim)."""
        return rows.unflatten(2, (self.groups, -1)).flatten(3).transpose(1, 2)

    def grouped(self, S: Tensor) -> Tensor:
        """(batch, heads, headdim, state) as (batch, groups, heads of the group * headdim, state)."""
        return S.unflatten(1, (self.groups, -1)).flatten(2, 3)

    def sum_over_heads(self, matrices: Tensor) -> Tensor:
        """(batch, heads, ...) summed over the heads of each group: (batch, groups, ...)."""
        return matrices.unflatten(1, (self.groups, -1)).sum(2)

    def steps_first(self, vectors: Tensor) -> Tensor:
        """(batch, groups, steps, state) as (batch, steps, groups, state)."""
        return vectors.transpose(1, 2)


def _running_sums(a: Tensor) -> tuple[Tensor, Tensor]:
    """The sums a_1 + ... + a_t along axis 1 in two parts, so that differences of the sums are as exact as a is.

    One running sum would lose, after a step that forgets everything, the digits of the small decays that follow. The
    coarse parts are multiples of 1/64 of modest size, hence summed exactly; the fine parts stay below one.
    """
    a = a.clamp(min=_forgets(a.dtype))
    coarse = torch.round(a * 64) / 64
    return coarse.cumsum(1), (a - coarse).cumsum(1)


def _forgets(dtype: torch.dtype) -> float:
    """A logarithm whose exponential is zero in `dtype`."""
    return -750.0 if dtype == torch.float64 else -104.0


def _sum_across(Z: Tensor) -> Tensor:
    """sum of Z_ij over j < k <= i for every k: all pairs that the decay of step k stands between.

    Z (batch, heads, steps, steps) is zero above the diagonal; the result is (batch, steps, heads). A product with ones
    and not a difference of running sums, which would cancel.
    """
    later = Z.new_ones(Z.shape[2:]).triu_()  # later_ki = 1 for i >= k
    return (later @ Z).tril_(-1).sum(-1).transpose(1, 2)


def _after(terms: Tensor) -> Tensor:
    """sum of the terms (batch, steps, heads) from every step on."""
    return terms.flip(1).cumsum(1).flip(1)


def _before(terms: Tensor) -> Tensor:
    """sum of the terms (batch, steps, heads) before every step."""
    return F.pad(terms[:, :-1], (0, 0, 1, 0)).cumsum(1)


def _through_gate(dy: Tensor, out: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `out` and of z in y = out silu(z)."""
    on = torch.sigmoid(z)
    return dy * (z * on), dy * out * (on * (1 + z * (1 - on)))
