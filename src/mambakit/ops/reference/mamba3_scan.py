"""The Mamba-3 scan by its definition: arXiv 2603.15569, with the parametrisation of its code.

    dt_t    = softplus(dt_t + dt_bias),   l_t = sigmoid(trap_t)
    theta_t = theta_{t-1} + pi tanh(angles_t) dt_t
    k_t     = Rot(theta_t) (B_t + B_bias),   q_t = Rot(theta_t) (C_t + C_bias),   v_t = mimo_x x_t
    h_t     = a_t h_{t-1} + b_t v_{t-1} k_{t-1}^T + g_t v_t k_t^T
              a_t = exp(dt_t A_t),   b_t = (1 - l_t) dt_t a_t,   g_t = l_t dt_t
    y_t     = sum over ranks of mimo_o (h_t q_t + D v_t) silu(mimo_z z_t)

The trapezoid's rule weighs the inputs at both ends of a step; l = 1 is Euler's rule, that of Mamba-2. v, k and q have
one vector for each rank, v k^T is summed over the ranks, and the state has no axis for them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.mamba3_inputs import Mamba3Inputs, Mamba3State, outer, per_head, per_rank
from mambakit.ops.reference.packed import over_sequences
from mambakit.ops.rotation import rotate, wrapped


def mamba3_scan(inputs: Mamba3Inputs) -> tuple[Tensor, Mamba3State]:
    """y (batch, length, rank, heads, headdim), without the rank axis under mimo_o, and the final state."""
    if inputs.cu_seqlens is not None:
        along_length = ("x", "dt", "A", "B", "C", "trap", "angles", "z")
        return over_sequences(mamba3_scan, inputs, along_length)
    x, dt, A, B, C, trap, angles, D, z, dt_bias, B_bias, C_bias, mimo_x, mimo_z, mimo_o, state, _, _, _ = inputs
    batch, _, heads, headdim = x.shape
    rank, _, size = B.shape[2:]
    if dt_bias is not None:
        dt = dt + dt_bias
    if inputs.dt_softplus:
        dt = F.softplus(dt)
    turns = math.pi * torch.tanh(angles) * dt[..., None]  # (batch, length, heads, pairs)
    traps = torch.sigmoid(trap)
    B = per_head(B.to(A.dtype), B_bias, heads)  # (batch, length, rank, heads, state)
    C = per_head(C.to(A.dtype), C_bias, heads)  # (batch, length, rank, heads, state)
    if state is None:
        angle = A.new_zeros(batch, heads, turns.shape[-1])
        h = A.new_zeros(batch, heads, headdim, size)
        k, x_t = A.new_zeros(batch, rank, heads, size), x.new_zeros(batch, heads, headdim)
    else:
        angle, h, k, x_t = state
    previous = outer(per_rank(x_t.to(A.dtype), mimo_x, rank), k)

    y = []
    # unbind and not dt[:, t]: each indexing would give the backward a full tensor of zeros.
    steps = zip(*(t.unbind(1) for t in (x, dt, A, B, C, traps, turns)), strict=True)
    for x_t, dt_t, A_t, B_t, C_t, l, turn in steps:
        angle = wrapped(angle + turn)
        k = rotate(B_t, angle[:, None], inputs.interleaved)  # (batch, rank, heads, state)
        q = rotate(C_t, angle[:, None], inputs.interleaved)  # (batch, rank, heads, state)
        v = per_rank(x_t.to(A.dtype), mimo_x, rank)  # (batch, rank, heads, headdim)
        present = outer(v, k)
        a = torch.exp(dt_t * A_t)  # (batch, heads)
        b, g = (1 - l) * dt_t * a, l * dt_t
        h = a[..., None, None] * h + b[..., None, None] * previous + g[..., None, None] * present
        y_t = (h[:, None] * q[..., None, :]).sum(-1)  # (batch, rank, heads, headdim)
        y.append(y_t if D is None else y_t + D[:, None] * v)
        previous = present
    out = torch.stack(y, dim=1) if y else A.new_zeros(batch, 0, rank, heads, headdim)
    if z is not None:
        out = out * F.silu(per_rank(z.to(A.dtype), mimo_z, rank))
    if mimo_o is not None:
        out = (out * mimo_o.transpose(0, 1)).sum(2)
    return out.to(x.dtype), Mamba3State(angle, h, k, x_t)
