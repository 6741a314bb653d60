"""The causal convolution on the GPU.

A program takes a block of channels through a tile of rows, with the last `width - 1` inputs in registers, so that every
input is read from memory once. The backward recomputes what stood before the activation, and keeps the last `width`
gradients of it the same way:

    g_t  = grad_y_t activation'(bias + sum_k weight_k x_{t - (width - 1) + k})
    dx_s = sum_k weight_k g_{s + (width - 1) - k},    dweight_k = sum_t g_t x_{t - (width - 1) + k}

Sums over rows are taken tile by tile and then over the tiles, in a fixed order. Tiles never cross sequences.
"""

# Triton compiles tuples that grow by +, and no starred ones.
# Conditions on constants are branches of their own.
# mypy: disable-error-code="assignment, operator, misc, arg-type, index, var-annotated"

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.inputs import ConvInputs
from mambakit.ops.packing import sequence_bounds
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import Kernel, on_device_of, rows_contiguous, stride_divisor

ABSENT_GRADIENTS = True  # what `backward` takes in place of zeros: `mambakit.ops.operator`

_LONGEST_ROW = 1 << 22  # elements from a row to the next


Strides = tuple[int, ...]


class Config(NamedTuple):
    """How a kernel is cut up."""

    channels: int  # of a program, at most
    rows: int  # of a program
    unrolled: int  # rows whose loads are in flight together
    warps: int


def forward_config(width: int, elements: int) -> Config:
    """By shape class: the width of the window, and whether there are enough tiles to fill the chip."""
    if width > 8:
        return Config(128, 64, 4, 4)
    return Config(256, 16, 8, 2) if elements < 1 << 23 else Config(256, 64, 8, 2)


def backward_config(width: int, elements: int) -> Config:
    """As `forward_config`."""
    if width > 8:
        return Config(128, 64 + power_of_two(width), 4, 4)
    return Config(128, 32, 8, 2) if elements < 1 << 23 else Config(512, 128, 4, 4)


def forward(inputs: ConvInputs, y: Tensor, final_state: Tensor, config: Config | None = None) -> None:
    """Fill y and the final state."""
    x, weight, state = _readable(inputs.x), inputs.weight, inputs.initial_state
    config = config or forward_config(weight.shape[1], x.numel())
    sequences, tiles, table = _tiles(inputs, config.rows)
    if sequences * tiles * x.shape[2] == 0:
        return
    state = None if state is None else state.contiguous()
    layout = (tiles, x.shape, x.stride(), weight.shape[1], weight.stride(), inputs.silu, config)
    with on_device_of(x):
        _forward_launch(sequences * tiles, *layout)(x, weight, inputs.bias, state, y, final_state, table)


def backward(
    inputs: ConvInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    grads: ConvInputs,
    config: Config | None = None,
) -> None:
    """Fill `grads`."""
    x, grad_y = _readable(inputs.x), _readable(grad_y)
    weight, state = inputs.weight, inputs.initial_state
    channels, width = weight.shape
    config = config or backward_config(width, x.numel())
    sequences, tiles, table = _tiles(inputs, config.rows - (width - 1))
    if channels == 0:
        return
    partial = weight.new_empty(sequences * tiles, width + 1, channels)
    state = None if state is None else state.contiguous()
    outer = None if grad_final_state is None else grad_final_state.contiguous()
    layout = (tiles, x.shape, x.stride(), grad_y.stride(), width, weight.stride(), inputs.silu, config)
    with on_device_of(x):
        if sequences * tiles > 0:
            _backward_launch(sequences * tiles, *layout)(
                x, weight, inputs.bias, state, grad_y, outer, grads.x, grads.initial_state, partial, table
            )
        _sum_tiles[(ceil_div(channels, 32), width + 1)](
            partial, grads.weight, grads.bias, sequences * tiles, channels, WIDTH=width, BLOCK=32, TILES=64
        )


@functools.lru_cache(maxsize=512)
def _forward_launch(
    all_tiles: int,
    tiles: int,
    shape: torch.Size,
    strides: Strides,
    width: int,
    taps: Strides,
    silu: bool,
    config: Config,
) -> Callable[..., None]:
    """All that follows from shapes and strides, found out once."""
    _, length, channels = shape
    block = min(config.channels, power_of_two(channels, 32))
    return _forward.bind(
        (all_tiles * ceil_div(channels, block),), length, channels, tiles, *strides[:2], *taps,
        WIDTH=width, SILU=silu, BLOCK=block, ROWS=config.rows, UNROLLED=config.unrolled,
        DIVISOR=stride_divisor(*strides[:2]), DIVISOR_Y=stride_divisor(channels), num_warps=config.warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _backward_launch(
    all_tiles: int,
    tiles: int,
    shape: torch.Size,
    strides: Strides,
    grad_strides: Strides,
    width: int,
    taps: Strides,
    silu: bool,
    config: Config,
) -> Callable[..., None]:
    """As `_forward_launch`."""
    _, length, channels = shape
    block = min(config.channels, power_of_two(channels, 32))
    return _backward.bind(
        (all_tiles * ceil_div(channels, block),), length, channels, tiles, *strides[:2], *grad_strides[:2], *taps,
        WIDTH=width, SILU=silu, BLOCK=block, WHOLE=channels % block == 0, ROWS=config.rows,
        UNROLLED=config.unrolled, DIVISOR=stride_divisor(*strides[:2]),
        DIVISOR_G=stride_divisor(*grad_strides[:2]), DIVISOR_X=stride_divisor(channels), num_warps=config.warps,
    )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    """`x` with strides that the kernels take: offsets within a tile fit 32 bits."""
    return rows_contiguous(x) if abs(x.stride(1)) < _LONGEST_ROW else x.contiguous()


def _tiles(inputs: ConvInputs, rows: int) -> tuple[int, int, Tensor | None]:
    """(sequences, tiles in each, None), or of a pack (tiles, 1, table): a row a tile, and at least one a sequence.

    The table's rows are (sequence, its first row, its length, the tile's first row in it).
    """
    batch, length, _ = inputs.x.shape
    if inputs.cu_seqlens is None:
        return batch, max(1, ceil_div(length, rows)), None
    bounds = sequence_bounds(batch, length, inputs.cu_seqlens)
    table = [
        (sequence, start, end - start, first)
        for sequence, (start, end) in enumerate(itertools.pairwise(bounds))
        for first in range(0, max(1, end - start), rows)
    ]
    return len(table), 1, torch.tensor(table, dtype=torch.int64).reshape(-1, 4).to(inputs.x.device)


@triton.jit
def _place(table, length, tiles, tile, ROWS: tl.constexpr):
    """(sequence, batch row, first row, length of the sequence, first row of the tile) of a tile."""
    if table is None:
        sequence = (tile // tiles).to(tl.int64)
        return sequence, sequence, sequence * 0, length + sequence * 0, ((tile % tiles) * ROWS).to(tl.int64)
    else:
        entry = table + tile.to(tl.int64) * 4
        sequence = tl.load(entry)
        return sequence, sequence * 0, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _channels(channels, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The channels of the program, and which of them exist: all, where blocks are WHOLE."""
    channel = (tl.program_id(0) % tl.cdiv(channels, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    if WHOLE:
        return channel, tl.full([BLOCK], True, tl.int1)
    else:
        return channel, channel < channels


@triton.jit
def _row(x, state, t, first, left, x_row, channel, inside, channels, WIDTH: tl.constexpr, DIVISOR: tl.constexpr):
    """Row t of a tile, of the initial state where that lies before the sequence, zero past its end.

    The tile's first row is the sequence's `first`; `left` rows follow it.
    """
    value = tl.load(
        x + tl.multiple_of(t * x_row, DIVISOR) + channel, mask=inside & (first + t >= 0) & (t < left), other=0.0
    )
    if state is not None:
        at = (first + t + WIDTH - 1) * channels
        before = tl.load(state + at + channel, mask=inside & (first + t < 0), other=0.0)
        value = tl.where(first + t < 0, before, value)
    return value


@triton.jit
def _taps(weight, bias, channel, inside, w_channel, w_tap, WIDTH: tl.constexpr):
    """The weights of each tap, and the bias."""
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + channel * w_channel + k * w_tap, mask=inside, other=0.0),)
    if bias is not None:
        return taps, tl.load(bias + channel, mask=inside, other=0.0)
    else:
        return taps, taps[0] * 0.0


@Kernel
@triton.jit(do_not_specialize=["length", "tiles", "x_batch", "x_row"])
def _forward(
    x,
    weight,
    bias,
    state,
    y,
    final_state,
    table,
    length,
    channels,
    tiles,
    x_batch,
    x_row,
    w_channel,
    w_tap,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLLED: tl.constexpr,
    DIVISOR: tl.constexpr,
    DIVISOR_Y: tl.constexpr,
):
    tile = tl.program_id(0) // tl.cdiv(channels, BLOCK)
    channel = (tl.program_id(0) % tl.cdiv(channels, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    sequence, batch, start, count, first = _place(table, length, tiles, tile, ROWS)
    end = tl.minimum(first + ROWS, count)
    x += tl.multiple_of(batch * x_batch, DIVISOR) + tl.multiple_of(start * x_row, DIVISOR)
    y += tl.multiple_of((batch * length + start) * channels, DIVISOR_Y)
    if state is not None:
        state += sequence * (WIDTH - 1) * channels
    taps, offset = _taps(weight, bias, channel, inside, w_channel, w_tap, WIDTH)

    window = ()
    for k in tl.static_range(WIDTH - 1):
        t = first - (WIDTH - 1) + k
        row = _row(x, state, t, start * 0, count, x_row, channel, inside, channels, WIDTH, DIVISOR)
        window = window + (row,)
    for t in range(first, end, UNROLLED):
        rows = ()
        for i in tl.static_range(WIDTH - 1):
            rows = rows + (window[i],)
        for i in tl.static_range(UNROLLED):
            at = tl.multiple_of((t + i) * x_row, DIVISOR)
            rows = rows + (tl.load(x + at + channel, mask=inside & (t + i < end), other=0.0),)
        for i in tl.static_range(UNROLLED):
            value = offset
            for k in tl.static_range(WIDTH):
                value += taps[k] * rows[i + k].to(offset.dtype)
            if SILU:
                value = value / (1.0 + tl.exp(-value))
            at = tl.multiple_of((t + i) * channels, DIVISOR_Y)
            tl.store(y + at + channel, value.to(y.dtype.element_ty), mask=inside & (t + i < end))
        window = ()
        for i in tl.static_range(WIDTH - 1):
            window = window + (rows[UNROLLED + i],)

    if end == count:
        for k in tl.static_range(WIDTH - 1):
            t = count - (WIDTH - 1) + k
            last = _row(x, state, t, start * 0, count, x_row, channel, inside, channels, WIDTH, DIVISOR)
            tl.store(final_state + (sequence * (WIDTH - 1) + k) * channels + channel, last, mask=inside)


@Kernel
@triton.jit(do_not_specialize=["length", "tiles", "x_batch", "x_row", "g_batch", "g_row"])
def _backward(
    x,
    weight,
    bias,
    state,
    grad_y,
    grad_final,
    grad_x,
    grad_state,
    partial,
    table,
    length,
    channels,
    tiles,
    x_batch,
    x_row,
    g_batch,
    g_row,
    w_channel,
    w_tap,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLLED: tl.constexpr,
    DIVISOR: tl.constexpr,
    DIVISOR_G: tl.constexpr,
    DIVISOR_X: tl.constexpr,
):
    # A tile of ROWS - (WIDTH - 1) rows of grad_x takes gradients of ROWS outputs, the last of them the next tile's.
    OWN: tl.constexpr = ROWS - (WIDTH - 1)
    tile = tl.program_id(0) // tl.cdiv(channels, BLOCK)
    # Rows are counted from the tile's first on, in 32 bits.
    channel, inside = _channels(channels, BLOCK, WHOLE)
    sequence, batch, start, count, first = _place(table, length, tiles, tile, OWN)
    left = tl.minimum(count - first, 1 << 20).to(tl.int32)
    end = tl.minimum(left, OWN)
    held = left - (WIDTH - 1)  # the first row that the final state holds
    x += tl.multiple_of(batch * x_batch, DIVISOR) + tl.multiple_of((start + first) * x_row, DIVISOR)
    grad_y += tl.multiple_of(batch * g_batch, DIVISOR_G) + tl.multiple_of((start + first) * g_row, DIVISOR_G)
    grad_x += tl.multiple_of((batch * length + start + first) * channels, DIVISOR_X)
    states = sequence * (WIDTH - 1) * channels
    if state is not None:
        state += states
    taps, offset = _taps(weight, bias, channel, inside, w_channel, w_tap, WIDTH)
    zero = offset * 0.0

    window = ()
    later = ()  # gradients of the WIDTH - 1 outputs before the present one
    sums = (zero,)
    for k in tl.static_range(WIDTH - 1):
        row = _row(x, state, k - (WIDTH - 1), first, left, x_row, channel, inside, channels, WIDTH, DIVISOR)
        window = window + (row,)
        later = later + (zero,)
        sums = sums + (zero,)
    total = zero
    for t in range(0, end + (WIDTH - 1), UNROLLED):
        rows = ()
        gs = ()
        outs = ()
        for i in tl.static_range(WIDTH - 1):
            rows = rows + (window[i],)
            gs = gs + (later[i],)
        for i in tl.static_range(UNROLLED):
            there = inside & (t + i < left)
            at = tl.multiple_of((t + i) * x_row, DIVISOR)
            rows = rows + (tl.load(x + at + channel, mask=there, other=0.0),)
            at = tl.multiple_of((t + i) * g_row, DIVISOR_G)
            outs = outs + (tl.load(grad_y + at + channel, mask=there, other=0.0),)
        for i in tl.static_range(UNROLLED):
            g = outs[i].to(offset.dtype)
            if SILU:
                value = offset
                for k in tl.static_range(WIDTH):
                    value += taps[k] * rows[i + k].to(offset.dtype)
                on = 1.0 / (1.0 + tl.exp(-value))
                g = g * on * (1.0 + value * (1.0 - on))
            gs = gs + (g,)
            own = tl.where(t + i < end, g, 0.0)
            total += own
            added = ()
            for k in tl.static_range(WIDTH):
                added = added + (sums[k] + own * rows[i + k].to(offset.dtype),)
            sums = added
            s = t + i - (WIDTH - 1)
            grad = zero
            for k in tl.static_range(WIDTH):
                grad += taps[k] * gs[i + WIDTH - 1 - k]
            if WIDTH > 1 and grad_final is not None:
                if (s >= held) & (s < end):  # the final state holds this row: its gradient from there
                    from_state = tl.load(grad_final + states + (s - held) * channels + channel, mask=inside, other=0.0)
                    grad += from_state.to(offset.dtype)
            at = tl.multiple_of(s * channels, DIVISOR_X)
            tl.store(grad_x + at + channel, grad.to(grad_x.dtype.element_ty), mask=inside & (s >= 0) & (s < end))
            if grad_state is not None:
                if (first == 0) & (s < 0) & (s < end):
                    to_state = grad_state + states + (s + WIDTH - 1) * channels
                    tl.store(to_state + channel, grad.to(grad_state.dtype.element_ty), mask=inside)
        window = ()
        later = ()
        for i in tl.static_range(WIDTH - 1):
            window = window + (rows[UNROLLED + i],)
            later = later + (gs[UNROLLED + i],)

    at = tile.to(tl.int64) * (WIDTH + 1) * channels
    for k in tl.static_range(WIDTH):
        tl.store(partial + at + k * channels + channel, sums[k], mask=inside)
    tl.store(partial + at + WIDTH * channels + channel, total, mask=inside)


@Kernel
@triton.jit(do_not_specialize=["tiles"])
def _sum_tiles(
    partial, grad_weight, grad_bias, tiles, channels, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """The sums of all tiles, the same order whatever runs when: to grad_weight (channels, WIDTH) and grad_bias."""
    k = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([TILES, BLOCK], dtype=partial.dtype.element_ty)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = (tile[:, None].to(tl.int64) * (WIDTH + 1) + k) * channels + channel[None, :]
        sums += tl.load(partial + at, mask=(tile[:, None] < tiles) & (channel[None, :] < channels), other=0.0)
    total = tl.sum(sums, axis=0)
    if k < WIDTH:
        tl.store(grad_weight + channel * WIDTH + k, total, mask=channel < channels)
    elif grad_bias is not None:
        tl.store(grad_bias + channel, total, mask=channel < channels)
