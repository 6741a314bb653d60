"""The outputs of the Mamba-3 scan, chunk by chunk, from the state before each.

y = down ((start S q) + (W * (q k^T)) v + D v) silu(gate z),   W_tj = decay from j to t, times scale_j; own_t at j = t
"""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import (
    find_chunk,
    over_ranks,
    product,
    silu_and_slope,
    sums_of_log_decay,
)


@triton.jit(do_not_specialize=["length"])
def outputs(
    x,
    x_stride,
    keys,
    queries,
    z,
    z_stride,
    up,
    gate,
    down,
    D,
    log_decay,
    scale,
    own,
    kept,
    y,
    bounds,
    sequence_of_slot,
    length,
    heads,
    headdim,
    rank,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = STEPS * RANKS
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    if start >= end:  # a slot that no sequence of the pack has
        return
    index = tl.arange(0, ROWS)
    step, ranks = index // RANKS, index % RANKS
    rows = start + step
    present = (rows < end) & (ranks < rank)
    inside = channels < headdim
    mask = present[:, None] & inside[None, :]
    columns = tl.arange(0, 2 * HALF)

    high, low, _, _ = sums_of_log_decay(log_decay, rows, (rows < end) & (ranks == 0), head, heads)
    at = (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :]
    q = tl.load(queries + at)
    k = tl.load(keys + at)
    at = ((slot * heads + head) * (2 * HALF) + columns)[:, None] * headdim + channels[None, :]
    out = product(q, tl.load(kept + at, inside[None, :], other=0.0), PRECISION) * tl.exp(high)[:, None]
    scores = product(q, tl.trans(k), PRECISION)
    below = step[:, None] > step[None, :]
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    scales = tl.load(scale + rows * heads + head, present, other=0.0)
    owns = tl.load(own + rows * heads + head, present, other=0.0)
    weights = tl.exp(tl.where(below, between, float("-inf"))) * scales[None, :]
    weights = tl.where(step[:, None] == step[None, :], owns[:, None], weights)
    v = tl.load(x + (rows * x_stride + head * headdim)[:, None] + channels[None, :], mask, other=0.0)
    at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
    if up is not None:
        v = v.to(tl.float32) * tl.load(up + at_weight, mask, other=0.0)
    out += product(scores * weights, v, PRECISION)
    if D is not None:
        out += tl.load(D + head * headdim + channels, inside, other=0.0)[None, :] * v.to(tl.float32)
    if z is not None:
        gates = tl.load(z + (rows * z_stride + head * headdim)[:, None] + channels[None, :], mask, other=0.0)
        gates = gates.to(tl.float32)
        if gate is not None:
            gates *= tl.load(gate + at_weight, mask, other=0.0)
        silu, _ = silu_and_slope(gates)
        out *= silu
    if down is not None:
        out *= tl.load(down + at_weight, mask, other=0.0)
        sums = over_ranks(out, STEPS, RANKS, BLOCK)
        step_rows = start + tl.arange(0, STEPS)
        at_y = ((step_rows * heads + head) * headdim)[:, None] + channels[None, :]
        tl.store(y + at_y, sums.to(y.dtype.element_ty), (step_rows < end)[:, None] & inside[None, :])
    else:
        at_y = (((rows * rank + ranks) * heads + head) * headdim)[:, None] + channels[None, :]
        tl.store(y + at_y, out.to(y.dtype.element_ty), mask)
