"""One token through a stack of Mamba-1 blocks as one writes it in plain PyTorch: few operations, states in place.

    x, z     = in_proj(norm(hidden));   x = silu(conv1d(x));   dt, B, C = x_proj(x)
    h        = exp(dt A) h + dt B x,    y = (C h + D x) silu(z),   with dt = softplus(dt_proj(dt))
    hidden  += out_proj(y)

A = -exp(A_log) is formed once, which a decoder that is done with training may do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.nn import Backbone, Mamba


class EagerStep:
    """Steps the weights of a `Backbone` of Mamba mixers: `y = step(x)`, x and y (batch, d_model)."""

    def __init__(self, backbone: Backbone, batch: int) -> None:
        self.norm = backbone.norm_f
        self.layers = [_Layer(block.norm, block.mixer, batch) for block in backbone.layers]

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


class _Layer:
    def __init__(self, norm: torch.nn.Module, mixer: Mamba, batch: int) -> None:
        self.norm, self.mixer = norm, mixer
        self.A = -torch.exp(mixer.A_log)  # (d_inner, d_state)
        self.taps = mixer.conv1d.weight[:, 0].t().contiguous()  # (d_conv, d_inner)
        self.inputs = torch.zeros(batch, mixer.d_conv, mixer.d_inner)
        self.h = torch.zeros(batch, mixer.d_inner, mixer.d_state)

    def __call__(self, hidden: Tensor) -> Tensor:
        m = self.mixer
        u, z = m.in_proj(self.norm(hidden)).chunk(2, dim=-1)  # (batch, d_inner) each
        self.inputs = torch.cat([self.inputs[:, 1:], u[:, None]], dim=1)
        u = F.silu((self.inputs * self.taps).sum(1) + m.conv1d.bias)
        dt, B, C = m.x_proj(u).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
        dt = F.softplus(F.linear(dt, m.dt_proj.weight, m.dt_proj.bias))
        decay = torch.exp(dt[..., None] * self.A)  # (batch, d_inner, d_state)
        self.h.mul_(decay).addcmul_((dt * u)[..., None], B[:, None])
        y = (self.h @ C[..., None])[..., 0] + m.D * u  # (batch, d_inner)
        return m.out_proj(y * F.silu(z))
