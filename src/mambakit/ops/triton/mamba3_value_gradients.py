"""The gradients of a chunk of the Mamba-3 scan: of its values and gates here, of keys and queries in
mamba3_key_gradients.

With W, start and tail as in mamba3_outputs, S the state before the chunk and G the gradient of the state after it, dout
the gradient of what the gates are given, and

    mixed = W * (q k^T),   dmixed = dout v^T,   dscores = dmixed * W

the gradients are

    dv = mixed^T dout + tail (k G) + D dout,   dx = sum over ranks of up dv
    dq = dscores k + start (dout S^T),         dk = dscores^T q + tail (v G^T)
    d log decay_t: what each pair of steps, state and tail around t weighs, summed over those that span t

and the gates' from the outputs, which are formed again. Half precision takes the sum over spanning pairs as that of
differences of row and column sums; float32 takes it as a product with a triangle, since the difference is not exact
where a step forgets everything.

One kernel for both would read x, z, grad_y, keys, queries and states once instead of twice, and its tiles overflow the
registers: on an H200 it took a twentieth more time than the two.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_chunk import (
    load_weights,
    operand,
    over_ranks,
    over_ranks_of_rows,
    pair_weights,
    product,
    rows_of_program,
    silu_and_slope,
    store_over_steps,
)


@Kernel
@triton.jit(do_not_specialize=["runs_field", "length"])
def value_gradients(
    x,
    keys,  # (slots, heads, rows, columns), as queries
    queries, z, grad_y, up, gate, down, D, runs,
    kept,  # (slots, heads, 2 HALF, headdim): the state before each chunk; None where it is zero
    kept_grads,  # the same: the gradient of that after it
    grad_x, grad_z,
    grad_D,  # (slots, heads, headdim)
    grad_up,  # (slots, heads, rank, headdim), as grad_gate and grad_down
    grad_gate, grad_down,
    grad_log_decay,  # (rows, heads), as grad_scale: what the states give to them
    grad_scale,
    bounds, sequence_of_slot,
    runs_field, length, heads, headdim, rank, x_stride, z_stride, y_stride, D_head, D_row,
    STEPS: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr,
    RANKED: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = STEPS * RANKS
    GATED: tl.constexpr = (z is not None) or (down is not None)
    slot, head, row, end, index, step, ranks, present = rows_of_program(
        bounds, sequence_of_slot, length, heads, rank, STEPS, RANKS
    )
    if row >= end:  # a slot that no sequence of the pack has
        return
    columns = tl.arange(0, 2 * HALF)
    at_chunk = slot * heads + head
    coarse, fine, scales, owns, start, to_end, over_chunk = load_weights(runs, at_chunk, runs_field, step, STEPS, FINE)
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

    q = tl.load(queries + at_keys + key_inner)
    k = tl.load(keys + at_keys + key_inner)
    weights = pair_weights(coarse, fine, scales, owns, step, FINE)
    mixed = operand(product(q, tl.trans(k), PRECISION) * weights, PRECISION)

    a_step = tl.arange(0, STEPS)
    step_present = a_step < end - row
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

    at_step = row * heads + head + a_step * heads
    tl.store(grad_scale + at_step, over_ranks_of_rows(to_end * of_tail, STEPS, RANKS), step_present)
    starts = over_ranks_of_rows(of_start, STEPS, RANKS)
    sends = over_ranks_of_rows(tail * of_tail, STEPS, RANKS)
    ddecays = over_chunk * of_total
    if FINE:
        ddecays += tl.sum(tl.where(a_step[:, None] > a_step[None, :], sends[None, :], starts[None, :]), 1)
    else:
        ddecays += tl.cumsum(starts, 0, reverse=True) + (tl.cumsum(sends, 0) - sends)
    tl.store(grad_log_decay + at_step, ddecays, step_present)


@triton.jit
def load_state(state, channel_block, headdim, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(COLUMNS, BLOCK): columns of a state from `state` on, of a block of its channels."""
    channels = channel_block * BLOCK + tl.arange(0, BLOCK)
    at = state + tl.arange(0, COLUMNS)[:, None] * headdim + channels[None, :]
    return tl.load(at, (channels < headdim)[None, :], other=0.0)
