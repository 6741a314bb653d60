"""The operators `mambakit::...` in operators that every runtime has, a scan over time where a state is carried.

`torch.export` keeps those operators whole, which is opaque elsewhere. Each function here takes the arguments of one of
them and computes what it does, as the definitions in `mambakit.ops.reference` do, but for the loop over time: that is
torch's own `scan`, which needs no fixed length and becomes ONNX's Scan. Packed sequences and gradients are left out:
an exported program has neither.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from mambakit.ops.inputs import ConvInputs, ScanInputs, SsdInputs
from mambakit.ops.mamba3_inputs import RecurrenceInputs, WholeScanInputs, per_head, per_rank
from mambakit.ops.reference.causal_conv1d import causal_conv1d as convolution
from mambakit.ops.rotation import accumulate, rotate

Step = Callable[..., tuple[Tensor, Tensor]]

_CALL = 2  # arguments of every operator after its inputs: keep, and the backend


def over_time(step: Step, state: Tensor, rows: Sequence[Tensor], fixed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """y (batch, length, ...) and the last state of `state, y_t = step(state, *rows_t, *fixed)`.

    Args:
        step: of tensors that it is given alone, none that it closes over.
        state: before the first step.
        rows: (batch, length, ...) each.
        fixed: what does not change over time.
    """
    if isinstance(rows[0].shape[1], int) and rows[0].shape[1] == 1:
        state, y = step(state, *(row[:, 0] for row in rows), *fixed)
        return y.unsqueeze(1), state
    state, y = scan_op(step, [state], [row.transpose(0, 1) for row in rows], tuple(fixed))
    return y.transpose(0, 1), state


def causal_conv1d(*args: Any) -> tuple[Tensor, Tensor]:
    """`mambakit::causal_conv1d`."""
    return convolution(ConvInputs(*args[:-_CALL]))


def selective_scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`mambakit::selective_scan`."""
    u, delta, A, B, C, D, z, delta_bias, h, _, delta_softplus = ScanInputs(*args[:-_CALL])
    groups = B.shape[2]
    B, C = (t.repeat_interleave(A.shape[0] // groups, dim=2) for t in (B, C))  # (batch, length, dim, state)
    dt = delta if delta_bias is None else delta + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    if h is None:
        h = A.new_zeros(u.shape[0], *A.shape)

    def step(h: Tensor, dt: Tensor, u: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.exp(dt.unsqueeze(-1) * A) * h + (dt * u).unsqueeze(-1) * B
        return h, (h * C).sum(-1)

    y, h = over_time(step, h, (dt, u, B, C), (A,))
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, h, _nothing_kept(h)


def ssd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`mambakit::ssd`."""
    inputs = SsdInputs(*args[:-_CALL])
    x, dt, A, D, z, h = inputs.x, inputs.dt, inputs.A, inputs.D, inputs.z, inputs.initial_state
    batch, _, heads, headdim = x.shape
    groups, state = inputs.B.shape[2:]
    B, C = (t.repeat_interleave(heads // groups, dim=2) for t in (inputs.B, inputs.C))  # (batch, length, heads, state)
    if inputs.dt_bias is not None:
        dt = dt + inputs.dt_bias
    if inputs.dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(inputs.dt_min, inputs.dt_max)
    if h is None:
        h = A.new_zeros(batch, heads, headdim, state)

    def step(h: Tensor, log_decay: Tensor, v: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        h = _as_factor(torch.exp(log_decay)) * h + v.unsqueeze(-1) * B.unsqueeze(2)
        return h, (h * C.unsqueeze(2)).sum(-1)

    y, h = over_time(step, h, (dt * A, dt.unsqueeze(-1) * x, B, C), ())
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z)
    return y, h, _nothing_kept(h)


def mamba3_recurrence(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`mambakit::mamba3_recurrence`."""
    v, k, q, log_decay, scale, gamma, state, _, _ = RecurrenceInputs(*args[:-_CALL])

    def step(
        s: Tensor, v: Tensor, k: Tensor, q: Tensor, log_decay: Tensor, scale: Tensor, gamma: Tensor
    ) -> tuple[Tensor, Tensor]:
        u = (v.unsqueeze(-1) * k.unsqueeze(-2)).sum(1)  # (batch, heads, headdim, state)
        s = _as_factor(torch.exp(log_decay)) * s
        h = s + _as_factor(gamma) * u
        return s + _as_factor(scale) * u, (h.unsqueeze(1) * q.unsqueeze(-2)).sum(-1)

    y, state = over_time(step, state, (v, k, q, log_decay, scale, gamma), ())
    return y, state, _nothing_kept(state)


def mamba3_scan(*args: Any) -> tuple[Tensor, ...]:
    """`mambakit::mamba3_scan`."""
    i = WholeScanInputs(*args[:-_CALL])
    wide, (batch, _, heads, headdim), rank, size = i.log_decay, i.x.shape, i.B.shape[2], i.B.shape[4]
    k, q = (per_head(t.to(wide.dtype), bias, heads) for t, bias in ((i.B, i.B_bias), (i.C, i.C_bias)))
    if i.speeds is not None and i.steps is not None:
        turn = i.speeds * i.steps.unsqueeze(-1)
        before = wide.new_zeros(batch, heads, turn.shape[3]) if i.initial_angle is None else i.initial_angle
        angle, _ = accumulate(turn, before, None)
        k, q = (rotate(t, angle.unsqueeze(2), i.interleaved) for t in (k, q))
    v = per_rank(i.x.to(wide.dtype), i.up, rank)  # (batch, length, rank, heads, headdim)
    state = wide.new_zeros(batch, heads, headdim, size) if i.initial_state is None else i.initial_state
    y, state, kept = mamba3_recurrence(v, k, q, wide, i.scale, i.own, state, None, i.chunk_size, *args[-_CALL:])
    if i.D is not None:
        y = y + i.D * v
    if i.z is not None:
        y = y * F.silu(per_rank(i.z.to(wide.dtype), i.gate, rank))
    if i.down is not None:
        y = (y * i.down.transpose(0, 1)).sum(2)
    return y.to(i.x.dtype), state, kept, wide.new_empty(0)


def _as_factor(heads: Tensor) -> Tensor:
    """(batch, heads) against (batch, heads, headdim, state)."""
    return heads.unsqueeze(-1).unsqueeze(-1)


def _nothing_kept(state: Tensor) -> Tensor:
    return state.new_empty(0, *state.shape[1:])


PLAIN: Mapping[Any, Callable[..., tuple[Tensor, ...]]] = {
    torch.ops.mambakit.causal_conv1d.default: causal_conv1d,
    torch.ops.mambakit.selective_scan.default: selective_scan,
    torch.ops.mambakit.ssd.default: ssd,
    torch.ops.mambakit.mamba3_recurrence.default: mamba3_recurrence,
    torch.ops.mambakit.mamba3_scan.default: mamba3_scan,
}
