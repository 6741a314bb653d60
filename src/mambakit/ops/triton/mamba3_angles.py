"""The gradients of speeds and steps from those of the angles: sums over all later steps of the sequence."""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import find_chunk, find_sequence


@triton.jit(do_not_specialize=["length", "pairs"])
def later_sums(
    sums,  # (slots, heads, pairs) in float64, replaced by the sums over all later chunks
    whole,  # (sequences, heads, pairs) or None: the sum of all
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
    carry = tl.zeros((PAIRS,), tl.float64)
    for begin_chunk in range(0, chunks, CHUNKS):
        index = begin_chunk + tl.arange(0, CHUNKS)
        at = sums + (((slot + chunks - 1 - index) * heads + head) * pairs)[:, None] + columns[None, :]
        mask = (index < chunks)[:, None] & inside[None, :]
        own = tl.load(at, mask, other=0.0)
        tl.store(at, carry[None, :] + tl.cumsum(own, 0) - own, mask)
        carry += tl.sum(own, 0)
    if whole is not None:
        tl.store(whole + (sequence * heads + head) * pairs + columns, carry.to(whole.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "pairs", "heads_a_program"])
def speed_gradients(
    grad_angles,  # (rows, heads, pairs)
    later,  # (slots, heads, pairs) in float64: sums over the chunks after each
    speeds,
    steps,
    grad_speeds,  # (head blocks, rows, pairs) where heads share speeds, else (rows, heads, pairs)
    grad_steps,  # (rows, heads)
    bounds,
    sequence_of_slot,
    length,
    rows_in_all,
    heads,
    speed_heads,
    pairs,
    heads_a_program,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
    SHARED: tl.constexpr,
):
    blocks = heads // heads_a_program
    slot, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    rows = start + tl.arange(0, STEPS)
    columns = tl.arange(0, PAIRS)
    inside, present = columns < pairs, rows < end
    mask = present[:, None] & inside[None, :]
    of_shared = tl.zeros((STEPS, PAIRS), tl.float32)
    for index in range(heads_a_program):
        head = block * heads_a_program + index
        at = ((rows * heads + head) * pairs)[:, None] + columns[None, :]
        grad = tl.load(grad_angles + at, mask, other=0.0)
        after = tl.load(later + (slot * heads + head) * pairs + columns, mask=inside, other=0.0).to(tl.float32)
        turns = tl.cumsum(grad, 0, reverse=True) + after[None, :]
        step = tl.load(steps + rows * heads + head, mask=present, other=0.0)
        speed_head = head % speed_heads
        speed = tl.load(
            speeds + ((rows * speed_heads + speed_head) * pairs)[:, None] + columns[None, :], mask, other=0.0
        )
        tl.store(grad_steps + rows * heads + head, tl.sum(turns * speed, 1), mask=present)
        if SHARED:
            of_shared += turns * step[:, None]
        else:
            tl.store(grad_speeds + at, turns * step[:, None], mask)
    if SHARED:
        at = ((block.to(tl.int64) * rows_in_all + rows) * pairs)[:, None] + columns[None, :]
        tl.store(grad_speeds + at, of_shared, mask)
