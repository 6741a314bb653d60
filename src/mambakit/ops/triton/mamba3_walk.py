"""What follows time in the Mamba-3 scan: the state before every chunk, and its gradient after every chunk.

    S'  = exp(total) S + (tail v)^T k        forwards, from the initial state
    dS' = exp(total) dS + (start dy)^T q     backwards, from the gradient of the final state

with start_t the decay from the chunk's beginning up to t and tail_t that from t to its end, times scale_t. A program
takes BLOCK channels of one head through a segment of a sequence, the state in its registers. Where sequences and heads
are too few to fill the chip, a sequence is cut into several segments: a first walk from zero finds what each adds,
`hand_on` gives each its first state, and the second walk does the rest.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import (
    find_sequence,
    product,
    silu_and_slope,
    sums_of_log_decay,
)


@triton.jit
def gated_gradient(
    grad_y,
    y_stride,
    z,
    z_stride,
    gate,
    down,
    rows,
    ranks,
    channels,
    head,
    heads,
    headdim,
    rank,
    mask,
    RANKED: tl.constexpr,
):
    """The gradient of what the gates are given, for every row and channel; 0 where `mask` is."""
    at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
    offsets = rows * y_stride + head * headdim
    if RANKED:
        offsets += ranks * heads * headdim
    grad = tl.load(grad_y + offsets[:, None] + channels[None, :], mask, other=0.0).to(tl.float32)
    if down is not None:
        grad *= tl.load(down + at_weight, mask, other=0.0)
    if z is not None:
        gates = tl.load(z + (rows * z_stride + head * headdim)[:, None] + channels[None, :], mask, other=0.0)
        gates = gates.to(tl.float32)
        if gate is not None:
            gates *= tl.load(gate + at_weight, mask, other=0.0)
        silu, _ = silu_and_slope(gates)
        grad *= silu
    return grad


@triton.jit(do_not_specialize=["length", "segment_chunks"])
def walk(
    x,  # grad_y with REVERSE
    x_stride,
    z,
    z_stride,
    up,
    gate,
    down,
    keys,  # (slots, heads, rows, columns); queries with REVERSE
    log_decay,
    scale,
    first,  # (sequences, heads, headdim, state) or None
    last,
    kept,  # (slots, heads, 2 HALF, headdim) or None
    handed,  # (segments, sequences, heads, 2 HALF, headdim) or None
    decays,  # (segments, sequences, heads): the sum of log decays of each segment
    bounds,
    length,
    segment_chunks,
    heads,
    headdim,
    rank,
    state,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    RANKED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = STEPS * RANKS
    blocks = tl.cdiv(headdim, BLOCK)
    segment, head = tl.program_id(1), tl.program_id(0) // blocks % heads
    channels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    sequence = (tl.program_id(0) // blocks // heads).to(tl.int64)
    begin, end, first_slot = find_sequence(sequence, bounds, length, STEPS)
    chunks = tl.cdiv(end - begin, STEPS).to(tl.int32)
    from_chunk = tl.minimum(segment * segment_chunks, chunks)
    to_chunk = tl.minimum(from_chunk + segment_chunks, chunks)
    index = tl.arange(0, ROWS)
    ranks = index % RANKS
    inside = channels < headdim
    columns = tl.arange(0, 2 * HALF)
    at_head = (sequence * heads + head) * headdim + channels
    at_handed = (segment * (tl.num_programs(0) // blocks // heads) + sequence) * heads + head

    carried = tl.zeros((2 * HALF, BLOCK), tl.float32)
    source, there = place_of_columns(state, HALF, INTERLEAVED)
    at_state = (at_head * state)[None, :] + source[:, None]
    state_mask = there[:, None] & inside[None, :]
    if not SUMMARY:
        if handed is not None:
            carried += tl.load(
                handed + (at_handed * (2 * HALF) + columns)[:, None] * headdim + channels[None, :],
                inside[None, :],
                other=0.0,
            )
        elif first is not None:
            carried += tl.load(first + at_state, state_mask, other=0.0)
    sum_of_decays = 0.0
    for count in range(from_chunk, to_chunk):
        chunk = from_chunk + to_chunk - 1 - count if REVERSE else count
        slot = first_slot + chunk
        if kept is not None:
            at = ((slot * heads + head) * (2 * HALF) + columns)[:, None] * headdim + channels[None, :]
            tl.store(kept + at, carried.to(kept.dtype.element_ty), inside[None, :])
        rows = begin + chunk * STEPS + index // RANKS
        present = (rows < end) & (ranks < rank)
        mask = present[:, None] & inside[None, :]
        high, _, after, total = sums_of_log_decay(log_decay, rows, (rows < end) & (ranks == 0), head, heads)
        if REVERSE:
            values = gated_gradient(
                x, x_stride, z, z_stride, gate, down, rows, ranks, channels, head, heads, headdim, rank, mask, RANKED
            )
            weights = tl.exp(high)
        else:
            offsets = rows * x_stride + head * headdim
            values = tl.load(x + offsets[:, None] + channels[None, :], mask, other=0.0).to(tl.float32)
            if up is not None:
                at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
                values *= tl.load(up + at_weight, mask, other=0.0)
            weights = tl.exp(after) * tl.load(scale + rows * heads + head, present, other=0.0)
        key = tl.load(keys + (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :])
        carried = carried * tl.exp(total) + product(tl.trans(key), values * weights[:, None], PRECISION)
        sum_of_decays += total
    if SUMMARY:
        at = (at_handed * (2 * HALF) + columns)[:, None] * headdim + channels[None, :]
        tl.store(handed + at, carried, inside[None, :])
        tl.store(decays + at_handed, sum_of_decays)
    elif last is not None:
        ends = from_chunk == 0 if REVERSE else to_chunk == chunks
        ends = ends & ((from_chunk < to_chunk) | ((chunks == 0) & (segment == 0)))
        tl.store(last + at_state, carried, state_mask & ends)


@triton.jit
def place_of_columns(state, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which coordinate of the state each column holds, and whether there is one."""
    columns = tl.arange(0, 2 * HALF)
    if INTERLEAVED:
        source = tl.where(columns < HALF, 2 * columns, 2 * (columns - HALF) + 1)
        there = source < state
    else:
        source = tl.where(columns < HALF, columns, columns - HALF + state // 2)
        there = tl.where(columns < HALF, columns < state // 2, source < state)
    return source, there


@triton.jit(do_not_specialize=["segments"])
def hand_on(
    handed,  # (segments, sequences, heads, 2 HALF, headdim): what each segment adds, replaced by its first state
    decays,
    first,
    segments,
    sequences,
    heads,
    headdim,
    state,
    HALF: tl.constexpr,
    CHANNELS: tl.constexpr,
    REVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    at_sequence = tl.program_id(0).to(tl.int64)  # sequence * heads + head
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    columns = tl.arange(0, 2 * HALF)
    source, there = place_of_columns(state, HALF, INTERLEAVED)
    inside = (channels < headdim)[None, :] & (columns >= 0)[:, None]
    carry = tl.zeros((2 * HALF, CHANNELS), tl.float32)
    if first is not None:
        at_first = ((at_sequence * headdim + channels) * state)[None, :] + source[:, None]
        carry += tl.load(first + at_first, inside & there[:, None], other=0.0)
    for count in range(segments):
        segment = segments - 1 - count if REVERSE else count
        at_segment = segment * sequences * heads + at_sequence
        at = handed + (at_segment * (2 * HALF) + columns)[:, None] * headdim + channels[None, :]
        added = tl.load(at, inside, other=0.0)
        decay = tl.exp(tl.load(decays + at_segment))
        tl.store(at, carry, inside)
        carry = carry * decay + added
