"""The root-mean-square norm on the GPU, plain and gated: one kernel casts, sums, normalises and gates.

    r = x silu(z) or x,   s = 1 / sqrt(mean(r^2) + EPS),   y = weight r s [silu(z)]

The backward recomputes s from x. A program takes the groups of several rows one after another and keeps its share of
the gradient of the weight in registers; the shares are added in a fixed order.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.dispatch import accumulation_dtype
from mambakit.ops.inputs import NormInputs
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import Kernel, on_device_of, rows_contiguous, stride_divisor

ABSENT_GRADIENTS = True  # the norm has no state: `mambakit.ops.operator`

_SUMS = {torch.float32: tl.float32, torch.float64: tl.float64}


class Config(NamedTuple):
    """How a kernel is cut up."""

    elements: int  # of x that a program holds at a time, about
    warps: int
    shares: int = 264  # programs that share the rows of the backward; no matter of the GPU, so that sums are none


def forward_config(columns: int) -> Config:
    """By the width of a group."""
    return Config(max(1024, power_of_two(columns)), 4 if columns <= 4096 else 8)


def backward_config(columns: int) -> Config:
    """As `forward_config`."""
    return Config(max(512, power_of_two(columns)), 8 if 1024 < columns <= 2048 or columns > 4096 else 4)


def forward(inputs: NormInputs, y: Tensor, _: Tensor, config: Config | None = None) -> None:
    """Fill y."""
    x, z = _rows(inputs.x), None if inputs.z is None else _rows(inputs.z)
    if x.numel() == 0:
        return
    weight, dim = inputs.weight, x.shape[-1]
    config = config or forward_config(dim // inputs.groups)
    wide = accumulation_dtype(x, weight, z)
    z_row = 0 if z is None else _row_stride(z)
    launch = _forward_launch(x.numel() // dim, dim, _row_stride(x), z_row, *inputs[3:], wide, config)
    with on_device_of(x):
        launch(x, weight, z, y)


def backward(
    inputs: NormInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    _: Tensor | None,
    grads: NormInputs,
    config: Config | None = None,
) -> None:
    """Fill `grads`."""
    x, z, grad_y = _rows(inputs.x), None if inputs.z is None else _rows(inputs.z), _rows(grad_y)
    weight, dim = inputs.weight, x.shape[-1]
    if dim == 0:
        return
    config = config or backward_config(dim // inputs.groups)
    wide = accumulation_dtype(x, weight, z)
    z_row = 0 if z is None else _row_stride(z)
    shares, launch = _backward_launch(
        x.numel() // dim, dim, _row_stride(x), z_row, _row_stride(grad_y), *inputs[3:], wide, config
    )
    partial = x.new_empty(shares, dim, dtype=wide)
    with on_device_of(x):
        if shares > 0:
            launch(x, weight, z, grad_y, grads.x, grads.z, partial)
        _sum_shares[(ceil_div(dim, 32),)](partial, grads.weight, shares, dim, BLOCK=32, SHARES=128)


@functools.lru_cache(maxsize=512)
def _forward_launch(
    rows: int, dim: int, x_row: int, z_row: int, eps: float, groups: int, norm_first: bool, wide: torch.dtype,
    config: Config,
) -> Callable[..., None]:  # fmt: skip
    """All that follows from shapes and strides, found out once."""
    columns = dim // groups
    block = power_of_two(columns)
    tile = max(1, config.elements // block)
    return _forward.bind(
        (ceil_div(rows, tile), groups), rows, columns, dim, x_row, z_row,
        EPS=eps, NORM_FIRST=norm_first, WIDE=_SUMS[wide], BLOCK=block, TILE=tile, DIVISOR_X=stride_divisor(x_row),
        DIVISOR_Z=stride_divisor(z_row), DIVISOR_Y=stride_divisor(columns), num_warps=config.warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _backward_launch(
    rows: int, dim: int, x_row: int, z_row: int, g_row: int, eps: float, groups: int, norm_first: bool,
    wide: torch.dtype, config: Config,
) -> tuple[int, Callable[..., None]]:  # fmt: skip
    """As `_forward_launch`, and how many programs share the rows."""
    columns = dim // groups
    block = power_of_two(columns)
    tile = max(1, config.elements // block)
    turns = max(1, ceil_div(rows, tile * config.shares))  # tiles of a program
    shares = ceil_div(rows, tile * turns)
    return shares, _backward.bind(
        (shares, groups), rows, turns, columns, dim, x_row, z_row, g_row,
        EPS=eps, NORM_FIRST=norm_first, WIDE=_SUMS[wide], BLOCK=block, TILE=tile, DIVISOR_X=stride_divisor(x_row),
        DIVISOR_Z=stride_divisor(z_row), DIVISOR_G=stride_divisor(g_row), DIVISOR_Y=stride_divisor(columns),
        num_warps=config.warps,
    )  # fmt: skip


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` (..., dim) with rows that lie one after another at one distance; a view where that can be."""
    if tensor.is_contiguous() or tensor.dim() == 2 or tensor.numel() == 0:
        return rows_contiguous(tensor)
    return rows_contiguous(tensor.reshape(-1, tensor.shape[-1]))


def _row_stride(rows: Tensor) -> int:
    """From a row of `_rows` to the next."""
    return rows.shape[-1] if rows.is_contiguous() else rows.stride(0)


# A number divided and multiplied by what divides it is unchanged; the compiler learns the alignment of loads from it.
@Kernel
@triton.jit(do_not_specialize=["rows", "x_row", "z_row"])
def _forward(
    x,
    weight,
    z,
    y,
    rows,
    columns,
    dim,
    x_row,
    z_row,
    EPS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIVISOR_X: tl.constexpr,
    DIVISOR_Z: tl.constexpr,
    DIVISOR_Y: tl.constexpr,
):
    x_row, z_row = x_row // DIVISOR_X * DIVISOR_X, z_row // DIVISOR_Z * DIVISOR_Z
    columns, dim = columns // DIVISOR_Y * DIVISOR_Y, dim // DIVISOR_Y * DIVISOR_Y
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    group = tl.program_id(1) * columns
    at_y = row * dim + group + column
    value = tl.load(x + row * x_row + group + column, mask=inside, other=0.0)
    scale = tl.load(weight + group + column, mask=column < columns, other=0.0)
    value = value.to(WIDE)
    gate = value
    if z is not None:
        gate = tl.load(z + row * z_row + group + column, mask=inside, other=0.0)
        gate = gate.to(WIDE)
        gate = gate / (1.0 + tl.exp(-gate))
        if not NORM_FIRST:
            value *= gate
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / columns + EPS)
    value = value * inverse[:, None] * scale.to(WIDE)
    if z is not None and NORM_FIRST:
        value *= gate
    tl.store(y + at_y, value.to(y.dtype.element_ty), mask=inside)


@Kernel
@triton.jit(do_not_specialize=["rows", "turns", "x_row", "z_row", "g_row"])
def _backward(
    x,
    weight,
    z,
    grad_y,
    grad_x,
    grad_z,
    partial,
    rows,
    turns,
    columns,
    dim,
    x_row,
    z_row,
    g_row,
    EPS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DIVISOR_X: tl.constexpr,
    DIVISOR_Z: tl.constexpr,
    DIVISOR_G: tl.constexpr,
    DIVISOR_Y: tl.constexpr,
):
    x_row, z_row = x_row // DIVISOR_X * DIVISOR_X, z_row // DIVISOR_Z * DIVISOR_Z
    columns, dim = columns // DIVISOR_Y * DIVISOR_Y, dim // DIVISOR_Y * DIVISOR_Y
    g_row = g_row // DIVISOR_G * DIVISOR_G
    column = tl.arange(0, BLOCK)[None, :]
    group = tl.program_id(1) * columns
    scale = tl.load(weight + group + column, mask=column < columns, other=0.0).to(WIDE)
    shares = tl.zeros([TILE, BLOCK], dtype=WIDE)
    first = tl.program_id(0).to(tl.int64) * turns * TILE
    for turn in range(turns):
        row = first + turn * TILE + tl.arange(0, TILE)[:, None]
        inside = (row < rows) & (column < columns)
        at_x = row * x_row + group + column
        at_g = row * g_row + group + column
        at_y = row * dim + group + column
        given = tl.load(x + at_x, mask=inside, other=0.0).to(WIDE)
        grad = tl.load(grad_y + at_g, mask=inside, other=0.0).to(WIDE)
        value = given
        gate = given
        pre = given
        on = given
        if z is not None:
            at_z = row * z_row + group + column
            pre = tl.load(z + at_z, mask=inside, other=0.0).to(WIDE)
            on = 1.0 / (1.0 + tl.exp(-pre))
            gate = pre * on
            if not NORM_FIRST:
                value *= gate
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / columns + EPS)[:, None]
        normed = value * inverse
        grad_gate = grad * normed * scale  # where the gate comes last
        if z is not None and NORM_FIRST:
            grad *= gate
        shares += grad * normed
        grad *= scale
        grad = inverse * (grad - normed * (tl.sum(grad * normed, axis=1) / columns)[:, None])
        if z is not None:
            if not NORM_FIRST:
                grad_gate = grad * given
                grad *= gate
            grad_gate *= on * (1.0 + pre * (1.0 - on))
            tl.store(grad_z + at_y, grad_gate.to(grad_z.dtype.element_ty), mask=inside)
        tl.store(grad_x + at_y, grad.to(grad_x.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * dim + group + tl.arange(0, BLOCK)
    tl.store(partial + at, tl.sum(shares, axis=0), mask=tl.arange(0, BLOCK) < columns)


@Kernel
@triton.jit(do_not_specialize=["shares"])
def _sum_shares(partial, grad_weight, shares, dim, BLOCK: tl.constexpr, SHARES: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([SHARES, BLOCK], dtype=partial.dtype.element_ty)
    for first in range(0, shares, SHARES):
        share = first + tl.arange(0, SHARES)
        at = share[:, None].to(tl.int64) * dim + column[None, :]
        sums += tl.load(partial + at, mask=(share[:, None] < shares) & (column[None, :] < dim), other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(grad_weight + column, total.to(grad_weight.dtype.element_ty), mask=column < dim)
