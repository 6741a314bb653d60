"""The gradients of the Mamba-3 scan with respect to B, C, their biases and angles, and the weights of the steps.

From the state S before each chunk and the gradient dS after it,

    dmixed = dout v^T,   dscores = dmixed W
    dk = dscores^T q + tail (v dS),   dq = dscores k + start (dout S)
    d log decay_t: what each pair of steps, state and tail around t weighs, summed over those alone that span t

so that no gradient of a decay is the difference of two sums: a step that forgets everything has exactly none.
Together keys and queries would not fit the registers: a launch for the queries comes first, and leaves to that for the
keys its part in the gradients of decays and angles.
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
    grads,  # (slots, heads, rows, columns): of the queries, or with OF_KEYS of the keys
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
    CHANNEL_BLOCKS: tl.constexpr,
    OF_KEYS: tl.constexpr,
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

    dmixed = tl.zeros((ROWS, ROWS), tl.float32)
    grad1 = tl.zeros((ROWS, HALF), tl.float32)
    grad2 = tl.zeros((ROWS, HALF), tl.float32)
    of_total = 0.0
    for channel_block in tl.static_range(CHANNEL_BLOCKS):
        channels = channel_block * BLOCK + tl.arange(0, BLOCK)
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
        before1 = tl.load(kept + at_state, inside[None, :], other=0.0)
        before2 = tl.load(kept + at_state + HALF * headdim, inside[None, :], other=0.0)
        if OF_KEYS:
            later1 = tl.load(kept_grads + at_state, inside[None, :], other=0.0)
            later2 = tl.load(kept_grads + at_state + HALF * headdim, inside[None, :], other=0.0)
            grad1 += product(v, tl.trans(later1), PRECISION)
            grad2 += product(v, tl.trans(later2), PRECISION)
            of_total += tl.sum(before1.to(tl.float32) * later1.to(tl.float32))
            of_total += tl.sum(before2.to(tl.float32) * later2.to(tl.float32))
        else:
            weighted = operand(dout * tl.exp(high)[:, None], PRECISION)
            grad1 += product(weighted, tl.trans(before1), PRECISION)
            grad2 += product(weighted, tl.trans(before2), PRECISION)

    at = (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :]
    q1 = tl.load(queries + at)
    q2 = tl.load(queries + at + HALF)
    k1 = tl.load(keys + at)
    k2 = tl.load(keys + at + HALF)
    scores = product(q1, tl.trans(k1), PRECISION) + product(q2, tl.trans(k2), PRECISION)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.where(below, between, float("-inf")))
    weights = tl.where(same, owns[:, None], decay * scales[None, :])
    dscores = operand(dmixed * weights, PRECISION)
    dweights = dmixed * scores
    at_step = step_rows * heads + head
    if OF_KEYS:
        to_end = tl.exp(after)
        tail = to_end * scales
        of_tail = tl.sum(grad1 * k1.to(tl.float32) + grad2 * k2.to(tl.float32), 1)
        grad1 = grad1 * tail[:, None] + product(tl.trans(dscores), q1, PRECISION)
        grad2 = grad2 * tail[:, None] + product(tl.trans(dscores), q2, PRECISION)
        dscales = tl.sum(dweights * decay, 0) + to_end * of_tail
        tl.store(grad_scale + at_step, over_ranks_of_rows(dscales, STEPS, RANKS), step_present)
        of_start = tl.load(grad_log_decay + rows * heads + head, (rows < end) & (ranks == 0), other=0.0)
        triangle = operand((step[:, None] <= step[None, :]).to(tl.float32), PRECISION)
        spanning = product(triangle, tl.where(below, dweights * weights, 0.0), PRECISION)
        spanning = tl.where(below, spanning + (tail * of_tail)[None, :], of_start[None, :])
        ddecays = tl.sum(spanning, 1) + tl.exp(total) * of_total
        tl.debug_barrier()  # every thread has read what is written now
        tl.store(grad_log_decay + rows * heads + head, ddecays, (rows < end) & (ranks == 0))
        vector1, vector2 = k1, k2
    else:
        of_start = tl.sum(grad1 * q1.to(tl.float32) + grad2 * q2.to(tl.float32), 1)
        tl.store(grad_log_decay + at_step, over_ranks_of_rows(of_start, STEPS, RANKS), step_present)
        grad1 += product(dscores, k1, PRECISION)
        grad2 += product(dscores, k2, PRECISION)
        downs = tl.sum(tl.where(same, dweights, 0.0), 1)
        tl.store(grad_own + at_step, over_ranks_of_rows(downs, STEPS, RANKS), step_present)
        vector1, vector2 = q1, q2
    tl.store(grads + at, grad1.to(grads.dtype.element_ty))
    tl.store(grads + at + HALF, grad2.to(grads.dtype.element_ty))
    if grad_angles is not None:
        dangles = grad2 * vector1.to(tl.float32) - grad1 * vector2.to(tl.float32)
        dangles = over_ranks(dangles, STEPS, RANKS, HALF)
        turning = columns < pairs
        at_angle = grad_angles + ((step_rows * heads + head) * pairs)[:, None] + columns[None, :]
        mask = step_present[:, None] & turning[None, :]
        if OF_KEYS:
            dangles += tl.load(at_angle, mask, other=0.0)
            at_sum = sums + (slot * heads + head) * pairs + columns
            tl.store(at_sum, tl.sum(dangles, 0).to(tl.float64), mask=turning)
        tl.store(at_angle, dangles, mask)
