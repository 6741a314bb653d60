"""The norms of `mamba_ssm.ops.triton.layernorm_gated`: a norm and a gate, in either order, by groups of channels.

    norm(x) silu(z) with norm_before_gate, else norm(x silu(z));   norm is the RMS norm or the layer norm

Sums are in float32 (float64 for float64); the result has the dtype of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.errors import DataError


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """The gated RMS norm of x (..., dim); z (..., dim), weight and bias (dim,); groups of `group_size` channels."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """The gated layer norm of x (..., dim), or its RMS norm; the other arguments are those of `rmsnorm_fn`."""
    dim = x.shape[-1]
    size = dim if group_size is None else group_size
    if size < 1 or dim % size != 0:
        raise DataError(f"group_size must divide the {dim} channels, got {group_size}")
    if z is not None and z.shape != x.shape:
        raise DataError(f"z must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide)
    gate = None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        rows = rows * gate
    groups = rows.unflatten(-1, (dim // size, size))
    normed = F.rms_norm(groups, (size,), eps=eps) if is_rms_norm else F.layer_norm(groups, (size,), eps=eps)
    y = normed.flatten(-2) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """`y = norm(x, z)` by `rmsnorm_fn`; its only parameter is `weight` (hidden_size,)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)


class LayerNorm(nn.Module):
    """`y = norm(x, z)` by `layernorm_fn`; its parameters are `weight` and `bias` (hidden_size,)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)
