"""What the steps of the scan of Mamba-2 are before and after its kernels: dt made ready, its gradient put together.

The logarithms of the decays, a_t = dt_t A, are summed along each chunk in two parts, in powers of two: the coarse part
sums multiples of 1/64, which is exact, and the fine part stays below one. So the difference of two sums is as exact as
a is, also after a step that forgets everything.

The kernel of the backward leaves for every step t of a chunk (docs of ssd_backward): `across`, what the sum a_1 + ...
+ a_t gets from the state before it, and in half precision from within the chunk; `sent`, what it loses by the state
after it; `within`, in float32, what a_t gets from within the chunk; and for the chunk `through`, what all of its a get
from the state that passes through. Hence

    da_k = sum_{t >= k} across_t + sum_{t < k} sent_t + within_k + through
    ddt_k = (dscale_k + da_k A) d clamp(softplus(dt + dt_bias))
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.ssd_layout import chunk_place

LOG2_E = tl.constexpr(1.4426950408889634)
FORGETS = tl.constexpr(-150.0)  # two to this power is zero in float32


@triton.jit
def decay_between(coarse_to, coarse_from, fine_to, fine_from, FINE: tl.constexpr):
    """exp(c_to - c_from) of the sums c in two parts."""
    if FINE:
        return tl.exp2((coarse_to - coarse_from) + (fine_to - fine_from))
    return tl.exp2(coarse_to - coarse_from)


@triton.jit
def decay_from_start(coarse, fine, FINE: tl.constexpr):
    """exp(c)."""
    if FINE:
        return tl.exp2(coarse + fine)
    return tl.exp2(coarse)


@triton.jit
def load_runs(runs, place, field, step, STEPS: tl.constexpr, FINE: tl.constexpr):
    """Of the chunk and head at `place`: the sums up to each row's step and to the last, each in two parts."""
    coarse = tl.load(runs + place + step)
    last_coarse = tl.load(runs + place + STEPS - 1)
    fine, last_fine = coarse, last_coarse
    if FINE:
        fine = tl.load(runs + field + place + step)
        last_fine = tl.load(runs + field + place + STEPS - 1)
    return coarse, fine, last_coarse, last_fine


@triton.jit
def softplus(v):
    """log(1 + exp(v)), exact also where exp(v) is tiny beside one."""
    u = tl.exp(-tl.abs(v))
    w = 1.0 + u
    small = tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.maximum(v, 0.0) + small


@Kernel
@triton.jit(do_not_specialize=["dt_batch", "dt_row", "length", "chunks_of_sequence", "chunks", "heads"])
def prepare_steps(
    dt, A, dt_bias, runs, table,
    dt_batch, dt_row, dt_head, length, chunks_of_sequence, chunks, heads,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, FINE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
):  # fmt: skip
    """Fill runs (3, heads, places): coarse sums, fine sums, and dt as it enters; zero steps fill a chunk cut short.

    Without FINE the first is the whole sum and the second is not written: half precision has no use for more.
    """
    chunk = tl.program_id(0)
    batch, start, end = chunk_place(table, chunk, length, chunks_of_sequence, CHUNK, PACKED)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    step = tl.arange(0, CHUNK)
    there = head < heads
    inside = (step[:, None] < end - start) & there[None, :]
    raw = _raw_steps(dt, dt_bias, batch, start, step, head, inside, there, dt_batch, dt_row, dt_head, HAS_BIAS)
    wide = softplus(raw) if SOFTPLUS else raw
    taken = tl.minimum(tl.maximum(wide, DT_MIN), DT_MAX)
    taken = tl.where(inside, tl.where(wide == wide, taken, wide), 0.0)
    a = taken * (tl.load(A + head, mask=there, other=0.0) * LOG2_E)[None, :]
    a = tl.maximum(a, FORGETS)
    coarse = tl.floor(a * 64.0 + 0.5) * 0.015625
    fine = a - coarse
    row = head.to(tl.int64) * chunks + chunk
    place = runs + row[None, :] * CHUNK + step[:, None]
    whole = heads.to(tl.int64) * chunks * CHUNK
    stored = there[None, :] & (step[:, None] >= 0)
    if FINE:
        tl.store(place, tl.cumsum(coarse, 0), mask=stored)
        tl.store(place + whole, tl.cumsum(fine, 0), mask=stored)
    else:
        tl.store(place, tl.cumsum(coarse, 0) + tl.cumsum(fine, 0), mask=stored)
    tl.store(place + 2 * whole, taken, mask=stored)


@Kernel
@triton.jit(do_not_specialize=["dt_batch", "dt_row", "length", "chunks_of_sequence", "chunks", "heads"])
def finish_steps(
    dt, A, dt_bias, runs, steps, through, ddt, dA, ddt_bias, table,
    dt_batch, dt_row, dt_head, length, chunks_of_sequence, chunks, heads,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, FINE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
):  # fmt: skip
    """Fill ddt (batch, length, heads), and of every chunk what it adds to dA and ddt_bias (chunks, heads).

    `steps` is (4, heads, places): across, dscale, sent and within; `through` is (heads, chunks).
    """
    chunk = tl.program_id(0)
    batch, start, end = chunk_place(table, chunk, length, chunks_of_sequence, CHUNK, PACKED)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    step = tl.arange(0, CHUNK)
    there = head < heads
    inside = (step[:, None] < end - start) & there[None, :]
    row = head.to(tl.int64) * chunks + chunk
    place = row[None, :] * CHUNK + step[:, None]
    whole = heads.to(tl.int64) * chunks

    u = tl.load(steps + place, mask=inside, other=0.0)
    s = tl.load(steps + whole * CHUNK + place, mask=inside, other=0.0)
    e = tl.load(steps + 2 * whole * CHUNK + place, mask=inside, other=0.0)
    w = tl.load(through + row, mask=there, other=0.0)
    da = tl.cumsum(u, 0, reverse=True) + (tl.cumsum(e, 0) - e) + w[None, :]
    if FINE:
        da += tl.load(steps + 3 * whole * CHUNK + place, mask=inside, other=0.0)

    raw = _raw_steps(dt, dt_bias, batch, start, step, head, inside, there, dt_batch, dt_row, dt_head, HAS_BIAS)
    wide = softplus(raw) if SOFTPLUS else raw
    found = s + da * tl.load(A + head, mask=there, other=0.0)[None, :]
    if SOFTPLUS:
        found = found / (1.0 + tl.exp(-raw))
    found = tl.where((wide >= DT_MIN) & (wide <= DT_MAX) & inside, found, 0.0)
    target = ddt + (batch.to(tl.int64) * length + start) * heads
    tl.store(target + step[:, None] * heads + head[None, :], found, mask=inside)
    taken = tl.load(runs + 2 * whole * CHUNK + place, mask=inside, other=0.0)
    part = chunk.to(tl.int64) * heads + head
    tl.store(dA + part, tl.sum(tl.where(inside, da * taken, 0.0), 0), mask=there)
    if HAS_BIAS:
        tl.store(ddt_bias + part, tl.sum(found, 0), mask=there)


@triton.jit
def _raw_steps(
    dt, dt_bias, batch, start, step, head, inside, there, dt_batch, dt_row, dt_head, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """dt of a chunk and several heads with its bias, (steps, heads), before all else."""
    base = dt + batch.to(tl.int64) * dt_batch + start.to(tl.int64) * dt_row
    raw = tl.load(base + step[:, None] * dt_row + head[None, :] * dt_head, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + head, mask=there, other=0.0)[None, :]
    return raw


@Kernel
@triton.jit(do_not_specialize=["chunks"])
def sum_chunks(
    dA_parts, bias_parts, dD_parts, dA, ddt_bias, dD,
    chunks, heads, headdim,
    HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over the chunks, in a fixed order, what each adds to dA, ddt_bias (heads,) and dD (heads, headdim).

    A program takes COLUMNS numbers: the first programs of dA, the next of ddt_bias, the rest of dD.
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(heads, COLUMNS)
    parts, total, width = dA_parts, dA, heads
    if HAS_BIAS:
        if block >= blocks:
            block, parts, total = block - blocks, bias_parts, ddt_bias
    if HAS_D:
        if tl.program_id(0) >= (2 * blocks if HAS_BIAS else blocks):
            block = tl.program_id(0) - (2 * blocks if HAS_BIAS else blocks)
            parts, total, width = dD_parts, dD, heads * headdim
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, chunks, ROWS, num_stages=3):
        inside = (start + row < chunks)[:, None] & (column < width)[None, :]
        found += tl.load(parts + (start + row).to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(total + column, tl.sum(found, 0), mask=column < width)
