"""Keys and queries of the Mamba-3 scan: formed for every head, biased and turned; and the way of their gradients back.

They are formed in a pass of their own, and lie in memory chunk by chunk, (slots, heads, rows, columns): the first
coordinates of the pairs, then the second ones, zeros where there is none. What follows are products of whole tiles.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import (
    biased,
    cos_sin,
    find_chunk,
    find_sequence,
    fixed,
    store_halves,
    turn,
    turns_of_steps,
)


@triton.jit(do_not_specialize=["length", "pairs"])
def chunk_turns(
    speeds,  # (rows, heads or 1, pairs)
    steps,  # (rows, heads)
    sums,  # (slots, heads, pairs): how far each chunk turns
    bounds,
    sequence_of_slot,
    length,
    heads,
    speed_heads,
    pairs,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    rows = start + tl.arange(0, STEPS)
    columns = tl.arange(0, PAIRS)
    turns = turns_of_steps(speeds, steps, rows, rows < end, head, heads, speed_heads, pairs, PAIRS)
    tl.store(sums + (slot * heads + head) * pairs + columns, tl.sum(turns, 0), mask=columns < pairs)


@triton.jit(do_not_specialize=["length", "pairs"])
def carry_turns(
    sums,  # (slots, heads, pairs), replaced by the angles before each chunk
    first,  # (sequences, heads, pairs) or None
    bounds,
    length,
    heads,
    pairs,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    sequence, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    begin, end, slot = find_sequence(sequence, bounds, length, STEPS)
    chunks = tl.cdiv(end - begin, STEPS)
    columns = tl.arange(0, PAIRS)
    inside = columns < pairs
    carry = tl.zeros((PAIRS,), tl.int32)
    if first is not None:
        angle = tl.load(first + (sequence * heads + head) * pairs + columns, mask=inside, other=0.0)
        carry += fixed(angle.to(tl.float64))
    for begin_chunk in range(0, chunks, CHUNKS):
        index = begin_chunk + tl.arange(0, CHUNKS)
        at = sums + (((slot + index) * heads + head) * pairs)[:, None] + columns[None, :]
        mask = (index < chunks)[:, None] & inside[None, :]
        own = tl.load(at, mask, other=0)
        tl.store(at, carry[None, :] + tl.cumsum(own, 0) - own, mask)
        carry += tl.sum(own, 0).to(tl.int32)


@triton.jit(do_not_specialize=["length"])
def keys_and_queries(
    B,
    B_stride,
    C,
    C_stride,
    B_bias,
    C_bias,
    speeds,
    steps,
    carries,
    keys,
    queries,
    bounds,
    sequence_of_slot,
    length,
    heads,
    groups,
    rank,
    state,
    speed_heads,
    pairs,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FAST: tl.constexpr,
):
    ROWS: tl.constexpr = STEPS * RANKS
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    group = head // (heads // groups)
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    index = tl.arange(0, ROWS)
    ranks = index % RANKS
    rows = start + index // RANKS
    present = (rows < end) & (ranks < rank)
    columns = tl.arange(0, HALF)
    if speeds is not None:
        cos, sin = cos_sin(
            speeds, steps, carries, rows, (rows < end) & (ranks == 0), slot, head, heads, speed_heads, pairs, HALF, FAST
        )
    at = (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :]
    first, second = biased(
        B, B_bias, rows, B_stride, ranks, present, head, group, groups, rank, state, ROWS, HALF, INTERLEAVED
    )
    if speeds is not None:
        first, second = turn(first, second, cos, sin)
    tl.store(keys + at, first.to(keys.dtype.element_ty))
    tl.store(keys + at + HALF, second.to(keys.dtype.element_ty))
    first, second = biased(
        C, C_bias, rows, C_stride, ranks, present, head, group, groups, rank, state, ROWS, HALF, INTERLEAVED
    )
    if speeds is not None:
        first, second = turn(first, second, cos, sin)
    tl.store(queries + at, first.to(queries.dtype.element_ty))
    tl.store(queries + at + HALF, second.to(queries.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "heads_a_program"])
def vector_gradients(
    speeds,
    steps,
    carries,
    grads,  # (slots, heads, rows, columns): of the keys or queries
    grad_vectors,  # (blocks, rows, rank, groups, state)
    grad_bias,  # (slots, heads, rank, state) or None
    bounds,
    sequence_of_slot,
    length,
    rows_in_all,
    heads_a_program,
    heads,
    groups,
    rank,
    state,
    speed_heads,
    pairs,
    STEPS: tl.constexpr,
    RANKS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FAST: tl.constexpr,
):
    ROWS: tl.constexpr = STEPS * RANKS
    share = heads // groups
    blocks = heads // heads_a_program
    slot, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    group = block * heads_a_program // share
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    if start >= end:  # a slot that no sequence of the pack has
        return
    index = tl.arange(0, ROWS)
    ranks = index % RANKS
    rows = start + index // RANKS
    present = (rows < end) & (ranks < rank)
    columns = tl.arange(0, HALF)
    sum1 = tl.zeros((ROWS, HALF), tl.float32)
    sum2 = tl.zeros((ROWS, HALF), tl.float32)
    for head in range(block * heads_a_program, (block + 1) * heads_a_program):
        at = (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :]
        grad1 = tl.load(grads + at).to(tl.float32)
        grad2 = tl.load(grads + at + HALF).to(tl.float32)
        if speeds is not None:
            cos, sin = cos_sin(
                speeds,
                steps,
                carries,
                rows,
                (rows < end) & (ranks == 0),
                slot,
                head,
                heads,
                speed_heads,
                pairs,
                HALF,
                FAST,
            )
            grad1, grad2 = turn(grad1, grad2, cos, -sin)
        sum1 += grad1
        sum2 += grad2
        if grad_bias is not None:
            bias_ranks = tl.arange(0, RANKS)
            bias1 = tl.sum(tl.reshape(grad1, (STEPS, RANKS, HALF)), 0)
            bias2 = tl.sum(tl.reshape(grad2, (STEPS, RANKS, HALF)), 0)
            at_bias = ((slot * heads + head) * rank + bias_ranks) * state
            store_halves(grad_bias, at_bias, bias1, bias2, bias_ranks < rank, state, RANKS, HALF, INTERLEAVED)
    part = (block * heads_a_program % share) // heads_a_program
    at_vector = (((part * rows_in_all + rows) * rank + ranks) * groups + group) * state
    store_halves(grad_vectors, at_vector, sum1, sum2, present, state, ROWS, HALF, INTERLEAVED)
