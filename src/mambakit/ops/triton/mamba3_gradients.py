"""The gradients of a chunk of the Mamba-3 scan, from the state S before it and the gradient G of the state after it.

With W, start and tail as in mamba3_outputs, dout the gradient of what the gates are given, and

    mixed = W * (q k^T),   dmixed = dout v^T,   dscores = dmixed * W

the gradients are

    dv = mixed^T dout + tail (k G) + D dout,   dx = sum over ranks of up dv
    dq = dscores k + start (dout S^T),         dk = dscores^T q + tail (v G^T)
    d log decay_t: what each pair of steps, state and tail around t weighs, summed over those that span t

and the gates' from the outputs, which are formed again. Half precision takes the sum over spanning pairs as that of
differences of row and column sums; float32 takes it as a product with a triangle, since the difference is not exact
where a step forgets everything.

What is formed of all pairs comes first and shrinks to two operands; then one product follows another, so that at most
one accumulator of a key's width is alive.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_chunk import (
    find_chunk,
    operand,
    over_ranks,
    over_ranks_of_rows,
    pair_decays,
    product,
    silu_and_slope,
    store_over_steps,
)
from mambakit.ops.triton.mamba3_walk import gated
from mambakit.ops.triton.ssd_steps import decay_between, decay_from_start, load_runs


@Kernel
@triton.jit(do_not_specialize=["runs_field", "length"])
def gradients(
    x,
    keys,  # (slots, heads, rows, columns), as queries
    queries, z, grad_y, up, gate, down, D, runs,
    kept,  # (slots, heads, 2 HALF, headdim): the state before each chunk; None where it is zero
    kept_grads,  # the same: the gradient of that after it
    grad_x, grad_z,
    grad_D,  # (slots, heads, headdim)
    grad_up,  # (slots, heads, rank, headdim), as grad_gate and grad_down
    grad_gate, grad_down,
    grad_keys,  # (slots, heads, rows, columns), as grad_queries
    grad_queries,
    grad_log_decay,  # (rows, heads), as grad_scale and grad_own
    grad_scale, grad_own,
    grad_angles,  # (rows, heads, pairs) or None
    bounds, sequence_of_slot,
    runs_field, length, heads, headdim, rank, pairs, x_stride, z_stride, y_stride, D_head, D_row,
    STEPS: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    RANKED: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = STEPS * RANKS
    GATED: tl.constexpr = (z is not None) or (down is not None)
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    _, row, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    if row >= end:  # a slot that no sequence of the pack has
        return
    index = tl.arange(0, ROWS)
    step, ranks = index // RANKS, index % RANKS
    present = (step < end - row) & (ranks < rank)
    columns = tl.arange(0, 2 * HALF)
    at_chunk = slot * heads + head
    place = at_chunk * STEPS
    coarse, fine, last_coarse, last_fine = load_runs(runs, place, runs_field, step, STEPS, FINE)
    scales = tl.load(runs + 2 * runs_field + place + step)
    owns = tl.load(runs + 3 * runs_field + place + step)
    start = decay_from_start(coarse, fine, FINE)
    to_end = decay_between(last_coarse, coarse, last_fine, fine, FINE)
    tail = to_end * scales
    key_inner = index[:, None] * (2 * HALF) + columns[None, :]
    at_keys = at_chunk * (ROWS * 2 * HALF)
    at_state = at_chunk * (2 * HALF) * headdim
    x += row * x_stride + head * headdim
    grad_y += row * y_stride + head * headdim
    if z is not None:
        z += row * z_stride + head * headdim
        grad_z += (row * heads + head) * headdim
    grad_x += (row * heads + head) * headdim

    given = (
        x, x_stride, z, z_stride, grad_y, y_stride, up, gate, down, head, heads, headdim, rank, step, ranks, present,
    )  # fmt: skip
    dmixed = tl.zeros((ROWS, ROWS), tl.float32)
    for channel_block in tl.static_range(CHANNEL_BLOCKS):
        dout, v = gated_and_values(channel_block, given, BLOCK, RANKED, PRECISION)
        dmixed += product(operand(dout, PRECISION), tl.trans(v), PRECISION)
    q = tl.load(queries + at_keys + key_inner)
    k = tl.load(keys + at_keys + key_inner)
    scores = product(q, tl.trans(k), PRECISION)
    mixed, dscores, downs, dscales, within = pair_gradients(
        scores, dmixed, coarse, fine, scales, owns, step, STEPS, RANKS, FINE, PRECISION
    )
    a_step = tl.arange(0, STEPS)
    step_present = a_step < end - row
    at_step = row * heads + head + a_step * heads
    tl.store(grad_own + at_step, over_ranks_of_rows(downs, STEPS, RANKS), step_present)

    of_start = tl.zeros((ROWS,), tl.float32)
    of_tail = tl.zeros((ROWS,), tl.float32)
    of_total = 0.0
    for channel_block in tl.static_range(CHANNEL_BLOCKS):
        channels = channel_block * BLOCK + tl.arange(0, BLOCK)
        inside = channels < headdim
        mask = present[:, None] & inside[None, :]
        at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
        weight_mask = (ranks < rank)[:, None] & inside[None, :]
        out_inner = a_step[:, None] * (heads * headdim) + channels[None, :]
        out_mask = step_present[:, None] & inside[None, :]
        if kept is not None:
            S = load_state(kept + at_state, channel_block, headdim, 2 * HALF, BLOCK)
        if kept_grads is not None:
            G = load_state(kept_grads + at_state, channel_block, headdim, 2 * HALF, BLOCK)
        if kept is not None and kept_grads is not None:
            of_total += tl.sum(tl.sum(S.to(tl.float32) * G.to(tl.float32), 1), 0)
        x_rows = tl.load(x + step[:, None] * x_stride + channels[None, :], mask, other=0.0)
        v = x_rows
        if up is not None:
            ups = tl.load(up + at_weight, weight_mask, other=0.0)
            v = operand(x_rows.to(tl.float32) * ups, PRECISION)
        y_inner = step[:, None] * y_stride + channels[None, :]
        if RANKED:
            y_inner += (ranks * heads * headdim)[:, None]
        dout = tl.load(grad_y + y_inner, mask, other=0.0).to(tl.float32)
        if D is not None:
            skip = tl.load(D + head * D_head + channels * D_row, inside, other=0.0)[None, :]
        if kept is not None:
            read = product(q, S, PRECISION) * start[:, None]
        if GATED:
            out = product(mixed, v, PRECISION)
            if kept is not None:
                out += read
            if D is not None:
                out += skip * v.to(tl.float32)
            dgated = dout
            if down is not None:
                dgated *= tl.load(down + at_weight, weight_mask, other=0.0)
            if z is not None:
                z_rows = tl.load(z + step[:, None] * z_stride + channels[None, :], mask, other=0.0).to(tl.float32)
                gates = z_rows
                if gate is not None:
                    gate_weights = tl.load(gate + at_weight, weight_mask, other=0.0)
                    gates = z_rows * gate_weights
                silu, slope = silu_and_slope(gates)
                dgates = dgated * out * slope
                if gate is not None:
                    at = grad_gate + slot * heads * rank * headdim
                    store_over_steps(at, dgates * z_rows, head, rank, channels, headdim, STEPS, RANKS, BLOCK)
                    dgates = dgates * gate_weights
                dgates = over_ranks(dgates, STEPS, RANKS, BLOCK)
                tl.store(grad_z + out_inner, dgates.to(grad_z.dtype.element_ty), out_mask)
                out *= silu
                dgated *= silu
            if down is not None:
                at = grad_down + slot * heads * rank * headdim
                store_over_steps(at, dout * out, head, rank, channels, headdim, STEPS, RANKS, BLOCK)
            dout = dgated
        if kept is not None:
            of_start += tl.sum(read * dout, 1)
        dv = product(tl.trans(mixed), operand(dout, PRECISION), PRECISION)
        if kept_grads is not None:
            sent = product(k, G, PRECISION)
            of_tail += tl.sum(sent * v.to(tl.float32), 1)
            dv += sent * tail[:, None]
        if D is not None:
            at = grad_D + (slot * heads + head) * headdim + channels
            tl.store(at, tl.sum(dout * v.to(tl.float32), 0), mask=inside)
            dv += skip * dout
        if up is not None:
            at = grad_up + slot * heads * rank * headdim
            store_over_steps(at, dv * x_rows.to(tl.float32), head, rank, channels, headdim, STEPS, RANKS, BLOCK)
            dv = dv * ups
        dv = over_ranks(dv, STEPS, RANKS, BLOCK)
        tl.store(grad_x + out_inner, dv.to(grad_x.dtype.element_ty), out_mask)

    dscales = over_ranks_of_rows(dscales + to_end * of_tail, STEPS, RANKS)
    tl.store(grad_scale + at_step, dscales, step_present)
    starts = over_ranks_of_rows(of_start, STEPS, RANKS)
    sends = over_ranks_of_rows(tail * of_tail, STEPS, RANKS)
    through = decay_from_start(last_coarse, last_fine, FINE) * of_total
    ddecays = decay_gradients(starts, sends, within, through, a_step, FINE)
    tl.store(grad_log_decay + at_step, ddecays, step_present)

    # Keys and queries by halves, whose products are less wide, and which the gradients of the angles take as they are.
    index_of_half = index[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    turning = (tl.arange(0, HALF) < pairs)[None, :]
    at_queries, at_own_keys = queries + at_keys + index_of_half, keys + at_keys + index_of_half
    dq1 = product(dscores, tl.load(at_own_keys), PRECISION)
    dq2 = product(dscores, tl.load(at_own_keys + HALF), PRECISION)
    if kept is not None:
        for channel_block in tl.static_range(CHANNEL_BLOCKS):
            if CHANNEL_BLOCKS > 1:
                dout, _ = gated_and_values(channel_block, given, BLOCK, RANKED, PRECISION)
            narrow = operand(dout * start[:, None], PRECISION)
            at = kept + at_state
            dq1, dq2 = with_state(dq1, dq2, narrow, at, channel_block, headdim, HALF, BLOCK, PRECISION)
    at = grad_queries + at_keys + index_of_half
    tl.store(at, dq1.to(grad_queries.dtype.element_ty))
    tl.store(at + HALF, dq2.to(grad_queries.dtype.element_ty))
    if grad_angles is not None:
        dangles = against_turned(dq1, dq2, at_queries, turning, HALF)

    dk1 = product(tl.trans(dscores), tl.load(at_queries), PRECISION)
    dk2 = product(tl.trans(dscores), tl.load(at_queries + HALF), PRECISION)
    if kept_grads is not None:
        for channel_block in tl.static_range(CHANNEL_BLOCKS):
            if CHANNEL_BLOCKS > 1:
                _, v = gated_and_values(channel_block, given, BLOCK, RANKED, PRECISION)
            narrow = operand(v.to(tl.float32) * tail[:, None], PRECISION)
            at = kept_grads + at_state
            dk1, dk2 = with_state(dk1, dk2, narrow, at, channel_block, headdim, HALF, BLOCK, PRECISION)
    at = grad_keys + at_keys + index_of_half
    tl.store(at, dk1.to(grad_keys.dtype.element_ty))
    tl.store(at + HALF, dk2.to(grad_keys.dtype.element_ty))
    if grad_angles is not None:
        dangles += against_turned(dk1, dk2, at_own_keys, turning, HALF)
        at_angle = grad_angles + (row * heads + head) * pairs
        at_angle += a_step[:, None] * (heads * pairs) + tl.arange(0, HALF)[None, :]
        dangles = over_ranks(dangles, STEPS, RANKS, HALF)
        tl.store(at_angle, dangles, step_present[:, None] & turning)


@triton.jit
def pair_gradients(
    scores, dmixed, coarse, fine, scales, owns, step,
    STEPS: tl.constexpr, RANKS: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of all pairs of a chunk: mixed and dscores as products take them, and what they give to own and scale of each
    row, and to the log decay of each step."""
    decays = pair_decays(coarse, fine, step, FINE)
    same = step[:, None] == step[None, :]
    weights = tl.where(same, owns[:, None], decays * scales[None, :])
    mixed = operand(scores * weights, PRECISION)
    dscores = operand(dmixed * weights, PRECISION)
    dweights = dmixed * scores
    downs = tl.sum(tl.where(same, dweights, 0.0), 1)
    dweights *= decays
    dscales = tl.sum(dweights, 0)
    dweights *= scales[None, :]
    if FINE:
        triangle = (step[:, None] <= step[None, :]).to(tl.float32)
        spanning = tl.where(step[:, None] > step[None, :], product(triangle, dweights, PRECISION), 0.0)
        within = over_first_rank(tl.sum(spanning, 1), STEPS, RANKS)
    else:
        within = over_ranks_of_rows(tl.sum(dweights, 1) - tl.sum(dweights, 0), STEPS, RANKS)
    return mixed, dscores, downs, dscales, within


@triton.jit
def decay_gradients(starts, sends, within, through, step, FINE: tl.constexpr):
    """Of the log decay of each step: from the state before the chunk, to that after it, within it and through it."""
    found = through
    if FINE:
        spanning = tl.where(step[:, None] > step[None, :], sends[None, :], starts[None, :])
        found += tl.sum(spanning, 1) + within
    else:
        found += tl.cumsum(starts + within, 0, reverse=True) + (tl.cumsum(sends, 0) - sends)
    return found


@triton.jit
def against_turned(grad_first, grad_second, vectors, turning, HALF: tl.constexpr):
    """(ROWS, HALF): grad2 first - grad1 second for every pair of the vectors at `vectors`, whose gradient is `grad`.

    That is the gradient of the pairs' angles. Those of keys and queries nearly cancel, since only differences of angles
    count: they are taken before a gradient is rounded.
    """
    first = tl.load(vectors, turning, other=0.0).to(tl.float32)
    second = tl.load(vectors + HALF, turning, other=0.0).to(tl.float32)
    return grad_second * first - grad_first * second


@triton.jit
def gated_and_values(channel_block, given, BLOCK: tl.constexpr, RANKED: tl.constexpr, PRECISION: tl.constexpr):
    """dout and v of a block of channels."""
    x, x_stride, z, z_stride, grad_y, y_stride, up, gate, down, head, heads, headdim, rank, step, ranks, present = given
    channels = channel_block * BLOCK + tl.arange(0, BLOCK)
    inside = channels < headdim
    mask = present[:, None] & inside[None, :]
    at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
    weight_mask = (ranks < rank)[:, None] & inside[None, :]
    v = tl.load(x + step[:, None] * x_stride + channels[None, :], mask, other=0.0)
    if up is not None:
        v = operand(v.to(tl.float32) * tl.load(up + at_weight, weight_mask, other=0.0), PRECISION)
    y_inner = step[:, None] * y_stride + channels[None, :]
    if RANKED:
        y_inner += (ranks * heads * headdim)[:, None]
    gates = None
    if z is not None:
        gates = tl.load(z + step[:, None] * z_stride + channels[None, :], mask, other=0.0)
    return gated(tl.load(grad_y + y_inner, mask, other=0.0), gates, gate, down, at_weight, weight_mask), v


@triton.jit
def load_state(state, channel_block, headdim, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(COLUMNS, BLOCK): columns of a state from `state` on, of a block of its channels."""
    channels = channel_block * BLOCK + tl.arange(0, BLOCK)
    at = state + tl.arange(0, COLUMNS)[:, None] * headdim + channels[None, :]
    return tl.load(at, (channels < headdim)[None, :], other=0.0)


@triton.jit
def with_state(
    first, second, rows, state, channel_block, headdim,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves of vectors with what rows (ROWS, BLOCK) of a block of channels read of a state."""
    first += product(rows, tl.trans(load_state(state, channel_block, headdim, HALF, BLOCK)), PRECISION)
    state += HALF * headdim
    second += product(rows, tl.trans(load_state(state, channel_block, headdim, HALF, BLOCK)), PRECISION)
    return first, second


@triton.jit
def over_first_rank(row, STEPS: tl.constexpr, RANKS: tl.constexpr):
    """(STEPS,): of every step the number of its first row."""
    if RANKS == 1:
        return row
    else:
        first = tl.arange(0, RANKS)[None, :] == 0
        return tl.sum(tl.where(first, tl.reshape(row, (STEPS, RANKS)), 0.0), 1)
