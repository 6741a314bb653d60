"""Matrices in fewer bits, and x W^T + b of them: weights are stored small, all arithmetic is in float32.

    bfloat16   W = values
    int8       W = scale values            one scale a row, |values| <= 127
    int4       W = scale values            one scale for each 32 columns of a row, -8 <= values <= 7

Values of int4 lie two in a byte, those of 32 columns in 16 bytes: the first half of them in the low four bits, the
second in the high ones, 8 added to each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops import cpu, dispatch
from mambakit.ops.linear import linear

FORMATS = ("bfloat16", "int8", "int4")
GROUP = 32  # columns that share a scale in int4
_FEW_ROWS = 16  # that are multiplied as the matrix is stored; more are worth a matrix in float32
_BYTES_OF_A_THREAD = 1 << 18  # that take longer to read than a thread to wake
_BLOCK = 1 << 14  # weights that are quantised at a time: what the caches hold
_SHRINKAGE = (1.0, 0.95, 0.9, 0.85, 0.8)  # of int4's scales; a smaller one clips the largest and serves the others


class QuantisedMatrix(NamedTuple):
    """A matrix (rows, columns) in one of FORMATS, which the dtype of `values` tells."""

    values: Tensor  # (rows, columns) in bfloat16 or int8; (rows, columns / 2) in uint8, which is int4
    scales: Tensor | None  # None; (rows,) in float32; (rows, columns / 32) in bfloat16

    @property
    def columns(self) -> int:
        """How many the matrix has."""
        return self.values.shape[1] * (2 if self.values.dtype == torch.uint8 else 1)

    def rows(self, indices: Tensor) -> Tensor:
        """Some of the rows, (..., columns) in float32 for indices (...)."""
        found = QuantisedMatrix(self.values[indices], None if self.scales is None else self.scales[indices])
        return found.dequantise()

    def dequantise(self) -> Tensor:
        """The matrix in float32."""
        if self.values.dim() == 2 and _by_extension(self.values):
            matrix = torch.empty(self.values.shape[0], self.columns)
            cpu.native.dequantise(cpu.native.Matrix(*self), matrix, torch.get_num_threads())
            return matrix
        if self.scales is None:
            return self.values.float()
        if self.values.dtype == torch.int8:
            return self.values.float().mul_(self.scales[..., None])
        pairs = self.values.unflatten(-1, (-1, GROUP // 2))  # (..., groups, 16)
        wide = torch.cat([pairs & 15, pairs >> 4], dim=-1).float()  # (..., groups, 32)
        return wide.sub_(8).mul_(self.scales[..., None]).flatten(-2)


def quantise_matrix(weight: Tensor, format: str) -> QuantisedMatrix:
    """The nearest matrix in `format` to weight (rows, columns).

    Raises ValueError for another format, and in int4 unless the columns are a multiple of 32.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "bfloat16":
        return QuantisedMatrix(weight.to(torch.bfloat16), None)
    if format == "int4" and weight.shape[1] % GROUP != 0:
        raise ValueError(f"int4 needs a multiple of {GROUP} columns, got {weight.shape[1]}")
    quantise = _in_8_bits if format == "int8" else _in_4_bits
    blocks = weight.split(max(1, _BLOCK // max(1, weight.shape[1])))
    values, scales = zip(*(quantise(block.float()) for block in blocks), strict=True)
    return QuantisedMatrix(torch.cat(values), torch.cat(scales))


def quantised_linear(x: Tensor, weight: QuantisedMatrix, bias: Tensor | None = None) -> Tensor:
    """x (..., columns) times the transpose of a quantised weight, plus bias (rows,): (..., rows) in the dtype of x."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows <= _FEW_ROWS and _by_extension(x) and not (x.requires_grad and torch.is_grad_enabled()):
        # Read as it is stored: less than half of the bytes, where reading them is all that takes time.
        y = torch.empty(rows, weight.values.shape[0])
        vectors = x.detach().float().reshape(rows, x.shape[-1]).contiguous()
        cpu.native.product(cpu.native.Matrix(*weight), vectors, y, _threads(weight))
        return (y if bias is None else y + bias).view(*x.shape[:-1], y.shape[1]).to(x.dtype)
    return linear(x, weight.dequantise().to(x.dtype), bias)


def _by_extension(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and dispatch.choose(tensor.device) == "cpu"


def _threads(weight: QuantisedMatrix) -> int:
    return max(1, min(torch.get_num_threads(), weight.values.nbytes // _BYTES_OF_A_THREAD))


def _in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    return _rounded(weight / _divisor(scales)).to(torch.int8), scales[:, 0]


def _in_4_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    furthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    # -8 has no partner, so the scale's sign brings the furthest there.
    scales, values, error = furthest, groups, torch.full_like(furthest, torch.inf)
    for shrinkage in _SHRINKAGE:
        tried = (furthest * (shrinkage / -8)).bfloat16().float()
        rounded = _rounded(groups / _divisor(tried)).clamp_(-8, 7)
        wrong = (rounded * tried - groups).square_().sum(dim=2, keepdim=True)
        better = wrong < error
        scales, values = torch.where(better, tried, scales), torch.where(better, rounded, values)
        error = torch.minimum(wrong, error)
    codes = (values + 8).to(torch.uint8)
    low, high = codes.split(GROUP // 2, dim=2)
    return (low | high << 4).flatten(1), scales[..., 0].bfloat16()


def _rounded(x: Tensor) -> Tensor:
    # Adding 1.5 2^23 leaves no bits for fractions. torch.round would wake all threads for each of the blocks.
    return x.add(12582912.0).sub_(12582912.0)


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)
