"""What the functions of mamba_ssm and causal_conv1d compute, step by step in float64, in their layouts.

Written from the papers' recurrences, apart from the library: loops over positions, no state but a tensor.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def steps_of(delta, bias, softplus, limit=(0.0, math.inf)):
    delta = delta.double() if bias is None else delta.double() + bias.double()
    return (F.softplus(delta) if softplus else delta).clamp(*limit)


def per_channel(B: Tensor, dim: int, t: int) -> Tensor:
    """B or C at position t as (batch or 1, dim, state), of any of the shapes that mamba_ssm takes."""
    if B.dim() == 2:
        return B.double()[None]
    if B.dim() == 3:
        return B.double()[:, None, :, t].expand(-1, dim, -1)
    return B.double()[..., t].repeat_interleave(dim // B.shape[1], dim=1)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """(y (batch, dim, length), the last state (batch, dim, state))."""
    dt = steps_of(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus)
    h = u.new_zeros(u.shape[0], *A.shape, dtype=torch.float64)
    ys = []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        h = torch.exp(step * A.double()) * h + step * per_channel(B, u.shape[1], t) * u[:, :, t, None].double()
        ys.append((h * per_channel(C, u.shape[1], t)).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D.double()[:, None] * u.double()
    return (y if z is None else y * F.silu(z.double())), h


def chunk_scan(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, math.inf),
):  # fmt: skip
    """(y (batch, length, heads, headdim), the last state (batch, heads, headdim, state)).

    Under seq_idx the initial states are those of sequence 0.
    """
    batch, length, heads, _ = x.shape
    dt = steps_of(dt, dt_bias, dt_softplus, dt_limit)
    B, C = (t.double().repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(batch, heads, x.shape[3], B.shape[3], dtype=torch.float64)
    if initial_states is not None:
        h = h + initial_states.double()
    if seq_idx is not None:
        h = h * (seq_idx[:, 0] == 0).double()[:, None, None, None]
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1]).double()[:, None, None, None]
        step = dt[:, t, :, None, None]
        h = torch.exp(step * A.double()[:, None, None]) * h + step * x[:, t, :, :, None].double() * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + (D.double()[:, None] if D.dim() == 1 else D.double()) * x.double()
    return (y if z is None else y * F.silu(z.double())), h


def convolution(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """y (batch, channels, length)."""
    taps = weight.shape[1] - 1
    before = x.new_zeros(*x.shape[:2], taps) if initial_states is None else initial_states
    window = torch.cat([before, x], -1).double()
    ys = []
    for t in range(x.shape[2]):
        y = torch.zeros_like(window[..., 0])
        for k in range(taps + 1):
            term = weight[:, k].double() * window[..., t + k]
            if seq_idx is not None:
                source = t + k - taps
                same = seq_idx[:, t] == seq_idx[:, max(source, 0)]
                term = term * same.double()[:, None]
            y = y + term
        y = y if bias is None else y + bias.double()
        if seq_idx is not None:
            y = y * (seq_idx[:, t] >= 0).double()[:, None]
        ys.append(y)
    y = torch.stack(ys, -1)
    return F.silu(y) if activation else y


def norm(x, weight, bias, eps, size, rms):
    groups = x.double().unflatten(-1, (-1, size))
    if not rms:
        groups = groups - groups.mean(-1, keepdim=True)
    y = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight.double()
    return y if bias is None else y + bias.double()


def gated_norm(x, weight, bias, z, eps, size, before_gate, rms):
    gate = F.silu(z.double())
    if before_gate:
        return norm(x, weight, bias, eps, size, rms) * gate
    return norm(x.double() * gate, weight, bias, eps, size, rms)
