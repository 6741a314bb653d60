"""The forward pass of the Mamba-3 scan: a walk along the chunks of a sequence, the state of one head in registers.

    y  = down ((start S q) + (W * (q k^T)) v + D v) silu(gate z)
    S' = exp(total) S + (tail v)^T k

with W_tj the decay from j to t times scale_j, own_t at j = t; start_t the decay from the chunk's beginning up to t, and
tail_t that from t to its end, times scale_t. Keys, queries and x are read once and y is written once; no state leaves
the chip but those that the backward pass asks for.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_chunk import (
    find_segment,
    operand,
    over_ranks,
    pair_weights,
    product,
    silu_and_slope,
)
from mambakit.ops.triton.mamba3_walk import load_whole, store_whole
from mambakit.ops.triton.ssd_steps import decay_between, decay_from_start, load_runs


@Kernel
@triton.jit(do_not_specialize=["runs_field", "length", "segment_chunks"])
def walk_outputs(
    x,
    keys,  # (slots, heads, rows, columns), as queries
    queries, z, up, gate, down, D, runs,
    first,  # (sequences * segments, heads, headdim, state) or None, as last
    last,
    kept,  # (slots, heads, 2 HALF, headdim) or None
    y, bounds,
    runs_field, length, segment_chunks, heads, headdim, rank, state, x_stride, z_stride, D_head, D_row,
    STEPS: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
    FINE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    SINGLE: tl.constexpr,  # no sequence has more than one chunk
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
    at_state = at_segment * headdim * state
    at_weight = ((head * rank + ranks) * headdim)[:, None] + channels[None, :]
    weight_mask = (ranks < rank)[:, None] & inside[None, :]

    carried = tl.zeros((2 * HALF, BLOCK), tl.float32)
    if first is not None:
        carried += load_whole(first + at_state, channels, inside, state, HALF, BLOCK, INTERLEAVED)
    if D is not None:
        skip = tl.load(D + head * D_head + channels * D_row, inside, other=0.0)[None, :]
    x_inner = step[:, None] * x_stride + channels[None, :]
    z_inner = step[:, None] * z_stride + channels[None, :]
    key_inner = index[:, None] * (2 * HALF) + columns[None, :]
    kept_inner = columns[:, None] * headdim + channels[None, :]
    for chunk in tl.range(from_chunk, to_chunk, num_stages=STAGES):
        at_chunk = (first_slot + chunk) * heads + head
        row = begin + chunk * STEPS
        present = (step < end - row) & (ranks < rank)
        mask = present[:, None] & inside[None, :]
        q = tl.load(queries + at_chunk * (ROWS * 2 * HALF) + key_inner)
        k = tl.load(keys + at_chunk * (ROWS * 2 * HALF) + key_inner)
        v = tl.load(x + (row * x_stride + head * headdim) + x_inner, mask, other=0.0)
        place = at_chunk * STEPS
        coarse, fine, last_coarse, last_fine = load_runs(runs, place, runs_field, step, STEPS, FINE)
        scales = tl.load(runs + 2 * runs_field + place + step)
        owns = tl.load(runs + 3 * runs_field + place + step)
        if up is not None:
            v = v.to(tl.float32) * tl.load(up + at_weight, weight_mask, other=0.0)
        if first is not None or not SINGLE:
            narrow = operand(carried, PRECISION)
        if kept is not None:
            tl.store(kept + at_chunk * (2 * HALF) * headdim + kept_inner, narrow, inside[None, :])
        scores = product(q, tl.trans(k), PRECISION) * pair_weights(coarse, fine, scales, owns, step, FINE)
        scores = operand(scores, PRECISION)
        out = product(scores, v, PRECISION)
        if first is not None or not SINGLE:
            out += product(q, narrow, PRECISION) * decay_from_start(coarse, fine, FINE)[:, None]
        if D is not None:
            out += skip * v.to(tl.float32)
        if z is not None:
            gates = tl.load(z + (row * z_stride + head * headdim) + z_inner, mask, other=0.0).to(tl.float32)
            if gate is not None:
                gates *= tl.load(gate + at_weight, weight_mask, other=0.0)
            silu, _ = silu_and_slope(gates)
            out *= silu
        if down is not None:
            out *= tl.load(down + at_weight, weight_mask, other=0.0)
            a_step = tl.arange(0, STEPS)
            at_y = y + (row * heads + head) * headdim + (a_step[:, None] * (heads * headdim) + channels[None, :])
            sums = over_ranks(out, STEPS, RANKS, BLOCK)
            tl.store(at_y, sums.to(y.dtype.element_ty), (a_step < end - row)[:, None] & inside[None, :])
        else:
            at_y = y + (row * rank * heads + head) * headdim
            at_y += (step * rank + ranks)[:, None] * (heads * headdim) + channels[None, :]
            tl.store(at_y, out.to(y.dtype.element_ty), mask)
        tail = decay_between(last_coarse, coarse, last_fine, fine, FINE) * scales
        carried *= decay_from_start(last_coarse, last_fine, FINE)
        carried += product(tl.trans(k), v.to(tl.float32) * tail[:, None], PRECISION)
    if last is not None:
        store_whole(last + at_state, carried, channels, inside, state, HALF, BLOCK, INTERLEAVED)
