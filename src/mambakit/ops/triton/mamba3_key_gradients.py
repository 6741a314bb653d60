"""The gradients of keys and queries of a chunk of the Mamba-3 scan, before they are turned back; and what pairs of
steps give to those of log decays, scales and own. `mamba3_value_gradients` has the formulas.

What is formed of all pairs comes first and shrinks to one operand; then one product follows another, so that at most
one accumulator of a key's width is alive.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_chunk import (
    load_weights,
    operand,
    over_ranks,
    over_ranks_of_rows,
    pair_decays,
    product,
    rows_of_program,
)
from mambakit.ops.triton.mamba3_value_gradients import load_state
from mambakit.ops.triton.mamba3_walk import gated


@Kernel
@triton.jit(do_not_specialize=["runs_field", "length"])
def key_gradients(
    x,
    keys,  # (slots, heads, rows, columns), as queries
    queries, z, grad_y, up, gate, down, runs,
    kept,  # (slots, heads, 2 HALF, headdim): the state before each chunk; None where it is zero
    kept_grads,  # the same: the gradient of that after it
    grad_keys,  # (slots, heads, rows, columns), as grad_queries
    grad_queries,
    grad_log_decay,  # (rows, heads), as grad_scale, added to, and grad_own
    grad_scale, grad_own,
    grad_angles,  # (rows, heads, pairs) or None
    bounds, sequence_of_slot,
    runs_field, length, heads, headdim, rank, pairs, x_stride, z_stride, y_stride,
    STEPS: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    RANKED: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = STEPS * RANKS
    slot, head, row, end, index, step, ranks, present = rows_of_program(
        bounds, sequence_of_slot, length, heads, rank, STEPS, RANKS
    )
    if row >= end:  # a slot that no sequence of the pack has
        return
    columns = tl.arange(0, 2 * HALF)
    at_chunk = slot * heads + head
    coarse, fine, scales, owns, start, to_end, _ = load_weights(runs, at_chunk, runs_field, step, STEPS, FINE)
    tail = to_end * scales
    key_inner = index[:, None] * (2 * HALF) + columns[None, :]
    at_keys = at_chunk * (ROWS * 2 * HALF)
    at_state = at_chunk * (2 * HALF) * headdim
    x += row * x_stride + head * headdim
    grad_y += row * y_stride + head * headdim
    if z is not None:
        z += row * z_stride + head * headdim

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
    dscores, downs, dscales, within = pair_gradients(
        scores, dmixed, coarse, fine, scales, owns, step, STEPS, RANKS, FINE, PRECISION
    )
    a_step = tl.arange(0, STEPS)
    step_present = a_step < end - row
    at_step = row * heads + head + a_step * heads
    tl.store(grad_own + at_step, over_ranks_of_rows(downs, STEPS, RANKS), step_present)
    dscales = over_ranks_of_rows(dscales, STEPS, RANKS)
    tl.store(grad_scale + at_step, tl.load(grad_scale + at_step, step_present) + dscales, step_present)
    ddecays = within if FINE else tl.cumsum(within, 0, reverse=True)
    tl.store(grad_log_decay + at_step, tl.load(grad_log_decay + at_step, step_present) + ddecays, step_present)

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
    """Of all pairs of a chunk: dscores as products take them, and what they give to own and scale of each row, and to
    the log decay of each step."""
    decays = pair_decays(coarse, fine, step, FINE)
    same = step[:, None] == step[None, :]
    weights = tl.where(same, owns[:, None], decays * scales[None, :])
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
    return dscores, downs, dscales, within


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
