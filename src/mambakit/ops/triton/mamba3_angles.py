"""The angles of the Mamba-3 scan, sums of speeds * steps over a whole sequence, and the gradients of these.

An angle is kept as its sum within its chunk (float32, whole turns taken off) and, for each chunk, the sum before it
(float64 while it adds up); whoever needs an angle adds the two.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.mamba3_chunk import find_chunk, find_sequence

TURN = tl.constexpr(6.283185307179586)


@triton.jit
def _without_whole_turns(angle):
    return angle - tl.floor(angle / TURN + 0.5) * TURN


@triton.jit(do_not_specialize=["length", "pairs"])
def local_angles(
    speeds,  # (rows, heads or 1, pairs)
    steps,  # (rows, heads)
    angles,  # (rows, heads, pairs)
    sums,  # (slots, heads, pairs) in float64: of each chunk
    bounds,
    sequence_of_slot,
    length,
    heads,
    speed_heads,
    pairs,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    rows = start + tl.arange(0, STEPS)
    columns = tl.arange(0, PAIRS)
    present = rows < end
    mask = present[:, None] & (columns < pairs)[None, :]
    speed_head = head % speed_heads  # 0 where all heads share theirs
    speed = tl.load(speeds + ((rows * speed_heads + speed_head) * pairs)[:, None] + columns[None, :], mask, other=0.0)
    step = tl.load(steps + rows * heads + head, mask=present, other=0.0)
    turns = (speed * step[:, None]).to(tl.float64)
    total = _without_whole_turns(tl.sum(turns, 0))
    tl.store(sums + (slot.to(tl.int64) * heads + head) * pairs + columns, total, mask=columns < pairs)
    local = _without_whole_turns(tl.cumsum(turns, 0)).to(tl.float32)
    tl.store(angles + ((rows * heads + head) * pairs)[:, None] + columns[None, :], local, mask)


@triton.jit(do_not_specialize=["length", "pairs"])
def carried_angles(
    sums,  # (slots, heads, pairs) in float64, replaced by the sums before (with REVERSE: after) each chunk
    first,  # (sequences, heads, pairs): the first of these sums
    last,  # (sequences, heads, pairs) or None: the sum of all
    bounds,
    length,
    heads,
    pairs,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNKS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    sequence, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    begin, end, slot = find_sequence(sequence, bounds, length, STEPS)
    chunks = tl.cdiv(end - begin, STEPS)
    columns = tl.arange(0, PAIRS)
    inside = columns < pairs
    at_sequence = (sequence * heads + head) * pairs + columns
    carry = tl.zeros((PAIRS,), tl.float64)
    if first is not None:
        carry += tl.load(first + at_sequence, mask=inside, other=0.0).to(tl.float64)
    for begin_chunk in range(0, chunks, CHUNKS):
        index = begin_chunk + tl.arange(0, CHUNKS)
        position = chunks - 1 - index if REVERSE else index
        at = sums + (((slot + position) * heads + head) * pairs)[:, None] + columns[None, :]
        mask = (index < chunks)[:, None] & inside[None, :]
        own = tl.load(at, mask, other=0.0)
        before = carry[None, :] + tl.cumsum(own, 0) - own
        if not REVERSE:
            before = _without_whole_turns(before)
        tl.store(at, before, mask)
        carry += tl.sum(own, 0)
    if last is not None:
        if REVERSE:
            tl.store(last + at_sequence, carry.to(last.dtype.element_ty), mask=inside)
        else:
            whole = carry - tl.floor(carry / TURN) * TURN
            tl.store(last + at_sequence, whole.to(last.dtype.element_ty), mask=inside)


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
