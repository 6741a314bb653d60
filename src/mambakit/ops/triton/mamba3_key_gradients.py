"""The gradients of the Mamba-3 scan with respect to B, C, their biases and angles, and the weights of the steps.

From the state S before each chunk and the gradient dS after it,

    dmixed = dout v^T,   dscores = dmixed W
    dk = dscores^T q + tail (v dS),   dq = dscores k + start (dout S)
    d log decay_t: what each pair of steps, state and tail around t weighs, summed over those alone that span t

so that no gradient of a decay is the difference of two sums: a step that forgets everything has exactly none.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import (
    find_chunk,
    operand,
    over_ranks,
    over_ranks_of_rows,
    product,
    sums_of_log_decay,
)
from mambakit.ops.triton.mamba3_walk import gated_gradient


@triton.jit(do_not_specialize=["length"])
def key_gradients(
    x,
    x_stride,
    keys,
    queries,
    z,
    z_stride,
    grad_y,
    y_stride,
    up,
    gate,
    down,
    log_decay,
    scale,
    own,
    kept,
    kept_grads,
    grad_keys,  # (slots, heads, rows, columns), as grad_queries
    grad_queries,
    grad_log_decay,
    grad_scale,
    grad_own,
    grad_angles,  # (rows, heads, pairs) or None
    sums,  # (slots, heads, pairs) in float64: of grad_angles over each chunk
    bounds,
    sequence_of_slot,
    length,
    heads,
    headdim,
    rank,
    pairs,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = STEPS * RANKS
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    if start >= end:  # a slot that no sequence of the pack has
        return
    index = tl.arange(0, ROWS)
    step, ranks = index // RANKS, index % RANKS
    rows = start + step
    present = (rows < end) & (ranks < rank)
    step_rows = start + tl.arange(0, STEPS)
    step_present = step_rows < end
    columns = tl.arange(0, HALF)
    below = step[:, None] > step[None, :]
    same = step[:, None] == step[None, :]
    high, low, after, total = sums_of_log_decay(log_decay, rows, (rows < end) & (ranks == 0), head, heads)
    scales = tl.load(scale + rows * heads + head, present, other=0.0)
    owns = tl.load(own + rows * heads + head, present, other=0.0)
    to_end = tl.exp(after)
    tail = to_end * scales
    from_start = tl.exp(high)

    dmixed = tl.zeros((ROWS, ROWS), tl.float32)
    dk1 = tl.zeros((ROWS, HALF), tl.float32)
    dk2 = tl.zeros((ROWS, HALF), tl.float32)
    dq1 = tl.zeros((ROWS, HALF), tl.float32)
    dq2 = tl.zeros((ROWS, HALF), tl.float32)
    of_total = 0.0
    for first_channel in range(0, headdim, BLOCK):
        channels = first_channel + tl.arange(0, BLOCK)
        inside = channels < headdim
        mask = present[:, None] & inside[None, :]
        at_state = ((slot * heads + head) * (2 * HALF) + columns)[:, None] * headdim + channels[None, :]
        v = tl.load(x + (rows * x_stride + head * headdim)[:, None] + channels[None, :], mask, other=0.0)
        if up is not None:
            at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
            v = v.to(tl.float32) * tl.load(up + at_weight, mask, other=0.0)
        dout = gated_gradient(
            grad_y, y_stride, z, z_stride, gate, down, rows, ranks, channels, head, heads, headdim, rank, mask, RANKED
        )
        dmixed += product(dout, tl.trans(v), PRECISION)
        weighted = operand(dout * from_start[:, None], PRECISION)
        before1 = tl.load(kept + at_state, inside[None, :], other=0.0)
        before2 = tl.load(kept + at_state + HALF * headdim, inside[None, :], other=0.0)
        dq1 += product(weighted, tl.trans(before1), PRECISION)
        dq2 += product(weighted, tl.trans(before2), PRECISION)
        later1 = tl.load(kept_grads + at_state, inside[None, :], other=0.0)
        later2 = tl.load(kept_grads + at_state + HALF * headdim, inside[None, :], other=0.0)
        dk1 += product(v, tl.trans(later1), PRECISION)
        dk2 += product(v, tl.trans(later2), PRECISION)
        of_total += tl.sum(before1.to(tl.float32) * later1.to(tl.float32))
        of_total += tl.sum(before2.to(tl.float32) * later2.to(tl.float32))

    at = (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :]
    q1 = tl.load(queries + at)
    q2 = tl.load(queries + at + HALF)
    k1 = tl.load(keys + at)
    k2 = tl.load(keys + at + HALF)
    scores = product(q1, tl.trans(k1), PRECISION) + product(q2, tl.trans(k2), PRECISION)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.where(below, between, float("-inf")))
    weights = tl.where(same, owns[:, None], decay * scales[None, :])
    of_start = tl.sum(dq1 * q1.to(tl.float32) + dq2 * q2.to(tl.float32), 1)
    of_tail = tl.sum(dk1 * k1.to(tl.float32) + dk2 * k2.to(tl.float32), 1)
    dscores = operand(dmixed * weights, PRECISION)
    dk1 = dk1 * tail[:, None] + product(tl.trans(dscores), q1, PRECISION)
    dk2 = dk2 * tail[:, None] + product(tl.trans(dscores), q2, PRECISION)
    dq1 += product(dscores, k1, PRECISION)
    dq2 += product(dscores, k2, PRECISION)
    tl.store(grad_keys + at, dk1.to(grad_keys.dtype.element_ty))
    tl.store(grad_keys + at + HALF, dk2.to(grad_keys.dtype.element_ty))
    tl.store(grad_queries + at, dq1.to(grad_queries.dtype.element_ty))
    tl.store(grad_queries + at + HALF, dq2.to(grad_queries.dtype.element_ty))
    if grad_angles is not None:
        dangles = dk2 * k1.to(tl.float32) - dk1 * k2.to(tl.float32)
        dangles += dq2 * q1.to(tl.float32) - dq1 * q2.to(tl.float32)
        dangles = over_ranks(dangles, STEPS, RANKS, HALF)
        turning = columns < pairs
        tl.store(
            grad_angles + ((step_rows * heads + head) * pairs)[:, None] + columns[None, :],
            dangles,
            step_present[:, None] & turning[None, :],
        )
        tl.store(sums + (slot * heads + head) * pairs + columns, tl.sum(dangles, 0).to(tl.float64), mask=turning)

    dweights = dmixed * scores
    at_step = step_rows * heads + head
    downs = tl.sum(tl.where(same, dweights, 0.0), 1)
    tl.store(grad_own + at_step, over_ranks_of_rows(downs, STEPS, RANKS), step_present)
    dscales = tl.sum(dweights * decay, 0) + to_end * of_tail
    tl.store(grad_scale + at_step, over_ranks_of_rows(dscales, STEPS, RANKS), step_present)
    triangle = operand((step[:, None] <= step[None, :]).to(tl.float32), PRECISION)
    spanning = product(triangle, tl.where(below, dweights * weights, 0.0), PRECISION)
    spanning = tl.where(below, spanning + (tail * of_tail)[None, :], of_start[None, :])
    ddecays = tl.sum(spanning, 1) + tl.exp(total) * of_total
    tl.store(grad_log_decay + rows * heads + head, ddecays, (rows < end) & (ranks == 0))
