"""The selective scan as one writes it in plain PyTorch: two honest loops, float32, differentiated by autograd.

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t  = (C_t h_t + D u_t) silu(z_t)

Both walk `unbind`, never an index: indexing makes each step's backward allocate a full tensor of zeros, and a speed-up
over that flatters. `unbind_scan` forms decays and inputs of all steps at once, as most implementations do;
`stepwise_scan` forms them step by step, so that they stay in cache, and is the fastest loop that we know.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def unbind_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """y (batch, length, dim) from u, delta, z (batch, length, dim), A (dim, state), B, C (batch, length, state)."""
    dt = F.softplus(delta + delta_bias)
    dA = torch.exp(dt[..., None] * A)  # (batch, length, dim, state)
    dBu = (dt * u)[..., None] * B[:, :, None]  # (batch, length, dim, state)
    return _outputs(zip(dA.unbind(1), dBu.unbind(1), C.unbind(1), strict=True), u, D, z)


def stepwise_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """As `unbind_scan`, and nothing of size (batch, length, dim, state) is formed outside autograd's graph."""
    dt = F.softplus(delta + delta_bias)
    rows = zip(dt.unbind(1), (dt * u).unbind(1), B.unbind(1), C.unbind(1), strict=True)
    steps = ((torch.exp(dt_t[..., None] * A), x_t[..., None] * B_t[:, None], C_t) for dt_t, x_t, B_t, C_t in rows)
    return _outputs(steps, u, D, z)


def unbind_scan_of_transformers(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    delta_softplus: bool,
    return_last_state: bool,
    **settings: object,
) -> Tensor:
    """`unbind_scan` in the place of the scan of transformers' modeling files, which is channels first and indexes.

    `settings` choose among transformers' own scans.
    """
    if return_last_state or not delta_softplus:
        raise NotImplementedError("the loop is that of a whole sequence, with softplus, and keeps no state")
    u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
    return unbind_scan(u, delta, A, B, C, D, z, delta_bias).transpose(1, 2)


def _outputs(steps: Iterator[tuple[Tensor, Tensor, Tensor]], u: Tensor, D: Tensor, z: Tensor) -> Tensor:
    h, y = u.new_zeros(()), []
    for decay, source, C_t in steps:
        h = decay * h + source  # (batch, dim, state)
        y.append((h @ C_t[..., None])[..., 0])  # (batch, dim)
    return (torch.stack(y, dim=1) + D * u) * F.silu(z)
