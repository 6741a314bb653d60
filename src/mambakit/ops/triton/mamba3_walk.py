"""What follows time in the Mamba-3 scan: the state before every chunk, and its gradient after every chunk.

    S'  = exp(total) S + (tail v)^T k        forwards, from the initial state
    dS' = exp(total) dS + (start dy)^T q     backwards, from the gradient of the final state

with start_t the decay from the chunk's beginning up to t and tail_t that from t to its end, times scale_t. A program
takes BLOCK channels of one head through a segment of a sequence, the state in its registers. Where sequences and heads
are too few to fill the chip, a sequence is cut into several segments: a first walk from zero finds what each adds,
`pass_states` gives each its first state, and the second walk does the rest.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_chunk import (
    find_segment,
    operand,
    product,
    silu_and_slope,
)
from mambakit.ops.triton.ssd_steps import decay_between, decay_from_start, load_runs


@triton.jit
def gated(grad, gates, gate, down, at_weight, weight_mask):
    """The gradient of what the gates are given, from that of y; gates are the rows of z, or None."""
    grad = grad.to(tl.float32)
    if down is not None:
        grad *= tl.load(down + at_weight, weight_mask, other=0.0)
    if gates is not None:
        gates = gates.to(tl.float32)
        if gate is not None:
            gates *= tl.load(gate + at_weight, weight_mask, other=0.0)
        silu, _ = silu_and_slope(gates)
        grad *= silu
    return grad


@Kernel
@triton.jit(do_not_specialize=["runs_field", "length", "segment_chunks"])
def walk(
    x,  # grad_y with REVERSE
    z, up, gate, down,
    keys,  # (slots, heads, rows, columns); queries with REVERSE
    runs,
    first,  # (sequences * segments, heads, headdim, state) or None, as last
    last,
    kept,  # (slots, heads, 2 HALF, headdim) or None
    factors,  # (sequences * segments, heads) or None: the decay over each segment
    bounds,
    runs_field, length, segment_chunks, heads, headdim, rank, state, x_stride, z_stride,
    STEPS: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
    RANKED: tl.constexpr, INTERLEAVED: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = STEPS * RANKS
    segment, head, channels, sequence, begin, end, first_slot, from_chunk, to_chunk = find_segment(
        bounds, length, segment_chunks, heads, headdim, STEPS, BLOCK
    )
    index = tl.arange(0, ROWS)
    step, ranks = index // RANKS, index % RANKS
    inside = channels < headdim
    columns = tl.arange(0, 2 * HALF)
    at_segment = (sequence * tl.num_programs(1) + segment) * heads + head
    at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
    weight_mask = (ranks < rank)[:, None] & inside[None, :]

    carried = tl.zeros((2 * HALF, BLOCK), tl.float32)
    at_state = at_segment * headdim * state
    if first is not None:
        carried += load_whole(first + at_state, channels, inside, state, HALF, BLOCK, INTERLEAVED)
    x_inner = step[:, None] * x_stride + channels[None, :]
    if RANKED:
        x_inner += (ranks * heads * headdim)[:, None]
    z_inner = step[:, None] * z_stride + channels[None, :]
    key_inner = index[:, None] * (2 * HALF) + columns[None, :]
    kept_inner = columns[:, None] * headdim + channels[None, :]
    factor = 1.0
    for count in tl.range(from_chunk, to_chunk, num_stages=STAGES):
        chunk = from_chunk + to_chunk - 1 - count if REVERSE else count
        at_chunk = (first_slot + chunk) * heads + head
        row = begin + chunk * STEPS
        present = (step < end - row) & (ranks < rank)
        mask = present[:, None] & inside[None, :]
        values = tl.load(x + (row * x_stride + head * headdim) + x_inner, mask, other=0.0)
        key = tl.load(keys + at_chunk * (ROWS * 2 * HALF) + key_inner)
        place = at_chunk * STEPS
        coarse, fine, last_coarse, last_fine = load_runs(runs, place, runs_field, step, STEPS, FINE)
        if kept is not None:
            at_kept = kept + at_chunk * (2 * HALF) * headdim + kept_inner
            tl.store(at_kept, carried.to(kept.dtype.element_ty), inside[None, :])
        if REVERSE:
            gates = None
            if z is not None:
                gates = tl.load(z + (row * z_stride + head * headdim) + z_inner, mask, other=0.0)
            values = gated(values, gates, gate, down, at_weight, weight_mask)
            weights = decay_from_start(coarse, fine, FINE)
        else:
            if up is not None:
                values = values.to(tl.float32) * tl.load(up + at_weight, weight_mask, other=0.0)
            scales = tl.load(runs + 2 * runs_field + place + step)
            weights = decay_between(last_coarse, coarse, last_fine, fine, FINE) * scales
        values = operand(values.to(tl.float32) * weights[:, None], PRECISION)
        passes = decay_from_start(last_coarse, last_fine, FINE)
        carried = carried * passes + product(tl.trans(key), values, PRECISION)
        factor *= passes
    if factors is not None:
        tl.store(factors + at_segment, factor)
    if last is not None:
        store_whole(last + at_state, carried, channels, inside, state, HALF, BLOCK, INTERLEAVED)


@triton.jit
def load_whole(pointer, channels, inside, state, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of a state (headdim, state) its columns by halves, for some channels: (2 HALF, BLOCK)."""
    source, there = place_of_columns(state, HALF, INTERLEAVED)
    at = pointer + (channels * state)[:, None] + source[None, :]
    tile = tl.load(at, inside[:, None] & there[None, :], other=0.0)
    if INTERLEAVED:
        tile = tl.reshape(tl.permute(tl.reshape(tile, (BLOCK, HALF, 2)), (0, 2, 1)), (BLOCK, 2 * HALF))
    return tl.trans(tile)


@triton.jit
def store_whole(
    pointer, tile, channels, inside, state, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Store what `load_whole` loads, neighbours in memory from neighbouring threads."""
    source, there = place_of_columns(state, HALF, INTERLEAVED)
    tile = tl.trans(tile)
    if INTERLEAVED:
        tile = tl.reshape(tl.permute(tl.reshape(tile, (BLOCK, 2, HALF)), (0, 2, 1)), (BLOCK, 2 * HALF))
    at = pointer + (channels * state)[:, None] + source[None, :]
    tl.store(at, tile, inside[:, None] & there[None, :])


@triton.jit
def place_of_columns(state, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which coordinate of the state each column in memory's order holds, and whether there is one."""
    columns = tl.arange(0, 2 * HALF)
    if INTERLEAVED:
        return columns, columns < state
    else:
        source = tl.where(columns < HALF, columns, columns - HALF + state // 2)
        return source, tl.where(columns < HALF, columns < state // 2, source < state)
