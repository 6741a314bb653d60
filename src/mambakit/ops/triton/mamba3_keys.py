"""Keys and queries of the Mamba-3 scan: formed for every head, biased and turned; and the way of their gradients back.

They are formed in a pass of their own, and lie in memory chunk by chunk, (slots, heads, rows, columns): the first
coordinates of the pairs, then the second ones, zeros where there is none. What follows are products of whole tiles.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_chunk import (
    biased,
    cos_sin,
    find_chunk,
    find_sequence,
    fixed,
    store_halves,
    turn,
)


@Kernel
@triton.jit(do_not_specialize=["length", "pairs"])
def carry_turns(
    sums,  # (slots, heads, pairs), replaced by the angles before each chunk
    first,  # (sequences, heads, pairs) or None
    bounds,
    length, heads, pairs,
    STEPS: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
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


@Kernel
@triton.jit(do_not_specialize=["length"])
def keys_and_queries(
    B, C, B_bias, C_bias, speeds, steps, carries, keys, queries, bounds, sequence_of_slot,
    length, heads, groups, rank, state, speed_heads, pairs, B_stride, C_stride,
    STEPS: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """COLUMNS pairs of the rows of one chunk and head."""
    ROWS: tl.constexpr = STEPS * RANKS
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    group = head // (heads // groups)
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    index = tl.arange(0, ROWS)
    ranks = index % RANKS
    rows = start + index // RANKS
    present = (rows < end) & (ranks < rank)
    first_pair = tl.program_id(1) * COLUMNS
    columns = first_pair + tl.arange(0, COLUMNS)
    at = (((slot * heads + head) * ROWS + index) * (2 * HALF))[:, None] + columns[None, :]
    B1, B2 = biased(
        B, B_bias, rows, B_stride, ranks, present, head, group, groups, rank, state, first_pair, ROWS, COLUMNS,
        INTERLEAVED,
    )  # fmt: skip
    C1, C2 = biased(
        C, C_bias, rows, C_stride, ranks, present, head, group, groups, rank, state, first_pair, ROWS, COLUMNS,
        INTERLEAVED,
    )  # fmt: skip
    if first_pair < pairs:
        counted = (rows < end) & (ranks == 0)
        cos, sin = cos_sin(
            speeds, steps, carries, rows, counted, slot, head, heads, speed_heads, first_pair, pairs, COLUMNS, FAST
        )
        B1, B2 = turn(B1, B2, cos, sin)
        C1, C2 = turn(C1, C2, cos, sin)
    tl.store(keys + at, B1.to(keys.dtype.element_ty))
    tl.store(keys + at + HALF, B2.to(keys.dtype.element_ty))
    tl.store(queries + at, C1.to(queries.dtype.element_ty))
    tl.store(queries + at + HALF, C2.to(queries.dtype.element_ty))


@Kernel
@triton.jit(do_not_specialize=["length", "rows_in_all"])
def vector_gradients(
    speeds, steps, carries,
    grad_keys,  # (slots, heads, rows, columns), as grad_queries
    grad_queries,
    grad_angles,  # (rows, heads, pairs)
    grad_B,  # (rows, rank, groups, state), as grad_C
    grad_C,
    grad_B_bias,  # (slots, heads, rank, state) or None, as grad_C_bias
    grad_C_bias,
    grad_speeds,  # (groups, rows, pairs) if SHARED, else (rows, heads, pairs); from within the chunk, as grad_steps
    grad_steps,  # (blocks of pairs, rows, heads)
    sums,  # (slots, heads, pairs) in float64 or None: of the gradients of the angles over each chunk
    bounds, sequence_of_slot,
    length, rows_in_all, heads, groups, rank, state, speed_heads, pairs,
    STEPS: tl.constexpr, RANKS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr,
    INTERLEAVED: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Turn the gradients of keys and queries back and sum them: COLUMNS pairs of one chunk and group, all its heads.

    With the gradients of the pairs' angles, what each chunk gives to those of speeds and steps.
    """
    ROWS: tl.constexpr = STEPS * RANKS
    slot, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    share = heads // groups
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    if start >= end:  # a slot that no sequence of the pack has
        return
    first_pair = tl.program_id(1) * COLUMNS
    turning = first_pair < pairs
    columns = first_pair + tl.arange(0, COLUMNS)
    index = tl.arange(0, ROWS)
    ranks = index % RANKS
    rows = start + index // RANKS
    present = (rows < end) & (ranks < rank)
    inner = index[:, None] * (2 * HALF) + columns[None, :]
    bias_ranks = tl.arange(0, RANKS)
    in_bias = bias_ranks < rank
    at_rows = (rows * rank + ranks) * groups + group
    a_step = tl.arange(0, STEPS)
    step_rows = start + a_step
    step_present = step_rows < end
    in_turns = step_present[:, None] & (columns < pairs)[None, :]
    of_shared = tl.zeros((STEPS, COLUMNS), tl.float32)
    B1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    B2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    C1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    C2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for head in tl.range(group * share, (group + 1) * share, num_stages=STAGES):
        at = (slot * heads + head) * (ROWS * 2 * HALF)
        of_B1 = tl.load(grad_keys + at + inner).to(tl.float32)
        of_B2 = tl.load(grad_keys + at + HALF + inner).to(tl.float32)
        of_C1 = tl.load(grad_queries + at + inner).to(tl.float32)
        of_C2 = tl.load(grad_queries + at + HALF + inner).to(tl.float32)
        if turning:
            counted = (rows < end) & (ranks == 0)
            cos, sin = cos_sin(
                speeds, steps, carries, rows, counted, slot, head, heads, speed_heads, first_pair, pairs, COLUMNS, FAST
            )
            of_B1, of_B2 = turn(of_B1, of_B2, cos, -sin)
            of_C1, of_C2 = turn(of_C1, of_C2, cos, -sin)
            at_angles = ((step_rows * heads + head) * pairs)[:, None] + columns[None, :]
            angles = tl.load(grad_angles + at_angles, in_turns, other=0.0)
            if sums is not None:
                at_sums = sums + (slot * heads + head) * pairs + columns
                tl.store(at_sums, tl.sum(angles, 0).to(tl.float64), mask=columns < pairs)
            turns = tl.cumsum(angles, 0, reverse=True)
            step = tl.load(steps + step_rows * heads + head, mask=step_present, other=0.0)
            at_speeds = ((step_rows * speed_heads + head % speed_heads) * pairs)[:, None] + columns[None, :]
            speed = tl.load(speeds + at_speeds, in_turns, other=0.0)
            at_steps = (tl.program_id(1) * rows_in_all + step_rows) * heads + head
            tl.store(grad_steps + at_steps, tl.sum(turns * speed, 1), mask=step_present)
            if SHARED:
                of_shared += turns * step[:, None]
            else:
                tl.store(grad_speeds + at_speeds, turns * step[:, None], in_turns)
        B1 += of_B1
        B2 += of_B2
        C1 += of_C1
        C2 += of_C2
        at_bias = ((slot * heads + head) * rank + bias_ranks) * state
        _store_over_steps(
            grad_B_bias, at_bias, of_B1, of_B2, in_bias, first_pair, state, STEPS, RANKS, COLUMNS, INTERLEAVED
        )
        _store_over_steps(
            grad_C_bias, at_bias, of_C1, of_C2, in_bias, first_pair, state, STEPS, RANKS, COLUMNS, INTERLEAVED
        )
    store_halves(grad_B, at_rows * state, B1, B2, present, first_pair, state, ROWS, COLUMNS, INTERLEAVED)
    store_halves(grad_C, at_rows * state, C1, C2, present, first_pair, state, ROWS, COLUMNS, INTERLEAVED)
    if turning and SHARED:
        at_speeds = ((group * rows_in_all + step_rows) * pairs)[:, None] + columns[None, :]
        tl.store(grad_speeds + at_speeds, of_shared, in_turns)


@triton.jit
def _store_over_steps(
    pointer, offsets, first, second, present, first_pair, state,
    STEPS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store halves (STEPS * RANKS, COLUMNS) summed over their steps, if there is a pointer."""
    if pointer is not None:
        first = tl.sum(tl.reshape(first, (STEPS, RANKS, COLUMNS)), 0)
        second = tl.sum(tl.reshape(second, (STEPS, RANKS, COLUMNS)), 0)
        store_halves(pointer, offsets, first, second, present, first_pair, state, RANKS, COLUMNS, INTERLEAVED)
