"""What the kernels of the Mamba-3 scan share: a chunk's rows, its keys and queries turned, and how it decays.

A chunk is STEPS steps of a sequence, and a row of its tiles one of RANKS inputs of a step (RANKS is the rank, rounded
up to a power of two; rows without an input are zero). Vectors of the state come as two tiles, the first and the second
coordinates of the pairs that turn together, so that turning them mixes no columns and q . k is a sum of two products.

An angle is the sum of a sequence's turns, held as a 32-bit fraction of a turn: such sums are exact in any order.

Sums of log decays are taken in float64 and held as two float32 numbers, so that a step of strong decay leaves the
differences of all later ones exact.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

FORGOTTEN = tl.constexpr(-1000.0)  # log of a decay that leaves nothing: exp of it is 0 in float32


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32; PRECISION "bf16" takes bfloat16 operands, any other is an input_precision of tl.dot."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def operand(a, PRECISION: tl.constexpr):
    """`a` as a product takes it."""
    if PRECISION == "bf16":
        return a.to(tl.bfloat16)
    else:
        return a


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
def load_halves(pointer, offsets, present, state, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second coordinates (ROWS, HALF) in float32 of the vectors that begin at `offsets` (ROWS,)."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF)
        mask = present[:, None] & (columns < state)[None, :]
        whole = tl.load(pointer + offsets[:, None] + columns[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(whole.to(tl.float32), (ROWS, HALF, 2)))
    else:
        columns = tl.arange(0, HALF)
        half = state // 2
        mask = present[:, None] & (columns < half)[None, :]
        at = pointer + offsets[:, None] + columns[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(
    pointer, offsets, first, second, present, state, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The reverse of `load_halves`."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF)
        mask = present[:, None] & (columns < state)[None, :]
        whole = tl.reshape(tl.join(first, second), (ROWS, 2 * HALF))
        tl.store(pointer + offsets[:, None] + columns[None, :], whole.to(pointer.dtype.element_ty), mask=mask)
    else:
        columns = tl.arange(0, HALF)
        half = state // 2
        mask = present[:, None] & (columns < half)[None, :]
        at = pointer + offsets[:, None] + columns[None, :]
        tl.store(at, first.to(pointer.dtype.element_ty), mask=mask)
        tl.store(at + half, second.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def biased(
    vectors,
    bias,
    rows,
    stride,
    ranks,
    present,
    head,
    group,
    groups,
    rank,
    state,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """B or C of one head with its bias added, in float32; zero in rows that are not there."""
    first, second = load_halves(
        vectors, rows * stride + (ranks * groups + group) * state, present, state, ROWS, HALF, INTERLEAVED
    )
    if bias is not None:
        bias_first, bias_second = load_halves(
            bias, (head * rank + ranks) * state, present, state, ROWS, HALF, INTERLEAVED
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
def turns_of_steps(speeds, steps, rows, counted, head, heads, speed_heads, pairs, COLUMNS: tl.constexpr):
    """How far each step turns every pair, (rows, COLUMNS), as fractions of a turn."""
    columns = tl.arange(0, COLUMNS)
    at = ((rows * speed_heads + head % speed_heads) * pairs)[:, None] + columns[None, :]
    speed = tl.load(speeds + at, mask=counted[:, None] & (columns < pairs)[None, :], other=0.0)
    return fixed(speed * tl.load(steps + rows * heads + head, mask=counted, other=0.0)[:, None])


@triton.jit
def cos_sin(
    speeds,
    steps,
    carries,
    rows,
    counted,
    slot,
    head,
    heads,
    speed_heads,
    pairs,
    COLUMNS: tl.constexpr,
    FAST: tl.constexpr,
):
    """cos and sin of the angle of every row and pair, (rows, COLUMNS); 1 and 0 for pairs that don't turn."""
    columns = tl.arange(0, COLUMNS)
    local = tl.cumsum(turns_of_steps(speeds, steps, rows, counted, head, heads, speed_heads, pairs, COLUMNS), 0)
    before = tl.load(carries + (slot * heads + head) * pairs + columns, mask=columns < pairs, other=0)
    angle = (local + before[None, :]).to(tl.int32).to(tl.float32) * 1.4629180792671596e-09
    if FAST:
        return libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def turn(first, second, cos, sin):
    """The pairs turned by their angles; by the opposite angles for -sin."""
    return first * cos - second * sin, first * sin + second * cos


@triton.jit
def sums_of_log_decay(log_decay, rows, counted, head, heads):
    """Of the steps up to each row's, those after it, and all, in float32; the first with what float32 leaves out."""
    decay = tl.load(log_decay + rows * heads + head, mask=counted, other=0.0)
    decay = tl.maximum(decay, FORGOTTEN).to(tl.float64)
    total = tl.sum(decay, 0)
    exact = tl.cumsum(decay, 0)
    high = exact.to(tl.float32)
    low = (exact - high.to(tl.float64)).to(tl.float32)
    return high, low, (total - exact).to(tl.float32), total.to(tl.float32)


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
