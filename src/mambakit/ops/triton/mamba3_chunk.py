"""What the kernels of the Mamba-3 scan share: a chunk's rows, its keys and queries turned, and how it decays.

A chunk is STEPS steps of a sequence, and a row of its tiles one of RANKS inputs of a step (RANKS is the rank, rounded
up to a power of two; rows without an input are zero). Vectors of the state come as two tiles, the first and the second
coordinates of the pairs that turn together, so that turning them mixes no columns and q . k is a sum of two products.

An angle is the sum of a sequence's turns, held as a 32-bit fraction of a turn: such sums are exact in any order.

What the steps weigh lies in memory chunk by chunk, `runs` (4, slots, heads, STEPS), as `prepare` leaves it: the sums of
log decays along the chunk in two parts (ssd_steps tells why, and takes them), scale and own; zeros where a chunk has no
step, so that the last sums are those of the whole chunk.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.ssd_steps import FORGETS, LOG2_E, decay_between, decay_from_start, load_runs


@triton.jit
def operand(a, PRECISION: tl.constexpr):
    """`a` as a product takes it: in half precision for "bf16" and "fp16", else in float32."""
    if PRECISION == "bf16":
        return a.to(tl.bfloat16)
    elif PRECISION == "fp16":
        return a.to(tl.float16)
    else:
        return a.to(tl.float32)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32; a PRECISION that is not of `operand` is an input_precision of tl.dot."""
    if PRECISION == "bf16" or PRECISION == "fp16":
        return tl.dot(operand(a, PRECISION), operand(b, PRECISION))
    else:
        return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=PRECISION)


@triton.jit
def find_chunk(slot, bounds, sequence_of_slot, length, STEPS: tl.constexpr):
    """The sequence of a slot, its chunk's first row among all batch * length, and the row after its sequence."""
    if bounds is not None:
        sequence = tl.load(sequence_of_slot + slot).to(tl.int64)
        first = tl.load(bounds + sequence).to(tl.int64)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
        start = first + (slot - first // STEPS - sequence) * STEPS
    else:
        chunks = tl.cdiv(length, STEPS)
        sequence = (slot // chunks).to(tl.int64)
        start = sequence * length + (slot % chunks) * STEPS
        end = sequence * length + length
    return sequence, start, end


@triton.jit
def find_sequence(sequence, bounds, length, STEPS: tl.constexpr):
    """The first row of a sequence, the row after it, and the slot of its first chunk."""
    if bounds is not None:
        first = tl.load(bounds + sequence).to(tl.int64)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
        slot = first // STEPS + sequence
    else:
        first = sequence * length
        end = first + length
        slot = sequence * tl.cdiv(length, STEPS)
    return first, end, slot


@triton.jit
def find_segment(bounds, length, segment_chunks, heads, headdim, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """What a program that walks along a segment has: the segment, its head and channels; the sequence, its first row,
    the row after it and the slot of its first chunk; and the chunks from and to which it walks."""
    blocks = tl.cdiv(headdim, BLOCK)
    segment, head = tl.program_id(1), tl.program_id(0) // blocks % heads
    channels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    sequence = (tl.program_id(0) // blocks // heads).to(tl.int64)
    begin, end, first_slot = find_sequence(sequence, bounds, length, STEPS)
    chunks = tl.cdiv(end - begin, STEPS).to(tl.int32)
    from_chunk = tl.minimum(segment * segment_chunks, chunks)
    to_chunk = tl.minimum(from_chunk + segment_chunks, chunks)
    return segment, head, channels, sequence, begin, end, first_slot, from_chunk, to_chunk


@triton.jit
def load_halves(
    pointer, offsets, present, first_pair, state,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """First and second coordinates (ROWS, COLUMNS) in float32, those of the pairs from `first_pair` on.

    The vectors begin at `offsets` (ROWS,).
    """
    if INTERLEAVED:
        columns = 2 * first_pair + tl.arange(0, 2 * COLUMNS)
        mask = present[:, None] & (columns < state)[None, :]
        whole = tl.load(pointer + offsets[:, None] + columns[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(whole.to(tl.float32), (ROWS, COLUMNS, 2)))
    else:
        columns = first_pair + tl.arange(0, COLUMNS)
        half = state // 2
        mask = present[:, None] & (columns < half)[None, :]
        at = pointer + offsets[:, None] + columns[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(
    pointer, offsets, first, second, present, first_pair, state,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store (ROWS, COLUMNS) each of first and second coordinates, those of the pairs from `first_pair` on."""
    if INTERLEAVED:
        columns = 2 * first_pair + tl.arange(0, 2 * COLUMNS)
        mask = present[:, None] & (columns < state)[None, :]
        whole = tl.reshape(tl.join(first, second), (ROWS, 2 * COLUMNS))
        tl.store(pointer + offsets[:, None] + columns[None, :], whole.to(pointer.dtype.element_ty), mask=mask)
    else:
        columns = first_pair + tl.arange(0, COLUMNS)
        half = state // 2
        mask = present[:, None] & (columns < half)[None, :]
        at = pointer + offsets[:, None] + columns[None, :]
        tl.store(at, first.to(pointer.dtype.element_ty), mask=mask)
        tl.store(at + half, second.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def biased(
    vectors, bias, rows, stride, ranks, present, head, group, groups, rank, state, first_pair,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """B or C of one head with its bias added, in float32; zero in rows that are not there."""
    first, second = load_halves(
        vectors,
        rows * stride + (ranks * groups + group) * state,
        present,
        first_pair,
        state,
        ROWS,
        COLUMNS,
        INTERLEAVED,
    )
    if bias is not None:
        bias_first, bias_second = load_halves(
            bias, (head * rank + ranks) * state, present, first_pair, state, ROWS, COLUMNS, INTERLEAVED
        )
        first += bias_first
        second += bias_second
    return first, second


@triton.jit
def fixed(angle):
    """An angle as a 32-bit fraction of a whole turn: sums of these leave whole turns out and are exact."""
    turns = angle * 0.15915494309189535
    return ((turns - tl.floor(turns + 0.5)) * 4294967296.0).to(tl.int32)


@triton.jit
def turns_of_steps(speeds, steps, rows, counted, head, heads, speed_heads, first_pair, pairs, COLUMNS: tl.constexpr):
    """How far each step turns the pairs from `first_pair` on, (rows, COLUMNS), as fractions of a turn."""
    columns = first_pair + tl.arange(0, COLUMNS)
    at = ((rows * speed_heads + head % speed_heads) * pairs)[:, None] + columns[None, :]
    speed = tl.load(speeds + at, mask=counted[:, None] & (columns < pairs)[None, :], other=0.0)
    return fixed(speed * tl.load(steps + rows * heads + head, mask=counted, other=0.0)[:, None])


@triton.jit
def cos_sin(
    speeds, steps, carries, rows, counted, slot, head, heads, speed_heads, first_pair, pairs,
    COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """cos and sin of the angles of every row and the pairs from `first_pair` on; 1 and 0 for pairs that don't turn."""
    columns = first_pair + tl.arange(0, COLUMNS)
    turns = turns_of_steps(speeds, steps, rows, counted, head, heads, speed_heads, first_pair, pairs, COLUMNS)
    whole = tl.cumsum(turns, 0)
    if carries is not None:
        before = tl.load(carries + (slot * heads + head) * pairs + columns, mask=columns < pairs, other=0)
        whole += before[None, :]
    angle = whole.to(tl.int32).to(tl.float32) * 1.4629180792671596e-09
    if FAST:
        return libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def turn(first, second, cos, sin):
    """The pairs turned by their angles; by the opposite angles for -sin."""
    return first * cos - second * sin, first * sin + second * cos


@Kernel
@triton.jit(do_not_specialize=["length", "pairs"])
def prepare(
    log_decay,  # (rows, heads), as scale, own and steps
    scale, own,
    runs,  # (4, slots, heads, STEPS)
    speeds,  # (rows, heads or 1, pairs) or None
    steps,
    turns,  # (slots, heads, pairs): how far each chunk turns
    bounds, sequence_of_slot,
    length, heads, speed_heads, pairs,
    STEPS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Fill `runs` and `turns` for a chunk and HEADS heads."""
    slot = tl.program_id(0).to(tl.int64)
    _, start, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    step = tl.arange(0, STEPS)
    there = head < heads
    rows = start + step
    inside = (rows < end)[:, None] & there[None, :]
    at = (rows * heads)[:, None] + head[None, :]
    decay = tl.maximum(tl.load(log_decay + at, inside, other=0.0) * LOG2_E, FORGETS)
    coarse = tl.floor(decay * 64.0 + 0.5) * 0.015625
    fine = decay - coarse
    place = runs + (slot * heads + head)[None, :] * STEPS + step[:, None]
    field = tl.num_programs(0).to(tl.int64) * heads * STEPS
    stored = there[None, :] & (step >= 0)[:, None]
    if FINE:
        tl.store(place, tl.cumsum(coarse, 0), stored)
        tl.store(place + field, tl.cumsum(fine, 0), stored)
    else:
        tl.store(place, tl.cumsum(coarse, 0) + tl.cumsum(fine, 0), stored)
    tl.store(place + 2 * field, tl.load(scale + at, inside, other=0.0), stored)
    tl.store(place + 3 * field, tl.load(own + at, inside, other=0.0), stored)
    if speeds is not None:
        columns = tl.arange(0, PAIRS)
        for index in tl.static_range(HEADS):  # so that all loads are under way together
            one = tl.program_id(1) * HEADS + index
            turned = turns_of_steps(
                speeds, steps, rows, (rows < end) & (one < heads), one, heads, speed_heads, 0, pairs, PAIRS
            )
            at_turns = turns + (slot * heads + one) * pairs + columns
            tl.store(at_turns, tl.sum(turned, 0), mask=(columns < pairs) & (one < heads))


@triton.jit
def rows_of_program(bounds, sequence_of_slot, length, heads, rank, STEPS: tl.constexpr, RANKS: tl.constexpr):
    """Of a program that takes a chunk of a head: its slot and head, the first row of the chunk and the one after its
    last; of each of its numbers, index, step and rank, and which of them are there."""
    slot, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    _, row, end = find_chunk(slot, bounds, sequence_of_slot, length, STEPS)
    index = tl.arange(0, STEPS * RANKS)
    step, ranks = index // RANKS, index % RANKS
    return slot, head, row, end, index, step, ranks, (step < end - row) & (ranks < rank)


@triton.jit
def load_weights(runs, at_chunk, runs_field, step, STEPS: tl.constexpr, FINE: tl.constexpr):
    """Of the rows of a chunk of a head: the sums of log decays in two parts, scales and own, the decay from the start
    of the chunk and to its end; and that over all of it."""
    place = at_chunk * STEPS
    coarse, fine, last_coarse, last_fine = load_runs(runs, place, runs_field, step, STEPS, FINE)
    scales = tl.load(runs + 2 * runs_field + place + step)
    owns = tl.load(runs + 3 * runs_field + place + step)
    start = decay_from_start(coarse, fine, FINE)
    to_end = decay_between(last_coarse, coarse, last_fine, fine, FINE)
    return coarse, fine, scales, owns, start, to_end, decay_from_start(last_coarse, last_fine, FINE)


@triton.jit
def pair_decays(coarse, fine, step, FINE: tl.constexpr):
    """The decay from row j (columns) up to row t; 0 where the step of j is not before that of t."""
    between = decay_between(coarse[:, None], coarse[None, :], fine[:, None], fine[None, :], FINE)
    return tl.where(step[:, None] > step[None, :], between, 0.0)


@triton.jit
def pair_weights(coarse, fine, scales, owns, step, FINE: tl.constexpr):
    """W_tj: the decay from j to t, times scale_j; own_t at rows of one step."""
    weights = pair_decays(coarse, fine, step, FINE) * scales[None, :]
    return tl.where(step[:, None] == step[None, :], owns[:, None], weights)


@triton.jit
def over_ranks(tile, STEPS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """(STEPS * RANKS, COLUMNS) summed over the ranks of each step."""
    if RANKS == 1:
        return tile
    else:
        return tl.sum(tl.reshape(tile, (STEPS, RANKS, COLUMNS)), 1)


@triton.jit
def over_ranks_of_rows(row, STEPS: tl.constexpr, RANKS: tl.constexpr):
    """(STEPS * RANKS,) summed over the ranks of each step."""
    if RANKS == 1:
        return row
    else:
        return tl.sum(tl.reshape(row, (STEPS, RANKS)), 1)


@triton.jit
def store_over_steps(
    pointer, tile, head, rank, columns, size, STEPS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store a tile (STEPS * RANKS, COLUMNS) summed over its steps in (..., heads, rank, size), from `pointer` on."""
    ranks = tl.arange(0, RANKS)
    sums = tl.sum(tl.reshape(tile, (STEPS, RANKS, COLUMNS)), 0)
    at = pointer + ((head * rank + ranks) * size)[:, None] + columns[None, :]
    tl.store(at, sums, mask=(ranks < rank)[:, None] & (columns < size)[None, :])


@triton.jit
def silu_and_slope(x):
    """silu(x) and its derivative."""
    sigmoid = tl.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
