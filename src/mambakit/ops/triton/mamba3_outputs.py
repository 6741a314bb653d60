"""The outputs of the Mamba-3 scan, chunk by chunk, from the state before each.

y = down ((start S q) + (W * (q k^T)) v + D v) silu(gate z),   W_tj = decay from j to t, times scale_j; own_t at j = t
"""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import (
    biased,
    cos_sin,
    find_chunk,
    operand,
    over_ranks,
    product,
    settled,
    silu_and_slope,
    sums_of_log_decay,
    turn,
)


@triton.jit(do_not_specialize=["length"])
def outputs(
    x,
    x_stride,
    B,
    B_stride,
    C,
    C_stride,
    z,
    z_stride,
    up,
    gate,
    down,
    D,
    B_bias,
    C_bias,
    angles,
    carries,
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
    groups,
    rank,
    state,
    pairs,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = STEPS * RANKS
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = head // (heads // groups)
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    if start >= end:  # a slot that no sequence of the pack has
        return
    index = tl.arange(0, ROWS)
    step, ranks = index // RANKS, index % RANKS
    rows = start + step
    present = (rows < end) & (ranks < rank)
    inside = channels < headdim
    mask = present[:, None] & inside[None, :]
    columns = tl.arange(0, HALF)

    high, low, _, _ = sums_of_log_decay(log_decay, rows, (rows < end) & (ranks == 0), head, heads)
    q1, q2 = biased(
        C, C_bias, rows, C_stride, ranks, present, head, group, groups, rank, state, ROWS, HALF, INTERLEAVED
    )
    k1, k2 = biased(
        B, B_bias, rows, B_stride, ranks, present, head, group, groups, rank, state, ROWS, HALF, INTERLEAVED
    )
    if angles is not None:
        cos, sin = cos_sin(angles, carries, rows, present, slot, head, heads, pairs, HALF, FAST)
        q1, q2 = turn(q1, q2, cos, sin)
        k1, k2 = turn(k1, k2, cos, sin)
    q1, q2 = settled(operand(q1, PRECISION), FAST), settled(operand(q2, PRECISION), FAST)
    k1, k2 = settled(operand(k1, PRECISION), FAST), settled(operand(k2, PRECISION), FAST)

    at = kept + (((slot * heads + head) * headdim + channels) * (2 * HALF))[:, None] + columns[None, :]
    s1 = tl.load(at, inside[:, None], other=0.0)
    s2 = tl.load(at + HALF, inside[:, None], other=0.0)
    out = product(q1, tl.trans(s1), PRECISION) + product(q2, tl.trans(s2), PRECISION)
    out *= tl.exp(high)[:, None]

    scores = product(q1, tl.trans(k1), PRECISION) + product(q2, tl.trans(k2), PRECISION)
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
