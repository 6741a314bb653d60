"""The forward kernels of the selective scan; `mambakit.ops.triton.selective_scan` says how they fit together.

A program is BLOCK channels times one segment of the length, and each state of a channel is an accumulator of its own,
so that no sum over states crosses lanes. The activations of AHEAD steps and B and C of NEAR steps are under way at any
time; what does not fill AHEAD steps at the end of a segment is read as it is needed, and nothing out of bounds ever.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.segments import locate
from mambakit.ops.triton.selective_scan_steps import (
    LOG2_E,
    columns,
    decay_rates,
    numbers,
    row,
    rows,
    sigmoid,
    step_size,
    zeros,
)

_RUN_TIME_SIZES = ["length", "size", "each", "blocks", "u_batch", "delta_batch", "z_batch"]


@Kernel
@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def segment_states(
    u, delta, A, B, delta_bias, states, table, length, dim, share, size, each, blocks,
    u_batch, u_row, delta_batch, delta_row,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr, NEAR: tl.constexpr, PACKS: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The state that a segment, from a state of zero, ends in, and the sum of its dt: `states` (segments, N + 1, dim).
    The last segment of a sequence is left out, for nothing follows it."""
    segment = tl.program_id(0) // blocks
    batch, _, start, end, _, last = locate(segment, table, length, size, each, PACKED)
    if (start < end) & (end < last):
        group, channel, present = channels_of(tl.program_id(0) % blocks, blocks, share, GROUPS, BLOCK, FULL)
        bias = tl.load(delta_bias + channel) if BIAS else 0.0
        rates = decay_rates(A, channel, N)
        h = zeros(N, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        count = (end - start).to(tl.int32)  # steps are counted from the segment's first on
        u_at = u + aligned(batch * u_batch, FULL) + start * u_row + channel
        delta_at = delta + aligned(batch * delta_batch, FULL) + start * delta_row + channel
        B_at = B + ((batch * length + start) * GROUPS + group) * N
        u_step, delta_step = ROWS[0] if ROWS is not None else u_row, ROWS[1] if ROWS is not None else delta_row
        deltas = columns(delta_at, delta_row, 0, count - 1, AHEAD, 1)
        us = columns(u_at, u_row, 0, count - 1, AHEAD, 1)
        rows_B = rows(B_at, GROUPS * N, 0, count - 1, N, PACKS, NEAR, 1)
        full = count // AHEAD * AHEAD
        for block in range(0, full, AHEAD):
            following = tl.minimum(block + AHEAD, full - AHEAD).to(tl.int64)
            next_delta, next_u = delta_at + following * delta_step, u_at + following * u_step
            now_B, next_B = B_at + tl.cast(block, tl.int64) * (GROUPS * N), B_at + following * (GROUPS * N)
            for i in tl.static_range(AHEAD):  # what is used up makes room, so that nothing under way is ever moved
                dt = step_size(deltas[0], bias, SOFTPLUS)
                dtu = dt * us[0].to(tl.float32)
                b = numbers(rows_B, 0, N, PACKS, B.dtype.element_ty)
                deltas = deltas[1:] + (tl.load(next_delta + i * delta_step),)
                us = us[1:] + (tl.load(next_u + i * u_step),)
                near_B = _near(now_B, next_B, i + NEAR, AHEAD, GROUPS * N)
                rows_B = rows_B[N // PACKS :] + row(near_B, N, PACKS)
                total += dt
                h = _next_states(h, rates, dt, dtu, b, N)
        for t in range(full, count if AHEAD > 1 else full):
            dt = step_size(tl.load(delta_at + tl.cast(t, tl.int64) * delta_step), bias, SOFTPLUS)
            dtu = dt * tl.load(u_at + tl.cast(t, tl.int64) * u_step).to(tl.float32)
            last_B = row(B_at + tl.cast(t, tl.int64) * (GROUPS * N), N, PACKS)
            total += dt
            h = _next_states(h, rates, dt, dtu, numbers(last_B, 0, N, PACKS, B.dtype.element_ty), N)
        at = states + segment.to(tl.int64) * (N + 1) * dim + channel
        for n in tl.static_range(N):
            tl.store(at + n * dim, h[n], mask=present)
        tl.store(at + N * dim, total, mask=present)


@Kernel
@triton.jit(do_not_specialize=["sequences", "each", "blocks"])
def carry(
    states, A, outer, passed, firsts, sequences, dim, each, blocks,
    N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    REVERSE: tl.constexpr, OUTER: tl.constexpr, PASS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Replace what each segment adds by what it starts from: the carry of all segments before it, or, in REVERSE, after
    it. The first starts from `outer` (sequences, dim, N), zero if not OUTER; with PASS, a sequence without a step hands
    that on to `passed`."""
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # n * dim + channel
    present = place < N * dim
    channel, n = place % dim, place // dim
    outside = (sequence * dim + channel) * N + n
    x = tl.load(outer + outside, mask=present, other=0.0) if OUTER else tl.zeros([BLOCK], tl.float32)
    rate = tl.load(A + channel * N + n, mask=present, other=0.0) * LOG2_E
    if PACKED:
        begin, stop = tl.load(firsts + sequence), tl.load(firsts + sequence + 1)
    else:
        begin, stop = sequence * each, (sequence + 1) * each
    if PASS:
        if begin == stop:
            tl.store(passed + outside, x, mask=present)
    count = (stop - begin).to(tl.int32)
    step = sequence * 0 + (N + 1) * dim  # in 64 bits, from a segment to the next
    if REVERSE:
        step = -step
    first = states + (stop - 1 if REVERSE else begin) * (N + 1) * dim
    at = first + place
    total_at = first + N * dim + channel
    now = _of_segments(at, total_at, step, 0, count - 1, present, UNROLL)
    for done in range(0, count, UNROLL):
        later = _of_segments(at, total_at, step, done + UNROLL, count - 1, present, UNROLL)
        for i in tl.static_range(UNROLL):
            tl.store(at + (done + i) * step, x, mask=present & (done + i < count))
            x = tl.exp2(now[2 * i + 1] * rate) * x + now[2 * i]
        now = later


@triton.jit
def _of_segments(at, total_at, step, first, last, present, UNROLL: tl.constexpr):
    """What UNROLL segments from `first` on add, and their sums of dt, loaded before they are needed. The last one adds
    to nobody."""
    found = ()
    for i in tl.static_range(UNROLL):
        there = present & (first + i < last)
        found = found + (tl.load(at + (first + i) * step, mask=there, other=0.0),)
        found = found + (tl.load(total_at + (first + i) * step, mask=there, other=0.0),)
    return found


@Kernel
@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def outputs(
    u, delta, A, B, C, D, z, delta_bias, states, initial, y, final, kept, table, length, dim, share, size, each, blocks,
    u_batch, u_row, delta_batch, delta_row, z_batch, z_row,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr, NEAR: tl.constexpr, PACKS: tl.constexpr, INTERVAL: tl.constexpr, KEEP: tl.constexpr,
    WHOLE: tl.constexpr, INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y of a segment from the state in `states` (segments, N + 1, dim) that it starts in, or, where a segment is the
    WHOLE sequence, the initial one; with KEEP, the state before every INTERVAL-th step of the sequence: `kept` (slots,
    N, dim), slot = row // INTERVAL + sequence; the final state from the last segment."""
    segment = tl.program_id(0) // blocks
    batch, sequence, start, end, _, last = locate(segment, table, length, size, each, PACKED)
    if start < end:
        group, channel, present = channels_of(tl.program_id(0) % blocks, blocks, share, GROUPS, BLOCK, FULL)
        bias = tl.load(delta_bias + channel) if BIAS else 0.0
        skip = tl.load(D + channel) if SKIP else 0.0
        rates = decay_rates(A, channel, N)
        h = ()
        for n in tl.static_range(N):
            if not WHOLE:
                h = h + (tl.load(states + (segment.to(tl.int64) * (N + 1) + n) * dim + channel),)
            elif INITIAL:
                h = h + (tl.load(initial + (sequence * dim + channel) * N + n),)
            else:
                h = h + (tl.zeros([BLOCK], tl.float32),)
        count = (end - start).to(tl.int32)  # steps are counted from the segment's first on
        row_0 = batch * length + start
        u_at = u + aligned(batch * u_batch, FULL) + start * u_row + channel
        delta_at = delta + aligned(batch * delta_batch, FULL) + start * delta_row + channel
        if GATE:
            z_at = z + aligned(batch * z_batch, FULL) + start * z_row + channel
        y_at = y + row_0 * dim + channel
        B_at = B + (row_0 * GROUPS + group) * N
        C_at = C + (row_0 * GROUPS + group) * N
        u_step, delta_step = ROWS[0] if ROWS is not None else u_row, ROWS[1] if ROWS is not None else delta_row
        z_step, y_step = ROWS[2] if ROWS is not None else z_row, ROWS[3] if ROWS is not None else dim
        deltas = columns(delta_at, delta_row, 0, count - 1, AHEAD, 1)
        us = columns(u_at, u_row, 0, count - 1, AHEAD, 1)
        zs = columns(z_at, z_row, 0, count - 1, AHEAD, 1) if GATE else us
        rows_B = rows(B_at, GROUPS * N, 0, count - 1, N, PACKS, NEAR, 1)
        rows_C = rows(C_at, GROUPS * N, 0, count - 1, N, PACKS, NEAR, 1)
        full = count // AHEAD * AHEAD
        for block in range(0, full, AHEAD):
            here = tl.cast(block, tl.int64)
            following = tl.minimum(block + AHEAD, full - AHEAD).to(tl.int64)
            next_delta, next_u = delta_at + following * delta_step, u_at + following * u_step
            next_z = z_at + following * z_step if GATE else next_u
            y_now = y_at + here * y_step
            now_B, next_B = B_at + here * (GROUPS * N), B_at + following * (GROUPS * N)
            now_C, next_C = C_at + here * (GROUPS * N), C_at + following * (GROUPS * N)
            for i in tl.static_range(AHEAD):  # what is used up makes room, so that nothing under way is ever moved
                if KEEP and i % min(INTERVAL, AHEAD & -AHEAD) == 0:
                    if (block + i) % INTERVAL == 0:
                        _keep(kept, h, (row_0 + block + i) // INTERVAL + sequence, channel, y_step, present, N)
                dt = step_size(deltas[0], bias, SOFTPLUS)
                x, gate = us[0].to(tl.float32), zs[0].to(tl.float32)
                b = numbers(rows_B, 0, N, PACKS, B.dtype.element_ty)
                c = numbers(rows_C, 0, N, PACKS, C.dtype.element_ty)
                deltas = deltas[1:] + (tl.load(next_delta + i * delta_step),)
                us = us[1:] + (tl.load(next_u + i * u_step),)
                zs = zs[1:] + (tl.load(next_z + i * z_step),) if GATE else us
                near_B = _near(now_B, next_B, i + NEAR, AHEAD, GROUPS * N)
                near_C = _near(now_C, next_C, i + NEAR, AHEAD, GROUPS * N)
                rows_B = rows_B[N // PACKS :] + row(near_B, N, PACKS)
                rows_C = rows_C[N // PACKS :] + row(near_C, N, PACKS)
                h = _next_states(h, rates, dt, dt * x, b, N)
                out = _output(h, c, skip, x, gate, N, GATE)
                tl.store(y_now + i * y_step, out.to(y.dtype.element_ty), mask=present)
        for t in range(full, count if AHEAD > 1 else full):
            if KEEP:
                if t % INTERVAL == 0:
                    _keep(kept, h, (row_0 + t) // INTERVAL + sequence, channel, y_step, present, N)
            here = tl.cast(t, tl.int64)
            dt = step_size(tl.load(delta_at + here * delta_step), bias, SOFTPLUS)
            x = tl.load(u_at + here * u_step).to(tl.float32)
            gate = tl.load(z_at + here * z_step).to(tl.float32) if GATE else x
            last_B, last_C = row(B_at + here * (GROUPS * N), N, PACKS), row(C_at + here * (GROUPS * N), N, PACKS)
            h = _next_states(h, rates, dt, dt * x, numbers(last_B, 0, N, PACKS, B.dtype.element_ty), N)
            out = _output(h, numbers(last_C, 0, N, PACKS, C.dtype.element_ty), skip, x, gate, N, GATE)
            tl.store(y_at + here * y_step, out.to(y.dtype.element_ty), mask=present)
        if end == last:
            for n in tl.static_range(N):
                tl.store(final + (sequence * dim + channel) * N + n, h[n], mask=present)


@triton.jit
def _near(now, following, STEP: tl.constexpr, AHEAD: tl.constexpr, ROW: tl.constexpr):
    """Where the row of a STEP lies, counted from the first of the AHEAD steps that begin at `now`, after those from
    `following` on."""
    return now + STEP * ROW if STEP < AHEAD else following + (STEP - AHEAD) * ROW


@triton.jit
def _next_states(h, rates, dt, dtu, b, N: tl.constexpr):
    after = ()
    for n in tl.static_range(N):
        after = after + (tl.exp2(dt * rates[n]) * h[n] + dtu * b[n],)
    return after


@triton.jit
def _output(h, c, skip, x, gate, N: tl.constexpr, GATE: tl.constexpr):
    out = skip * x
    for n in tl.static_range(N):
        out += h[n] * c[n]
    if GATE:
        out *= gate * sigmoid(gate)
    return out


@triton.jit
def _keep(kept, h, slot, channel, dim, present, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(kept + slot * N * dim + channel + n * dim, h[n], mask=present)


@triton.jit
def aligned(offset, FULL: tl.constexpr):
    """An offset that is a multiple of 16 where blocks are FULL: the compiler learns it from the multiplication."""
    if FULL:
        return offset // 16 * 16
    else:
        return offset


@triton.jit
def channels_of(block, blocks, share, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """(group, channels clamped to the group's, which of them are there) of a block of channels of one group. In FULL
    blocks all are there, and loads may take several at a time."""
    per_group = blocks // GROUPS
    group = block // per_group
    within = (block % per_group) * BLOCK + tl.arange(0, BLOCK)
    if FULL:
        return group, group * share + within, tl.full([BLOCK], True, tl.int1)
    else:
        return group, group * share + tl.minimum(within, share - 1), within < share
