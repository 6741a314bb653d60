"""The scan of Mamba-2 by its definition: "Transformers are SSMs" (arXiv 2405.21060), equation 16 and section 6.

    dt_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max)
    h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t  = (h_t C_t + D x_t) silu(z_t)

Unlike Mamba-1, A is one number a head, and so the whole state of a head decays at one rate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import SsdInputs
from mambakit.ops.reference.packed import over_sequences


def ssd(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """y (batch, length, heads, headdim) in the dtype of x; the final state (sequences, heads, headdim, state)."""
    if inputs.cu_seqlens is not None:
        return over_sequences(ssd, inputs, along_length=("x", "dt", "B", "C", "z"))
    A, D, z, h = inputs.A, inputs.D, inputs.z, inputs.initial_state
    batch, _, heads, headdim = inputs.x.shape
    groups, state = inputs.B.shape[2:]
    x, dt = inputs.x.to(A.dtype), inputs.dt.to(A.dtype)
    B = inputs.B.to(A.dtype).repeat_interleave(heads // groups, dim=2)  # (batch, length, heads, state)
    C = inputs.C.to(A.dtype).repeat_interleave(heads // groups, dim=2)  # (batch, length, heads, state)
    if inputs.dt_bias is not None:
        dt = dt + inputs.dt_bias
    if inputs.dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(inputs.dt_min, inputs.dt_max)
    if h is None:
        h = A.new_zeros(batch, heads, headdim, state)

    y = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(dt_t * A)  # (batch, heads)
        h = decay[:, :, None, None] * h + (dt_t[:, :, None] * x_t)[..., None] * B_t[:, :, None]
        y.append((h * C_t[:, :, None]).sum(-1))  # (batch, heads, headdim)
    out = torch.stack(y, dim=1) if y else torch.zeros_like(x)
    if D is not None:
        out = out + D * x
    if z is not None:
        out = out * F.silu(z.to(A.dtype))
    return out.to(inputs.x.dtype), h
