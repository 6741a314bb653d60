"""The gradients of speeds and steps from those of the angles: sums over all later steps of the sequence."""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_chunk import find_chunk, find_sequence


@Kernel
@triton.jit(do_not_specialize=["length", "pairs"])
def later_sums(
    sums,  # (slots, heads, pairs) in float64, replaced by the sums over all later chunks
    whole,  # (sequences, heads, pairs) or None: the sum of all
    bounds,
    length, heads, pairs,
    STEPS: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
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


@Kernel
@triton.jit(do_not_specialize=["length", "rows_in_all", "pairs"])
def finish_turns(
    later,  # (slots, heads, pairs) in float64 or None: sums over the chunks after each
    speeds, steps,
    shares,  # (groups, rows, pairs) if SHARED, else grad_speeds itself: what each chunk has found, as step_shares
    step_shares,  # (blocks, rows, heads)
    grad_speeds,  # (rows, heads or 1, pairs)
    grad_steps,  # (rows, heads)
    bounds, sequence_of_slot,
    length, rows_in_all, heads, groups, speed_heads, pairs,
    STEPS: tl.constexpr, PAIRS: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Add what later chunks give to the gradients of a chunk's speeds and steps."""
    slot = tl.program_id(0).to(tl.int64)
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    if start >= end:  # a slot that no sequence of the pack has
        return
    rows = start + tl.arange(0, STEPS)
    columns = tl.arange(0, PAIRS)
    inside, present = columns < pairs, rows < end
    mask = present[:, None] & inside[None, :]
    of_shared = tl.zeros((STEPS, PAIRS), tl.float32)
    if SHARED:
        speed = tl.load(speeds + (rows * pairs)[:, None] + columns[None, :], mask, other=0.0)
    for first_head in range(0, heads, HEADS):
        for index in tl.static_range(HEADS):  # so that their loads are under way together
            head = first_head + index
            counted = present & (head < heads)
            after = tl.zeros((PAIRS,), tl.float32)
            if later is not None:
                at_later = later + (slot * heads + head) * pairs + columns
                after = tl.load(at_later, mask=inside & (head < heads), other=0.0).to(tl.float32)
            step = tl.load(steps + rows * heads + head, mask=counted, other=0.0)
            if not SHARED:
                at = ((rows * speed_heads + head) * pairs)[:, None] + columns[None, :]
                own = counted[:, None] & inside[None, :]
                speed = tl.load(speeds + at, own, other=0.0)
            of_step = tl.sum(after[None, :] * speed, 1)
            for block in tl.static_range(BLOCKS):
                of_step += tl.load(step_shares + (block * rows_in_all + rows) * heads + head, mask=counted, other=0.0)
            tl.store(grad_steps + rows * heads + head, of_step, mask=counted)
            if SHARED:
                of_shared += step[:, None] * after[None, :]
            else:
                found = tl.load(shares + at, own, other=0.0) + step[:, None] * after[None, :]
                tl.store(grad_speeds + at, found, own)
    if SHARED:
        for group in range(groups):
            at = ((group * rows_in_all + rows) * pairs)[:, None] + columns[None, :]
            of_shared += tl.load(shares + at, mask, other=0.0)
        tl.store(grad_speeds + (rows * pairs)[:, None] + columns[None, :], of_shared, mask)
