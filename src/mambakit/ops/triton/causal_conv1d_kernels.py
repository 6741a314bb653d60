"""The kernels of the causal convolution on the GPU: `causal_conv1d` beside this tells how they fit together.

A tile is some rows of one sequence. Its rows are counted from its first one on, in 32 bits.
"""

# Triton compiles tuples that grow by +, and no starred ones.
# Conditions on constants are branches of their own.
# mypy: disable-error-code="assignment, operator, misc, arg-type, index, var-annotated"

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.selective_scan_steps import sigmoid


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
def convolve(
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
def gradients(
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
def sum_tiles(
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
