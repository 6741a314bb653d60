"""The root-mean-square norm with torch's own kernel."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """x (..., dim) over the root of its mean square in each group of channels, times weight (dim,)."""
    if groups == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    grouped = x.unflatten(-1, (groups, -1))
    return F.rms_norm(grouped, grouped.shape[-1:], eps=eps).flatten(-2) * weight
