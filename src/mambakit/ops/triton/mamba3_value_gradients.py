"""The gradients of the Mamba-3 scan with respect to x, z, D and the weights up, gate and down, chunk by chunk.

From the state S before each chunk and the gradient dS after it,

    dv = mixed^T dout + tail (k dS^T) + D dout,   mixed = W * (q k^T)
    dx = sum over ranks of up dv

and the gates' from the outputs, which are formed again.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import (
    find_chunk,
    operand,
    over_ranks,
    product,
    silu_and_slope,
    store_over_steps,
    sums_of_log_decay,
)


@triton.jit(do_not_specialize=["length"])
def value_gradients(
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
    D,
    log_decay,
    scale,
    own,
    kept,
    kept_grads,
    grad_x,
    grad_z,
    grad_D,  # (slots, heads, headdim)
    grad_up,  # (slots, heads, rank, headdim), as grad_gate and grad_down
    grad_gate,
    grad_down,
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
    CHANNEL_BLOCKS: tl.constexpr,
    RANKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = STEPS * RANKS
    GATED: tl.constexpr = (z is not None) or (down is not None)
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
    columns = tl.arange(0, 2 * HALF)
    below = step[:, None] > step[None, :]
    same = step[:, None] == step[None, :]
    high, low, after, _ = sums_of_log_decay(log_decay, rows, (rows < end) & (ranks == 0), head, heads)
    scales = tl.load(scale + rows * heads + head, present, other=0.0)
    owns = tl.load(own + rows * heads + head, present, other=0.0)
    tail = tl.exp(after) * scales
    at = (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :]
    q = tl.load(queries + at)
    k = tl.load(keys + at)
    scores = product(q, tl.trans(k), PRECISION)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.where(below, between, float("-inf")))
    weights = tl.where(same, owns[:, None], decay * scales[None, :])
    mixed = operand(scores * weights, PRECISION)

    for channel_block in tl.static_range(CHANNEL_BLOCKS):
        channels = channel_block * BLOCK + tl.arange(0, BLOCK)
        inside = channels < headdim
        mask = present[:, None] & inside[None, :]
        at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
        at_state = ((slot * heads + head) * (2 * HALF) + columns)[:, None] * headdim + channels[None, :]
        x_rows = tl.load(x + (rows * x_stride + head * headdim)[:, None] + channels[None, :], mask, other=0.0)
        v = x_rows
        if up is not None:
            ups = tl.load(up + at_weight, mask, other=0.0)
            v = x_rows.to(tl.float32) * ups
        at_y = rows * y_stride + head * headdim
        if RANKED:
            at_y += ranks * heads * headdim
        dout = tl.load(grad_y + at_y[:, None] + channels[None, :], mask, other=0.0).to(tl.float32)
        if D is not None:
            skip = tl.load(D + head * headdim + channels, inside, other=0.0)
        if GATED:
            out = product(q, tl.load(kept + at_state, inside[None, :], other=0.0), PRECISION)
            out = out * tl.exp(high)[:, None] + product(mixed, v, PRECISION)
            if D is not None:
                out += skip[None, :] * v.to(tl.float32)
            dgated = dout
            if down is not None:
                dgated = dout * tl.load(down + at_weight, mask, other=0.0)
            if z is not None:
                z_rows = tl.load(
                    z + (rows * z_stride + head * headdim)[:, None] + channels[None, :], mask, other=0.0
                ).to(tl.float32)
                gates = z_rows
                if gate is not None:
                    gate_weights = tl.load(gate + at_weight, mask, other=0.0)
                    gates = z_rows * gate_weights
                silu, slope = silu_and_slope(gates)
                dgates = dgated * out * slope
                if gate is not None:
                    store_over_steps(
                        grad_gate + slot * heads * rank * headdim,
                        dgates * z_rows,
                        head,
                        rank,
                        channels,
                        headdim,
                        STEPS,
                        RANKS,
                        BLOCK,
                    )
                    dgates = dgates * gate_weights
                tl.store(
                    grad_z + ((step_rows * heads + head) * headdim)[:, None] + channels[None, :],
                    over_ranks(dgates, STEPS, RANKS, BLOCK).to(grad_z.dtype.element_ty),
                    step_present[:, None] & inside[None, :],
                )
                gated = out * silu
                dgated = dgated * silu
            else:
                gated = out
            if down is not None:
                store_over_steps(
                    grad_down + slot * heads * rank * headdim,
                    dout * gated,
                    head,
                    rank,
                    channels,
                    headdim,
                    STEPS,
                    RANKS,
                    BLOCK,
                )
            dout = dgated
        if D is not None:
            tl.store(
                grad_D + (slot * heads + head) * headdim + channels,
                tl.sum(dout * v.to(tl.float32), 0),
                mask=inside,
            )
        douts = operand(dout, PRECISION)
        dv = product(k, tl.load(kept_grads + at_state, inside[None, :], other=0.0), PRECISION)
        dv = dv * tail[:, None] + product(tl.trans(mixed), douts, PRECISION)
        if D is not None:
            dv += skip[None, :] * dout
        if up is not None:
            store_over_steps(
                grad_up + slot * heads * rank * headdim,
                dv * x_rows.to(tl.float32),
                head,
                rank,
                channels,
                headdim,
                STEPS,
                RANKS,
                BLOCK,
            )
            dv = dv * ups
        tl.store(
            grad_x + ((step_rows * heads + head) * headdim)[:, None] + channels[None, :],
            over_ranks(dv, STEPS, RANKS, BLOCK).to(grad_x.dtype.element_ty),
            step_present[:, None] & inside[None, :],
        )
