"""The root-mean-square norm by its definition (arXiv 1910.07467, equation 4)."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """x (..., dim) over the root of its mean square in each group of channels, times weight (dim,)."""
    grouped = x.unflatten(-1, (groups, -1))
    return (grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
