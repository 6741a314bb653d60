"""The causal convolution on the GPU.

A program takes a block of channels through a tile of rows, with the last `width - 1` inputs in registers, so that every
input is read from memory once. Memory is what both directions wait for: loads of the next rows are under way at any
time, and tiles are as long as lets all programs run at once. The backward recomputes what stood before the activation,
and keeps the last `width` gradients of it the same way:

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
from mambakit.ops.triton.launch import Kernel, on_device_of, processors_of, rows_contiguous, stride_divisor
from mambakit.ops.triton.selective_scan_steps import sigmoid

ABSENT_GRADIENTS = True  # what `backward` takes in place of zeros: `mambakit.ops.operator`

_LONGEST_ROW = 1 << 22  # elements from a row to the next


Strides = tuple[int, ...]


class Config(NamedTuple):
    """How a kernel is cut up."""

    channels: int  # of a program, at most
    ahead: int  # rows whose loads are under way
    warps: int
    registers: int  # of a thread, at most
    least: int  # rows of a tile
    most: int = 256

    def resident(self) -> int:
        """Programs that a multiprocessor has registers for: each of its four parts has 16384."""
        return 16384 // (32 * self.registers) * 4 // self.warps


def forward_config(width: int, size: int) -> Config:
    """By the width of the window and the size of an element in bytes."""
    if size == 8:
        return Config(128, 2, 4, 255, 16)
    if width > 8:
        return Config(128, 4, 4, 128, 64)
    if width > 4:
        return Config(256, 8 if size == 2 else 4, 2, 128, 16)
    return Config(256, 8, 2, 96, 16) if size == 2 else Config(256, 4, 2, 80, 16)


def backward_config(width: int, size: int) -> Config:
    """As `forward_config`."""
    if size == 8 or width > 8:
        return Config(128, 4, 4, 255, 64)
    return Config(128, 8 if size == 2 else 4, 2, 96 if width <= 4 else 168, 32)


def forward(inputs: ConvInputs, y: Tensor, final_state: Tensor, config: Config | None = None) -> None:
    """Fill y and the final state."""
    x, weight, state = _readable(inputs.x), inputs.weight, inputs.initial_state
    config = config or forward_config(weight.shape[1], x.element_size())
    rows = _rows(x, config, 0)
    sequences, tiles, table = _tiles(inputs, rows)
    if sequences * tiles * x.shape[2] == 0:
        return
    state = None if state is None else state.contiguous()
    layout = (tiles, rows, x.shape, x.stride(), weight.shape[1], weight.stride(), inputs.silu, config)
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
    config = config or backward_config(width, x.element_size())
    if channels == 0:
        return
    rows = _rows(x, config, width - 1)
    sequences, tiles, table = _tiles(inputs, rows)
    wide = torch.promote_types(weight.dtype, torch.float32)
    partial = weight.new_empty(sequences * tiles, width + 1, channels, dtype=wide)
    state = None if state is None else state.contiguous()
    outer = None if grad_final_state is None else grad_final_state.contiguous()
    layout = (tiles, rows, x.shape, x.stride(), grad_y.stride(), width, weight.stride(), inputs.silu, config)
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
    rows: int,
    shape: torch.Size,
    strides: Strides,
    width: int,
    taps: Strides,
    silu: bool,
    config: Config,
) -> Callable[..., None]:
    """All that follows from shapes and strides, found out once."""
    _, length, channels = shape
    block = _block(config, channels)
    whole = channels % block == 0
    return _forward.bind(
        (all_tiles * ceil_div(channels, block),), length, channels, tiles, rows, *strides[:2], *taps,
        WIDTH=width, SILU=silu, BLOCK=block, WHOLE=whole, AHEAD=config.ahead,
        STEPS=(strides[1], channels) if whole else None,
        DIVISOR=stride_divisor(*strides[:2]), DIVISOR_Y=stride_divisor(channels), num_warps=config.warps,
        maxnreg=config.registers,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _backward_launch(
    all_tiles: int,
    tiles: int,
    rows: int,
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
    block = _block(config, channels)
    whole = channels % block == 0
    return _backward.bind(
        (all_tiles * ceil_div(channels, block),), length, channels, tiles, rows, *strides[:2], *grad_strides[:2], *taps,
        WIDTH=width, SILU=silu, BLOCK=block, WHOLE=whole, AHEAD=config.ahead,
        STEPS=(strides[1], grad_strides[1], channels) if whole else None, DIVISOR=stride_divisor(*strides[:2]),
        DIVISOR_G=stride_divisor(*grad_strides[:2]), DIVISOR_X=stride_divisor(channels), num_warps=config.warps,
        maxnreg=config.registers,
    )  # fmt: skip


def _block(config: Config, channels: int) -> int:
    return min(config.channels, power_of_two(channels, 32))


def _rows(x: Tensor, config: Config, shared: int) -> int:
    """Rows of a tile: as many as leave no more programs than run at once, or, where that is too many rows, than run in
    a few rounds, so that the last round is as full as the first. A program walks along `shared` rows more, all of them
    a multiple of the rows ahead."""
    batch, length, channels = x.shape
    columns = batch * ceil_div(channels, _block(config, channels))
    at_once = processors_of(x.device) * config.resident()
    rounds = ceil_div(length * columns, at_once * config.most)
    tiles = max(at_once * rounds // max(columns, 1), 1)
    rows = max(ceil_div(length, tiles), config.least)
    return ceil_div(rows + shared, config.ahead) * config.ahead - shared


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
def _place(table, length, tiles, tile, rows):
    """(sequence, batch row, first row, length of the sequence, first row of the tile) of a tile."""
    if table is None:
        sequence = (tile // tiles).to(tl.int64)
        return sequence, sequence, sequence * 0, length + sequence * 0, ((tile % tiles) * rows).to(tl.int64)
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
    """The weights of each tap, and the bias, in the dtype of sums."""
    wide: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + channel * w_channel + k * w_tap, mask=inside, other=0.0).to(wide),)
    if bias is not None:
        return taps, tl.load(bias + channel, mask=inside, other=0.0).to(wide)
    else:
        return taps, taps[0] * 0.0


@Kernel
@triton.jit(do_not_specialize=["length", "tiles", "rows", "x_batch", "x_row"])
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
    rows,
    x_batch,
    x_row,
    w_channel,
    w_tap,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
    STEPS: tl.constexpr,
    DIVISOR: tl.constexpr,
    DIVISOR_Y: tl.constexpr,
):
    tile = tl.program_id(0) // tl.cdiv(channels, BLOCK)
    # Rows are counted from the tile's first on, in 32 bits.
    channel, inside = _channels(channels, BLOCK, WHOLE)
    sequence, batch, start, count, first = _place(table, length, tiles, tile, rows)
    left = tl.minimum(count - first, 1 << 20).to(tl.int32)
    end = tl.minimum(left, rows)
    x += tl.multiple_of(batch * x_batch, DIVISOR) + tl.multiple_of((start + first) * x_row, DIVISOR)
    y += tl.multiple_of((batch * length + start + first) * channels, DIVISOR_Y)
    if state is not None:
        state += sequence * (WIDTH - 1) * channels
    x_step = STEPS[0] if STEPS is not None else x_row
    y_step = STEPS[1] if STEPS is not None else channels
    taps, offset = _taps(weight, bias, channel, inside, w_channel, w_tap, WIDTH)

    ahead = ()
    for i in tl.static_range(AHEAD):
        at = x + tl.multiple_of(i * x_step, DIVISOR)
        ahead = ahead + (tl.load(at + channel, mask=inside & (i < end)),)
    window = ()
    for k in tl.static_range(WIDTH - 1):
        row = _row(x, state, k - (WIDTH - 1), first, left, x_step, channel, inside, channels, WIDTH, DIVISOR)
        window = window + (row.to(offset.dtype),)
    for t in range(0, end, AHEAD):
        x_next = x + tl.multiple_of((t + AHEAD) * x_step, DIVISOR) + channel
        y_now = y + tl.multiple_of(t * y_step, DIVISOR_Y) + channel
        rest = end - t
        for i in tl.static_range(AHEAD):  # what is used up makes room, so that nothing under way is ever moved
            window = window + (ahead[0].to(offset.dtype),)
            following = tl.load(x_next + tl.multiple_of(i * x_step, DIVISOR), mask=inside & (AHEAD + i < rest))
            ahead = ahead[1:] + (following,)
            value = offset
            for k in tl.static_range(WIDTH):
                value += taps[k] * window[k]
            if SILU:
                value *= sigmoid(value)
            y_at = y_now + tl.multiple_of(i * y_step, DIVISOR_Y)
            tl.store(y_at, value.to(y.dtype.element_ty), mask=inside & (i < rest))
            window = window[1:]

    if end == left:
        for k in tl.static_range(WIDTH - 1):
            t = left - (WIDTH - 1) + k
            last = _row(x, state, t, first, left, x_row, channel, inside, channels, WIDTH, DIVISOR)
            tl.store(final_state + (sequence * (WIDTH - 1) + k) * channels + channel, last, mask=inside)


@Kernel
@triton.jit(do_not_specialize=["length", "tiles", "rows", "x_batch", "x_row", "g_batch", "g_row"])
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
    rows,
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
    AHEAD: tl.constexpr,
    STEPS: tl.constexpr,
    DIVISOR: tl.constexpr,
    DIVISOR_G: tl.constexpr,
    DIVISOR_X: tl.constexpr,
):
    # The tile's rows of grad_x take gradients of WIDTH - 1 outputs more, which are the next tile's.
    tile = tl.program_id(0) // tl.cdiv(channels, BLOCK)
    # Rows are counted from the tile's first on, in 32 bits.
    channel, inside = _channels(channels, BLOCK, WHOLE)
    sequence, batch, start, count, first = _place(table, length, tiles, tile, rows)
    left = tl.minimum(count - first, 1 << 20).to(tl.int32)
    end = tl.minimum(left, rows)
    reach = tl.minimum(left, rows + (WIDTH - 1))
    held = left - (WIDTH - 1)  # the first row that the final state holds
    x += tl.multiple_of(batch * x_batch, DIVISOR) + tl.multiple_of((start + first) * x_row, DIVISOR)
    grad_y += tl.multiple_of(batch * g_batch, DIVISOR_G) + tl.multiple_of((start + first) * g_row, DIVISOR_G)
    grad_x += tl.multiple_of((batch * length + start + first) * channels, DIVISOR_X)
    states = sequence * (WIDTH - 1) * channels
    if state is not None:
        state += states
    taps, offset = _taps(weight, bias, channel, inside, w_channel, w_tap, WIDTH)
    zero = offset * 0.0
    x_step = STEPS[0] if STEPS is not None else x_row
    g_step = STEPS[1] if STEPS is not None else g_row
    dx_step = STEPS[2] if STEPS is not None else channels

    window = ()
    later = ()  # gradients of the WIDTH - 1 outputs before the present one
    sums = (zero,)
    for k in tl.static_range(WIDTH - 1):
        row = _row(x, state, k - (WIDTH - 1), first, left, x_step, channel, inside, channels, WIDTH, DIVISOR)
        window = window + (row.to(offset.dtype),)
        later = later + (zero,)
        sums = sums + (zero,)
    total = zero
    xs, gs = (), ()
    for i in tl.static_range(AHEAD):
        there = inside & (i < reach)
        xs = xs + (tl.load(x + tl.multiple_of(i * x_step, DIVISOR) + channel, mask=there, other=0.0),)
        gs = gs + (tl.load(grad_y + tl.multiple_of(i * g_step, DIVISOR_G) + channel, mask=there, other=0.0),)
    for t in range(0, end + (WIDTH - 1), AHEAD):
        x_next = x + tl.multiple_of((t + AHEAD) * x_step, DIVISOR) + channel
        g_next = grad_y + tl.multiple_of((t + AHEAD) * g_step, DIVISOR_G) + channel
        now = grad_x + tl.multiple_of(t * dx_step, DIVISOR_X) + channel
        rest, loaded = end - t, reach - t
        for i in tl.static_range(AHEAD):  # what is used up makes room, so that nothing under way is ever moved
            window = window + (xs[0].to(offset.dtype),)
            g = gs[0].to(offset.dtype)
            there = inside & (AHEAD + i < loaded)
            xs = xs[1:] + (tl.load(x_next + tl.multiple_of(i * x_step, DIVISOR), mask=there, other=0.0),)
            gs = gs[1:] + (tl.load(g_next + tl.multiple_of(i * g_step, DIVISOR_G), mask=there, other=0.0),)
            if SILU:
                value = offset
                for k in tl.static_range(WIDTH):
                    value += taps[k] * window[k]
                on = sigmoid(value)
                g = g * (on + value * on * (1.0 - on))
            later = later + (g,)
            s = i - (WIDTH - 1)  # row t + s of the inputs has all its gradients now
            own = window[0]
            if s < 0:
                own = tl.where((t + s >= 0) | (first == 0), own, 0.0)
            grad = zero
            added = ()
            for k in tl.static_range(WIDTH):
                g_k = later[WIDTH - 1 - k]
                grad = grad + taps[k] * g_k if k > 0 else taps[k] * g_k
                added = added + (sums[k] + own * g_k,)
            sums = added
            total += later[0]
            if WIDTH > 1 and grad_final is not None:
                if (s + t >= held) & (s < rest):  # the final state holds this row: its gradient from there
                    from_state = grad_final + states + (s + t - held) * channels
                    grad += tl.load(from_state + channel, mask=inside, other=0.0).to(offset.dtype)
            there = inside & (s < rest)
            if s < 0:
                there &= t + s >= 0
            at = now + tl.multiple_of(s * dx_step, DIVISOR_X)
            tl.store(at, grad.to(grad_x.dtype.element_ty), mask=there)
            if s < 0 and grad_state is not None:
                if (first == 0) & (t + s < 0) & (s < rest):
                    to_state = grad_state + states + (s + t + WIDTH - 1) * channels
                    tl.store(to_state + channel, grad.to(grad_state.dtype.element_ty), mask=inside)
            window, later = window[1:], later[1:]

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
        tl.store(grad_weight + channel * WIDTH + k, total.to(grad_weight.dtype.element_ty), mask=channel < channels)
    elif grad_bias is not None:
        tl.store(grad_bias + channel, total.to(grad_bias.dtype.element_ty), mask=channel < channels)
