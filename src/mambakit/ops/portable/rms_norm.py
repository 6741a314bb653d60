"""The root-mean-square norm with torch's own kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128  # rows that go through all steps of a norm before the next do: they stay in the caches


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """x (..., dim) over the root of its mean square in each group of channels, times weight (dim,)."""
    if groups == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    grouped = x.unflatten(-1, (groups, -1))
    return F.rms_norm(grouped, grouped.shape[-1:], eps=eps).flatten(-2) * weight


def rms_norm_in_blocks(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """The norm where no gradient is recorded, in the dtype of weight: each step in place, a block at a time.

    x (..., dim); written out whole, it is a matter of moving some ten tensors of this size through memory.
    """
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    for out, block in zip(*_blocks(y, x), strict=True):
        _norm_in_place(out.copy_(block), weight, eps, groups)
    return y


def gated_rms_norm_in_blocks(
    x: Tensor, weight: Tensor, z: Tensor, eps: float, groups: int, norm_before_gate: bool
) -> Tensor:
    """The gated norm likewise; z (..., dim)."""
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    for out, block, gate in zip(*_blocks(y, x, z), strict=True):
        gate = F.silu(gate.to(weight.dtype))
        if norm_before_gate:
            _norm_in_place(out.copy_(block), weight, eps, groups).mul_(gate)
        else:
            _norm_in_place(torch.mul(gate, block, out=out), weight, eps, groups)
    return y


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.reshape(-1, tensor.shape[-1]).split(_BLOCK) for tensor in tensors]


def _norm_in_place(rows: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    grouped = rows.unflatten(-1, (groups, -1))  # (rows, groups, dim of a group)
    length = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
    grouped.mul_(length.square_().div_(grouped.shape[-1]).add_(eps).rsqrt_())
    return rows.mul_(weight)
