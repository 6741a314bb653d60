"""The projections of a single step on a GPU: taken with what stands around them where that is faster, else as modules.

With few sequences a product is the time of reading its weights and of launching it, and norm, convolution and residual
cost more as launches than as work; with many the matrix units have enough to do for torch's products to be the faster.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from mambakit.nn.joints import has_hooks
from mambakit.nn.linear import Linear
from mambakit.ops import decode

_MOST_ROWS = {2: 64, 4: 4}  # by the bytes of a weight; from there on torch's products are faster than those of a step
_FEW_ROWS = 3  # up to which they are not where a norm stands before, or where there are many channels
_WIDE = 2048  # channels
_WIDEST = 16384  # channels of a row, which a program holds whole


def goes_by_step(layer: nn.Module, rows: int, *, after_norm: bool = False) -> TypeGuard[nn.Linear]:
    """Whether `mambakit.ops.decode.linear` does what `layer` does to so many vectors, and does it faster.

    Args:
        layer: what may be a linear layer.
        rows: vectors.
        after_norm: whether a norm stands before it, which is to be taken in the same call.
    """
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Linear) or has_hooks(layer):
        return False
    weight = layer.weight
    most = _MOST_ROWS.get(weight.element_size(), 0)
    if after_norm or weight.shape[1] > _WIDE:
        most = min(most, _FEW_ROWS)
    return (
        rows <= most
        and weight.is_contiguous()
        and 0 < weight.shape[1] <= _WIDEST
        # Channels meet the norm's weight before its divisor: a large residual would leave the range of float16.
        and not (after_norm and weight.dtype == torch.float16)
    )


def convolved_product(
    layer: nn.Module, norm: nn.RMSNorm, residual: Tensor, convolution: decode.Convolution
) -> tuple[Tensor, Tensor, Tensor]:
    """layer(norm(residual)) (batch, outputs) before the convolution or with it, what the convolution makes of its own
    outputs, (batch, channels), and its next state."""
    channels = slice(convolution.first, convolution.first + convolution.weight.shape[0])
    eps = norm.eps or 0.0
    if goes_by_step(layer, residual.shape[0], after_norm=True):
        projected, after = decode.convolved_linear(residual, layer.weight, layer.bias, norm.weight, eps, convolution)
        return projected, projected[:, channels], after
    projected = layer(decode.norm(residual, norm.weight, eps))
    convolved, after = decode.convolution(projected[:, channels], *convolution[:3])
    return projected, convolved, after


def added_product(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """residual + layer(x), (batch, outputs)."""
    if not goes_by_step(layer, x.shape[0]):
        return residual + layer(x)
    return decode.linear(x, layer.weight, layer.bias, residual=residual, dtype=residual.dtype)
