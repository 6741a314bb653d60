"""The selective scan by its definition: Mamba (arXiv 2312.00752), equation 2 with the discretisation of its code.

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t  = (C_t h_t + D u_t) silu(z_t)

A is discretised by zero-order hold; B by Euler's rule (dt B), as in Mamba's code and unlike its paper.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import ScanInputs
from mambakit.ops.reference.packed import over_sequences


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y (batch, length, dim) in the dtype of u, and the final state (sequences, dim, state) in that of A."""
    if inputs.cu_seqlens is not None:
        return over_sequences(selective_scan, inputs, along_length=("u", "delta", "B", "C", "z"))
    u, delta, A, B, C, D, z, delta_bias, h, _, delta_softplus = inputs
    batch, _, dim = u.shape
    groups, state = B.shape[2:]
    x, dt = u.to(A.dtype), delta.to(A.dtype)
    B = B.to(A.dtype).repeat_interleave(dim // groups, dim=2)  # (batch, length, dim, state)
    C = C.to(A.dtype).repeat_interleave(dim // groups, dim=2)  # (batch, length, dim, state)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    if h is None:
        h = A.new_zeros(batch, dim, state)

    y = []
    # unbind and not dt[:, t]: each indexing would give the backward a full tensor of zeros.
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(dt_t[:, :, None] * A)  # (batch, dim, state)
        h = decay * h + (dt_t * x_t)[:, :, None] * B_t
        y.append((h * C_t).sum(-1))  # (batch, dim)
    out = torch.stack(y, dim=1) if y else torch.zeros_like(x)
    if D is not None:
        out = out + D * x
    if z is not None:
        out = out * F.silu(z.to(A.dtype))
    return out.to(u.dtype), h
