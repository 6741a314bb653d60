"""The projections of a single step with what stands before and after them: norm and gate, residual.

    y = entering(x) W^T + bias [+ residual]

What enters is x, its root-mean-square norm, or that of x and a gate. The norm's divisor is one number a row, so it is
applied to the product: x is read once, and its squares are summed on the way. Outputs that a causal convolution
follows, with silu, go through its step as they are made; its state may be written over the one that is read.

With few rows the time is that of reading W, and of the launch. One row after another is multiplied in registers
(`_row`); from a few rows on W is worth reading once for several of them, by the matrix units (`_tile`), where neither
norm nor convolution keeps these waiting. Kernels that run in a graph may start before the one in front has ended: they
read the weights, which nothing in a graph changes, then wait for it, and only then read what it wrote.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.triton import interpreting
from mambakit.ops.triton.counting import power_of_two
from mambakit.ops.triton.launch import on_device_of

NONE, BEFORE, AFTER = 0, 1, 2  # where a gate stands, seen from the norm
_LEAST_PROGRAMS = 160  # a few more than an H100 has multiprocessors
_ROW_ELEMENTS = 16384  # of W in the registers of a program
_DOT_ROWS = 4  # from so many rows on by the matrix units
_NARROW = 128  # outputs that make too few tiles to fill the chip
_STRIP = 128  # channels of one product of tiles


def linear(
    x: Tensor,
    z: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    eps: float,
    gate_after: bool,
    convolution: tuple[Tensor, Tensor | None, Tensor, Tensor] | None,
    first: int,
    early: bool,
) -> None:
    """Fill y; see `mambakit.ops.decode.linear`. `convolution`: weight, bias, the states before and after."""
    rows, outs, width = x.shape[0], weight.shape[0], weight.shape[1]
    plain = norm is None and z is None and convolution is None
    residual_row = 0 if residual is None else residual.stride(0)
    with on_device_of(x):
        if plain and rows >= _DOT_ROWS and outs > _NARROW and weight.element_size() == 2:
            tall = 16 if rows <= 16 else 32
            wide = 32 if outs >= 32 * _LEAST_PROGRAMS // 2 else 16
            _tile[(triton.cdiv(outs, wide), triton.cdiv(rows, tall))](
                x,
                weight,
                bias,
                residual,
                y,
                x.stride(0),
                residual_row,
                rows,
                outs,
                WIDTH=width,
                ROWS=tall,
                BLOCK=wide,
                STRIP=_STRIP,
                WIDENED=interpreting(),
                EARLY=early,
                num_warps=4,
                num_stages=3,
                launch_pdl=early,
            )
            return
        block = min(16, max(1, _ROW_ELEMENTS // power_of_two(width)))
        while block > 1 and rows * triton.cdiv(outs, block) < _LEAST_PROGRAMS:
            block //= 2
        _row[(triton.cdiv(outs, block), rows)](
            x,
            z,
            norm,
            weight,
            bias,
            residual,
            y,
            *(convolution or (None,) * 4),
            x.stride(0),
            0 if z is None else z.stride(0),
            residual_row,
            rows,
            outs,
            first,
            0 if convolution is None else convolution[0].shape[0],
            eps,
            WIDTH=width,
            PADDED=power_of_two(width),
            BLOCK=block,
            GATE=NONE if z is None else AFTER if gate_after else BEFORE,
            TAPS=0 if convolution is None else convolution[0].shape[1],
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )


@triton.jit
def silu(value):
    return value / (1.0 + tl.exp(-value))


@triton.jit
def wait_for_the_kernel_in_front(EARLY: tl.constexpr):
    """After this what it wrote can be read; and the kernel behind may start, as far as it does not need this one."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _entering(x, z, scale, GATE: tl.constexpr):
    """What is multiplied, but for the norm's divisor, and what the squares are taken of."""
    normed = x
    if GATE == 1:
        normed = x * silu(z)
    value = normed * scale
    if GATE == 2:
        value *= silu(z)
    return value, normed


@triton.jit
def convolved(now, weight, bias, conv, conv_after, channel, inside, channels, TAPS: tl.constexpr):
    """silu of the convolution's step where `inside`, elsewhere `now`; and the inputs of the next step."""
    value = tl.load(weight + channel * TAPS + (TAPS - 1), mask=inside, other=0.0).to(tl.float32) * now.to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS - 1):
        before = tl.load(conv + k * channels + channel, mask=inside, other=0.0)
        value += tl.load(weight + channel * TAPS + k, mask=inside, other=0.0).to(tl.float32) * before.to(tl.float32)
        tl.debug_barrier()  # conv_after may be conv: nobody overwrites what another thread is still to read
        if k > 0:
            tl.store(conv_after + (k - 1) * channels + channel, before, mask=inside)
    if TAPS > 1:
        tl.store(conv_after + (TAPS - 2) * channels + channel, now.to(conv_after.dtype.element_ty), mask=inside)
    return tl.where(inside, silu(value), now.to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def _row(
    x,
    z,
    norm,
    weight,
    bias,
    residual,
    y,
    conv_weight,
    conv_bias,
    conv,
    conv_after,
    x_row,
    z_row,
    residual_row,
    rows,
    outs,
    first,
    channels,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    TAPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK outputs of one row."""
    row = tl.program_id(1).to(tl.int64)
    n, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    own, there = n < outs, k < WIDTH
    taps = tl.load(weight + n[:, None].to(tl.int64) * WIDTH + k[None, :], mask=own[:, None] & there[None, :], other=0.0)
    scale = 1.0
    if norm is not None:
        scale = tl.load(norm + k, mask=there, other=0.0).to(tl.float32)
    wait_for_the_kernel_in_front(EARLY)
    value = tl.load(x + row * x_row + k, mask=there, other=0.0).to(tl.float32)
    gate = value
    if GATE != 0:
        gate = tl.load(z + row * z_row + k, mask=there, other=0.0).to(tl.float32)
    value, normed = _entering(value, gate, scale, GATE)
    out = tl.sum(taps.to(tl.float32) * value[None, :], axis=1)
    if norm is not None:
        out *= tl.rsqrt(tl.sum(normed * normed, axis=0) / WIDTH + eps)
    if bias is not None:
        out += tl.load(bias + n, mask=own, other=0.0).to(tl.float32)
    if residual is not None:
        out += tl.load(residual + row * residual_row + n, mask=own, other=0.0).to(tl.float32)
    if TAPS > 0:
        channel = n - first
        out = convolved(
            out.to(y.dtype.element_ty),
            conv_weight,
            conv_bias,
            conv + row * (TAPS - 1) * channels,
            conv_after + row * (TAPS - 1) * channels,
            channel,
            own & (channel >= 0) & (channel < channels),
            channels,
            TAPS,
        )
    tl.store(y + row * outs + n, out.to(y.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["rows"])
def _tile(
    x,
    weight,
    bias,
    residual,
    y,
    x_row,
    residual_row,
    rows,
    outs,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIP: tl.constexpr,
    WIDENED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK outputs of ROWS rows; the products `WIDENED` for Triton's interpreter, which has none of bfloat16."""
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_m, in_n = m < rows, n < outs
    wait_for_the_kernel_in_front(EARLY)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    for strip in range(0, WIDTH, STRIP):
        k = strip + tl.arange(0, STRIP)
        there = k < WIDTH
        taps = tl.load(
            weight + n[None, :].to(tl.int64) * WIDTH + k[:, None], mask=there[:, None] & in_n[None, :], other=0.0
        )
        inside = in_m[:, None] & there[None, :]
        value = tl.load(x + m[:, None] * x_row + k[None, :], mask=inside, other=0.0).to(taps.dtype)
        if WIDENED:
            out += tl.dot(value.to(tl.float32), taps.to(tl.float32))
        else:
            out = tl.dot(value, taps, out)
    if bias is not None:
        out += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    both = in_m[:, None] & in_n[None, :]
    if residual is not None:
        out += tl.load(residual + m[:, None] * residual_row + n[None, :], mask=both, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * outs + n[None, :], out.to(y.dtype.element_ty), mask=both)
