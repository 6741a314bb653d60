"""The root-mean-square norm on the GPU, plain and gated: one kernel casts, sums, normalises and gates.

    r = x silu(z) or x,   s = 1 / sqrt(mean(r^2) + EPS),   y = weight r s [silu(z)]

The backward recomputes s from x. A program takes the groups of several rows one after another and keeps its share of
the gradient of the weight in registers; the shares are added in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.dispatch import accumulation_dtype
from mambakit.ops.inputs import NormInputs
from mambakit.ops.triton.launch import on_device_of, power_of_two, rows_contiguous, stride_divisor

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
    x, z, rows, dim, columns = _sizes(inputs)
    config = config or forward_config(columns)
    block = power_of_two(columns)
    tile = max(1, config.elements // block)
    if x.numel() == 0:
        return
    with on_device_of(x):
        _forward[(triton.cdiv(rows, tile), inputs.groups)](
            x,
            inputs.weight,
            z,
            y,
            rows,
            columns,
            dim,
            x.stride(0),
            0 if z is None else z.stride(0),
            EPS=inputs.eps,
            NORM_FIRST=inputs.norm_before_gate,
            WIDE=_SUMS[accumulation_dtype(x, inputs.weight, z)],
            BLOCK=block,
            TILE=tile,
            DIVISOR_X=stride_divisor(x.stride(0)),
            DIVISOR_Z=stride_divisor(0 if z is None else z.stride(0)),
            DIVISOR_Y=stride_divisor(columns),
            num_warps=config.warps,
        )


def backward(
    inputs: NormInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    _: Tensor,
    grads: NormInputs,
    config: Config | None = None,
) -> None:
    """Fill `grads`."""
    x, z, rows, dim, columns = _sizes(inputs)
    grad_y = rows_contiguous(grad_y.reshape(-1, dim))
    config = config or backward_config(columns)
    block = power_of_two(columns)
    tile = max(1, config.elements // block)
    turns = max(1, triton.cdiv(rows, tile * config.shares))  # tiles of a program
    shares = triton.cdiv(rows, tile * turns)
    partial = x.new_empty(shares, dim, dtype=accumulation_dtype(x, inputs.weight, z))
    if dim == 0:
        return
    with on_device_of(x):
        if shares > 0:
            _backward[(shares, inputs.groups)](
                x,
                inputs.weight,
                z,
                grad_y,
                grads.x,
                grads.z,
                partial,
                rows,
                turns,
                columns,
                dim,
                x.stride(0),
                0 if z is None else z.stride(0),
                grad_y.stride(0),
                EPS=inputs.eps,
                NORM_FIRST=inputs.norm_before_gate,
                WIDE=_SUMS[partial.dtype],
                BLOCK=block,
                TILE=tile,
                DIVISOR_X=stride_divisor(x.stride(0)),
                DIVISOR_Z=stride_divisor(0 if z is None else z.stride(0)),
                DIVISOR_G=stride_divisor(grad_y.stride(0)),
                DIVISOR_Y=stride_divisor(columns),
                num_warps=config.warps,
            )
        _sum_shares[(triton.cdiv(dim, 32),)](partial, grads.weight, shares, dim, BLOCK=32, SHARES=128)


def _sizes(inputs: NormInputs) -> tuple[Tensor, Tensor | None, int, int, int]:
    """x and z as (rows, dim), and rows, dim, columns of a group."""
    dim = inputs.x.shape[-1]
    x = rows_contiguous(inputs.x.reshape(-1, dim) if dim else inputs.x.reshape(0, 0))
    z = None if inputs.z is None else rows_contiguous(inputs.z.reshape(x.shape))
    return x, z, x.shape[0], dim, dim // inputs.groups


# A number divided and multiplied by what divides it is unchanged; the compiler learns the alignment of loads from it.
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
