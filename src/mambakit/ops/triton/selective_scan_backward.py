"""The backward kernels of the selective scan; `mambakit.ops.triton.selective_scan` says how they fit together.

With r_t the gradient of the state before step t, dy the gradient of y before the gate:

    g_t = C_t dy_t + r_{t+1}      the gradient of the state after step t
    r_t = a_t g_t                 a_t = exp(dt_t A)
    dA += dt_t r_t h_{t-1},  ddt_t = sum_n A r_t h_{t-1} + u_t sum_n g_t B_t,  du_t = dt_t sum_n g_t B_t + D dy_t
    dB_t = sum over channels of g_t dt_t u_t,  dC_t = sum over channels of dy_t h_t
"""

# Triton compiles tuples that grow by +.
# mypy: disable-error-code="misc"

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.segments import locate
from mambakit.ops.triton.selective_scan_forward import aligned, channels_of
from mambakit.ops.triton.selective_scan_steps import (
    LN_2,
    LOG2_E,
    columns,
    decay_rates,
    fold,
    numbers,
    row,
    sigmoid,
    step_size,
    zeros,
)
from mambakit.ops.triton.selective_scan_steps import rows as rows_of

LANES = tl.constexpr(32)
_RUN_TIME_SIZES = ["length", "size", "each", "blocks", "slots", "delta_batch", "grad_batch", "z_batch", "u_batch"]


@Kernel
@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def segment_gradients(
    delta, A, C, z, delta_bias, grad_y, carries, table, length, dim, share, size, each, blocks,
    delta_batch, delta_row, z_batch, z_row, grad_batch, grad_row,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, UNROLL: tl.constexpr,
    PACKS: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, from none after it, and the sum of its dt: `carries` (segments,
    N + 1, dim). The first segment of a sequence is left out, for nothing precedes it."""
    segment = tl.program_id(0) // blocks
    batch, _, start, end, begin, _ = locate(segment, table, length, size, each, PACKED)
    if (start < end) & (begin < start):
        group, channel, present = channels_of(tl.program_id(0) % blocks, blocks, share, GROUPS, BLOCK, FULL)
        bias = tl.load(delta_bias + channel) if BIAS else 0.0
        rates = decay_rates(A, channel, N)
        r = zeros(N, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        count = (end - start).to(tl.int32)  # steps are counted from the segment's first on
        delta_at = delta + aligned(batch * delta_batch, FULL) + start * delta_row + channel
        if GATE:
            z_at = z + aligned(batch * z_batch, FULL) + start * z_row + channel
        grad_at = grad_y + aligned(batch * grad_batch, FULL) + start * grad_row + channel
        C_at = C + ((batch * length + start) * GROUPS + group) * N
        next_delta = columns(delta_at, delta_row, count - 1, 0, UNROLL, -1)
        next_grad = columns(grad_at, grad_row, count - 1, 0, UNROLL, -1)
        next_z = ()
        if GATE:
            next_z = columns(z_at, z_row, count - 1, 0, UNROLL, -1)
        next_C = rows_of(C_at, GROUPS * N, count - 1, 0, N, PACKS, UNROLL, -1)
        for done in range(0, count, UNROLL):
            first = count - 1 - done
            now_delta, now_grad, now_z, now_C = next_delta, next_grad, next_z, next_C
            next_delta = columns(delta_at, delta_row, first - UNROLL, 0, UNROLL, -1)
            next_grad = columns(grad_at, grad_row, first - UNROLL, 0, UNROLL, -1)
            if GATE:
                next_z = columns(z_at, z_row, first - UNROLL, 0, UNROLL, -1)
            next_C = rows_of(C_at, GROUPS * N, first - UNROLL, 0, N, PACKS, UNROLL, -1)
            for i in tl.static_range(UNROLL):
                there = first - i >= 0
                dt = tl.where(there, step_size(now_delta[i], bias, SOFTPLUS), 0.0)
                dy = tl.where(there, now_grad[i].to(tl.float32), 0.0)
                if GATE:
                    gate = now_z[i].to(tl.float32)
                    dy *= gate * sigmoid(gate)
                c = numbers(now_C, i * (N // PACKS), N, PACKS, C.dtype.element_ty)
                total += dt
                before = ()
                for n in tl.static_range(N):
                    before = before + (tl.exp2(dt * rates[n]) * (dy * c[n] + r[n]),)
                r = before
        at = carries + segment.to(tl.int64) * (N + 1) * dim + channel
        for n in tl.static_range(N):
            tl.store(at + n * dim, r[n], mask=present)
        tl.store(at + N * dim, total, mask=present)


@Kernel
@triton.jit(do_not_specialize=["pieces", "length", "size", "each"])
def arrange(
    A, B, C, rates, rows, table, pieces, dim, length, size, each,
    N: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """What `gradients` reads again and again, in the order in which it does: `rates` (N, dim), of A, and by `pieces`, a
    segment of one group each, `rows` float32 (slots, GROUPS, N, STEPS, 2), of B and C, nought past the end of a
    sequence."""
    program = tl.program_id(0)
    n = tl.arange(0, PADDED)[:, None]
    if program >= pieces:
        channel = (program - pieces) * BLOCK + tl.arange(0, BLOCK)[None, :]
        there = (n < N) & (channel < dim)
        tl.store(rates + n * dim + channel, tl.load(A + channel * N + n, mask=there, other=0.0) * LOG2_E, mask=there)
    else:
        group = program % GROUPS
        batch, sequence, start, end, _, _ = locate(program // GROUPS, table, length, size, each, PACKED)
        i = tl.arange(0, STEPS)[None, :]
        for block in range(start, end, STEPS):
            slot = (batch * length + block) // STEPS + sequence
            there = (block + i < end) & (n < N)
            source = ((batch * length + block + i) * GROUPS + group) * N + n
            target = rows + (((slot * GROUPS + group) * N + n) * STEPS + i) * 2
            tl.store(target, tl.load(B + source, mask=there, other=0.0).to(tl.float32), mask=n < N)
            tl.store(target + 1, tl.load(C + source, mask=there, other=0.0).to(tl.float32), mask=n < N)


@Kernel
@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def gradients(
    u, delta, rates, D, z, delta_bias, rows, kept, grad_y, carries, outer,
    du, ddelta, dz, sums, dBC, dinitial, table, length, dim, share, size, each, slots, blocks,
    u_batch, u_row, delta_batch, delta_row, z_batch, z_row, grad_batch, grad_row,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, STEPS: tl.constexpr,
    AHEAD: tl.constexpr, WHOLE: tl.constexpr, OUTER: tl.constexpr, INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Every gradient over one segment, by blocks of STEPS steps from its end. A lane has BLOCK / LANES channels.

    In a block one state after another: its values at all steps and its decays are in registers, forwards from the kept
    state and then backwards; only the sums over states live on for each step. dB and dC of STEPS steps are 2 STEPS
    values in each lane, and are summed over the lanes into one value a lane: `dBC` (blocks, slots, N, LANES), to be
    added up over the blocks. `sums` (segments, N + 2, dim), of dA, dD and dbias, are to be added up over the segments.
    """
    PAIR: tl.constexpr = BLOCK // LANES
    segment = tl.program_id(0) // blocks
    batch, sequence, start, end, begin, _ = locate(segment, table, length, size, each, PACKED)
    block_of_channels = tl.program_id(0) % blocks
    group = block_of_channels // (blocks // GROUPS)
    within = (block_of_channels % (blocks // GROUPS)) * BLOCK + tl.arange(0, LANES) * PAIR
    lane = tl.arange(0, LANES)
    segment = segment.to(tl.int64)
    channel, beside, present, bias, skip = (), (), (), (), ()
    for p in tl.static_range(PAIR):
        channel = channel + (group * share + (within + p if FULL else tl.minimum(within + p, share - 1)),)
        beside = beside + (p if FULL else channel[p] - channel[0],)
        present = present + (within + p < share,)
        bias = bias + (tl.load(delta_bias + channel[p]) if BIAS else tl.zeros([LANES], tl.float32),)
        skip = skip + (tl.load(D + channel[p]) if SKIP else tl.zeros([LANES], tl.float32),)
    carries_at = carries + segment * (N + 1) * dim
    sums_at = sums + segment * (N + 2) * dim
    for p in tl.static_range(PAIR):
        for n in range(N):
            tl.store(sums_at + n * dim + channel[p], tl.zeros([LANES], tl.float32), mask=present[p])
            if WHOLE:
                r = tl.zeros([LANES], tl.float32)
                if OUTER:
                    r = tl.load(outer + (sequence * dim + channel[p]) * N + n, mask=present[p], other=0.0)
                tl.store(carries_at + n * dim + channel[p], r, mask=present[p])
    along_D = zeros(PAIR, LANES)
    along_bias = zeros(PAIR, LANES)
    u_at = u + aligned(batch * u_batch, FULL) + channel[0]
    delta_at = delta + aligned(batch * delta_batch, FULL) + channel[0]
    if GATE:
        z_at = z + aligned(batch * z_batch, FULL) + channel[0]
    grad_at = grad_y + aligned(batch * grad_batch, FULL) + channel[0]
    row_0 = batch * length
    count = (end - start + STEPS - 1) // STEPS
    for done in range(count):
        block = start + (count - 1 - done) * STEPS
        slot = (row_0 + block) // STEPS + sequence
        left = (end - 1 - block).to(tl.int32)
        u_first = u_at + block * u_row
        delta_first = delta_at + block * delta_row
        grad_first = grad_at + block * grad_row
        if GATE:
            z_first = z_at + block * z_row
        dt, dtu, dy, opening, slope = (), (), (), (), ()
        for p in tl.static_range(PAIR):
            for i in tl.static_range(STEPS):
                ahead = tl.minimum(i, left)
                there = present[p] & (i <= left)
                raw = tl.load(delta_first + ahead * delta_row + beside[p])
                dt_i = tl.where(there, step_size(raw, bias[p], SOFTPLUS), 0.0)
                if SOFTPLUS:
                    slope = slope + (sigmoid(raw.to(tl.float32) + bias[p]),)
                dy_i = tl.where(there, tl.load(grad_first + ahead * grad_row + beside[p]).to(tl.float32), 0.0)
                if GATE:
                    gate = tl.load(z_first + ahead * z_row + beside[p]).to(tl.float32)
                    on = sigmoid(gate)
                    opening = opening + (dy_i * on * (1.0 + gate * (1.0 - on)),)
                    dy_i *= gate * on
                dt = dt + (dt_i,)
                dtu = dtu + (dt_i * tl.load(u_first + ahead * u_row + beside[p]).to(tl.float32),)
                dy = dy + (dy_i,)
        y = zeros(PAIR * STEPS, LANES)
        along_B = zeros(PAIR * STEPS, LANES)
        through_A = zeros(PAIR * STEPS, LANES)
        rows_at = rows + (slot * GROUPS + group) * (N * STEPS * 2)
        kept_at = kept + slot * N * dim
        next_pairs = row(rows_at, 2 * STEPS, 2)
        later = _of_states(rates, kept_at, carries_at, sums_at, 0, dim, channel, present, N, AHEAD, PAIR)
        for first in range(0, N, AHEAD):
            now = later
            later = _of_states(
                rates, kept_at, carries_at, sums_at, first + AHEAD, dim, channel, present, N, AHEAD, PAIR
            )  # fmt: skip
            for k in tl.static_range(AHEAD):
                n = first + k
                pairs = next_pairs
                next_pairs = row(rows_at + tl.minimum(n + 1, N - 1) * (2 * STEPS), 2 * STEPS, 2)
                b, c = (), ()
                for i in tl.static_range(STEPS):
                    b = b + (pairs[i].to(tl.int32).to(tl.float32, bitcast=True),)
                    c = c + ((pairs[i] >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
                y_n, along_B_n, through_A_n, for_B, for_C = (), (), (), (), ()
                for p in tl.static_range(PAIR):
                    y_p, along_B_p, through_A_p, r, along_A, terms_B, terms_C = _one_state(
                        _steps_of(dt, p, STEPS), _steps_of(dtu, p, STEPS), _steps_of(dy, p, STEPS),
                        _steps_of(y, p, STEPS), _steps_of(along_B, p, STEPS), _steps_of(through_A, p, STEPS),
                        now[4 * (k * PAIR + p)], now[4 * (k * PAIR + p) + 1], now[4 * (k * PAIR + p) + 2],
                        now[4 * (k * PAIR + p) + 3], b, c, STEPS, GATE,
                    )  # fmt: skip
                    y_n, along_B_n, through_A_n = y_n + y_p, along_B_n + along_B_p, through_A_n + through_A_p
                    for_B = terms_B if p == 0 else _added(for_B, terms_B, STEPS)
                    for_C = terms_C if p == 0 else _added(for_C, terms_C, STEPS)
                    tl.store(carries_at + n * dim + channel[p], r, mask=present[p])
                    tl.store(sums_at + n * dim + channel[p], along_A, mask=present[p])
                y, along_B, through_A = y_n, along_B_n, through_A_n
                at = dBC + ((block_of_channels.to(tl.int64) * slots + slot) * N + n) * (2 * STEPS) + lane
                tl.store(at, _over_lanes(for_B, for_C, lane, STEPS), mask=lane < 2 * STEPS)
        target = (row_0 + block) * dim + channel[0]
        on_D, on_bias = (), ()
        for p in tl.static_range(PAIR):
            total_D, total_bias = along_D[p], along_bias[p]
            for i in tl.static_range(STEPS):
                # The row again, found in another way: the compiler would keep the addresses in registers meanwhile.
                ahead = left - tl.maximum(left - i, 0)
                there = left >= i
                at = target + ahead * dim + beside[p]
                x = tl.load(u_first + ahead * u_row + beside[p]).to(tl.float32)
                ddt = through_A[p * STEPS + i] * LN_2 + along_B[p * STEPS + i] * x
                if SOFTPLUS:
                    ddt *= slope[p * STEPS + i]
                ddt = tl.where(there, ddt, 0.0)
                tl.store(ddelta + at, ddt.to(ddelta.dtype.element_ty), mask=present[p] & there)
                total_bias += ddt
                dx = along_B[p * STEPS + i] * dt[p * STEPS + i] + skip[p] * dy[p * STEPS + i]
                tl.store(du + at, dx.to(du.dtype.element_ty), mask=present[p] & there)
                total_D += dy[p * STEPS + i] * x
                if GATE:
                    dgate = opening[p * STEPS + i] * (y[p * STEPS + i] + skip[p] * x)
                    tl.store(dz + at, dgate.to(dz.dtype.element_ty), mask=present[p] & there)
            on_D, on_bias = on_D + (total_D,), on_bias + (total_bias,)
        along_D, along_bias = on_D, on_bias
    for p in tl.static_range(PAIR):
        if INITIAL:
            if (start == begin) & (start < end):
                for n in range(N):
                    r = tl.load(carries_at + n * dim + channel[p], mask=present[p], other=0.0)
                    tl.store(dinitial + (sequence * dim + channel[p]) * N + n, r, mask=present[p])
        if SKIP:
            tl.store(sums_at + N * dim + channel[p], along_D[p], mask=present[p])
        if BIAS:
            tl.store(sums_at + (N + 1) * dim + channel[p], along_bias[p], mask=present[p])


@triton.jit
def _one_state(
    dt, dtu, dy, y, along_B, through_A, rate, h_0, r, along_A, b, c, STEPS: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """One state of a channel over STEPS steps, forwards from h_0 and then backwards from r: the sums over states and
    over steps with what it adds, r before the steps, and what it adds to dB and dC at each."""
    a, h, y_n = (), (h_0,), ()
    for i in tl.static_range(STEPS):
        a = a + (tl.exp2(dt[i] * rate),)
        h = h + (a[i] * h[i] + dtu[i] * b[i],)
        y_n = y_n + (y[i] + h[i + 1] * c[i] if GATE else y[i],)
    along_B_n, through_A_n, terms_B, terms_C = (), (), (), ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        g = dy[i] * c[i] + r
        terms_B = (g * dtu[i],) + terms_B
        terms_C = (dy[i] * h[i + 1],) + terms_C
        along_B_n = (along_B[i] + g * b[i],) + along_B_n
        r = a[i] * g
        rh = r * h[i]
        along_A += dt[i] * rh
        through_A_n = (through_A[i] + rate * rh,) + through_A_n
    return y_n, along_B_n, through_A_n, r, along_A, terms_B, terms_C


@triton.jit
def _steps_of(values, channel: tl.constexpr, STEPS: tl.constexpr):
    """Of STEPS values of one channel after another, those of the one."""
    found = ()
    for i in tl.static_range(STEPS):
        found = found + (values[channel * STEPS + i],)
    return found


@triton.jit
def _added(x, y, STEPS: tl.constexpr):
    found = ()
    for i in tl.static_range(STEPS):
        found = found + (x[i] + y[i],)
    return found


@Kernel
@triton.jit(do_not_specialize=["length", "size", "each", "slots", "blocks", "pieces"])
def sum_over_channels(
    dBC, dB, dC, table, length, size, each, slots, blocks, pieces,
    N: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, VALUES: tl.constexpr, TOGETHER: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Add `dBC` up over the blocks of channels of each group, always in one order, into dB and dC."""
    group = tl.program_id(0) % GROUPS
    piece = (tl.program_id(0) // GROUPS) % pieces
    segment = tl.program_id(0) // GROUPS // pieces
    batch, sequence, start, end, _, _ = locate(segment, table, length, size, each, PACKED)
    block = start + piece * STEPS
    if block < end:
        slot = (batch * length + block) // STEPS + sequence
        per_group = blocks // GROUPS
        value = tl.arange(0, VALUES)
        which, i, n = value % 2, (value // 2) % STEPS, value // (2 * STEPS)
        there = n < N
        at = dBC + ((group * per_group).to(tl.int64) * slots + slot) * (N * 2 * STEPS) + value[None, :]
        total = tl.zeros([VALUES], tl.float32)
        for first in range(0, per_group, TOGETHER):
            k = first + tl.arange(0, TOGETHER)
            some = tl.load(
                at + k[:, None].to(tl.int64) * slots * (N * 2 * STEPS),
                mask=there[None, :] & (k < per_group)[:, None],
                other=0.0,
            )
            total += tl.sum(some, axis=0)
        there &= block + i < end
        target = ((batch * length + block + i) * GROUPS + group) * N + n
        tl.store(dB + target, total.to(dB.dtype.element_ty), mask=there & (which == 0))
        tl.store(dC + target, total.to(dC.dtype.element_ty), mask=there & (which == 1))


@Kernel
@triton.jit(do_not_specialize=["count"])
def sum_over_segments(
    sums, dA, dD, dbias, count, dim, N: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr
):  # fmt: skip
    """Add `sums` (count, N + 2, dim) up over the segments, always in one order, into dA (dim, N), dD and dbias."""
    n = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([TOGETHER, BLOCK], tl.float32)
    for first in range(0, count, TOGETHER):
        segment = first + tl.arange(0, TOGETHER)
        at = (segment[:, None].to(tl.int64) * (N + 2) + n) * dim + channel[None, :]
        total += tl.load(sums + at, mask=(segment < count)[:, None] & (channel < dim)[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if n < N:
        tl.store(dA + channel * N + n, result, mask=channel < dim)
    elif n == N:
        if dD is not None:
            tl.store(dD + channel, result, mask=channel < dim)
    elif dbias is not None:
        tl.store(dbias + channel, result, mask=channel < dim)


@triton.jit
def _of_states(
    rates, kept_at, carries_at, sums_at, first, dim, channel, present,
    N: tl.constexpr, AHEAD: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """The rate, the kept state, r and dA so far of AHEAD states from `first` on, of every channel of the lane, loaded
    before they are needed."""
    found = ()
    for k in tl.static_range(AHEAD):
        n = tl.minimum(first + k, N - 1) * dim
        for p in tl.static_range(PAIR):
            found = found + (tl.load(rates + n + channel[p]), tl.load(kept_at + n + channel[p]))
            found = found + (tl.load(carries_at + n + channel[p], mask=present[p], other=0.0),)
            found = found + (tl.load(sums_at + n + channel[p]),)
    return found


@triton.jit
def _over_lanes(for_B, for_C, lane, STEPS: tl.constexpr):
    """In lane 2 i + (0 for dB, 1 for dC), the sum over the lanes of the terms of step i."""
    sums = ()
    for i in tl.static_range(STEPS):
        sums = sums + (fold(for_B[i], for_C[i], lane, 1),)
    for level in tl.static_range(4):
        if (STEPS >> level) > 1:
            folded = ()
            for i in tl.static_range(STEPS >> (level + 1)):
                folded = folded + (fold(sums[2 * i], sums[2 * i + 1], lane, 2 << level),)
            sums = folded
        else:
            sums = (sums[0] + tl.gather(sums[0], lane ^ (2 << level), 0),)
    return sums[0]
