"""The backward kernels of the selective scan; `mambakit.ops.triton.selective_scan` says how they fit together.

With r_t the gradient of the state before step t, dy the gradient of y before the gate:

    g_t = C_t dy_t + r_{t+1}      the gradient of the state after step t
    r_t = a_t g_t                 a_t = exp(dt_t A)
    dA += dt_t r_t h_{t-1},  ddt_t = sum_n A r_t h_{t-1} + u_t sum_n g_t B_t,  du_t = dt_t sum_n g_t B_t + D dy_t
    dB_t = sum over channels of g_t dt_t u_t,  dC_t = sum over channels of dy_t h_t
"""

import triton
import triton.language as tl

from mambakit.ops.triton.segments import locate
from mambakit.ops.triton.selective_scan_forward import channels_of
from mambakit.ops.triton.selective_scan_steps import (
    LN_2,
    LOG2_E,
    columns,
    decay_rates,
    numbers,
    row,
    sigmoid,
    step_size,
    zeros,
)
from mambakit.ops.triton.selective_scan_steps import rows as rows_of

LANES = tl.constexpr(32)
_RUN_TIME_SIZES = ["length", "size", "each", "blocks", "slots", "delta_batch", "grad_batch", "z_batch", "u_batch"]


@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def segment_gradients(
    delta, A, C, z, delta_bias, grad_y, carries, sums, table, length, dim, share, size, each, blocks,
    delta_batch, delta_row, z_batch, z_row, grad_batch, grad_row,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, PACKS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, from none after it: `carries` (segments, N, dim); and the sum of its
    dt: `sums` (segments, dim). The first segment of a sequence is left out, for nothing precedes it."""
    segment = tl.program_id(0) // blocks
    batch, _, start, end, begin, _ = locate(segment, table, length, size, each, PACKED)
    if (start < end) & (begin < start):
        group, channel, present = channels_of(tl.program_id(0) % blocks, blocks, share, GROUPS, BLOCK)
        bias = tl.load(delta_bias + channel) if BIAS else 0.0
        rates = decay_rates(A, channel, N)
        r = zeros(N, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        delta_at = delta + batch * delta_batch + channel
        if GATE:
            z_at = z + batch * z_batch + channel
        grad_at = grad_y + batch * grad_batch + channel
        C_at = C + (batch * length * GROUPS + group) * N
        next_delta = columns(delta_at, delta_row, end - 1, start, UNROLL, -1)
        next_grad = columns(grad_at, grad_row, end - 1, start, UNROLL, -1)
        next_z = ()
        if GATE:
            next_z = columns(z_at, z_row, end - 1, start, UNROLL, -1)
        next_C = rows_of(C_at, GROUPS * N, end - 1, start, N, PACKS, UNROLL, -1)
        for done in range(0, end - start, UNROLL):
            first = end - 1 - done
            now_delta, now_grad, now_z, now_C = next_delta, next_grad, next_z, next_C
            next_delta = columns(delta_at, delta_row, first - UNROLL, start, UNROLL, -1)
            next_grad = columns(grad_at, grad_row, first - UNROLL, start, UNROLL, -1)
            if GATE:
                next_z = columns(z_at, z_row, first - UNROLL, start, UNROLL, -1)
            next_C = rows_of(C_at, GROUPS * N, first - UNROLL, start, N, PACKS, UNROLL, -1)
            for i in tl.static_range(UNROLL):
                there = first - i >= start
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
        place = segment.to(tl.int64)
        tl.store(sums + place * dim + channel, total, mask=present)
        for n in tl.static_range(N):
            tl.store(carries + (place * N + n) * dim + channel, r[n], mask=present)


@triton.jit(do_not_specialize=["length", "size", "each"])
def interleave(
    B, C, rows, table, length, size, each,
    N: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """B and C in the order in which `gradients` reads them: float32 (slots, GROUPS, N, STEPS, 2), nought past the end
    of a sequence."""
    segment = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    batch, sequence, start, end, _, _ = locate(segment, table, length, size, each, PACKED)
    n = tl.arange(0, PADDED)[:, None]
    i = tl.arange(0, STEPS)[None, :]
    for block in range(start, end, STEPS):
        slot = (batch * length + block) // STEPS + sequence
        there = (block + i < end) & (n < N)
        source = ((batch * length + block + i) * GROUPS + group) * N + n
        target = rows + (((slot * GROUPS + group) * N + n) * STEPS + i) * 2
        tl.store(target, tl.load(B + source, mask=there, other=0.0).to(tl.float32), mask=n < N)
        tl.store(target + 1, tl.load(C + source, mask=there, other=0.0).to(tl.float32), mask=n < N)


@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def gradients(
    u, delta, A, D, z, delta_bias, rows, kept, grad_y, carries, outer,
    du, ddelta, dz, dA, dD, dbias, dBC, dinitial, table, length, dim, share, size, each, slots, blocks,
    u_batch, u_row, delta_batch, delta_row, z_batch, z_row, grad_batch, grad_row,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Every gradient over one segment, by blocks of STEPS steps from its end.

    In a block one state after another: its values at all steps and its decays are in registers, forwards from the kept
    state and then backwards; only the sums over states live on for each step. dB and dC of STEPS steps are 2 STEPS
    values in each lane, and are summed over the lanes into one value a lane: `dBC` (blocks, slots, N, LANES), to be
    added up over the blocks. dA (segments, N, dim), dD and dbias (segments, dim) are to be added up over the segments.
    """
    segment = tl.program_id(0) // blocks
    batch, sequence, start, end, begin, _ = locate(segment, table, length, size, each, PACKED)
    block_of_channels = tl.program_id(0) % blocks
    group, channel, present = channels_of(block_of_channels, blocks, share, GROUPS, BLOCK)
    lane = tl.arange(0, LANES)
    segment = segment.to(tl.int64)
    A_at = A + channel * N
    r_at = carries + segment * N * dim + channel
    dA_at = dA + segment * N * dim + channel
    for n in range(N):
        tl.store(dA_at + n * dim, tl.zeros([BLOCK], tl.float32), mask=present)
        if WHOLE:
            r = tl.load(outer + (sequence * dim + channel) * N + n, mask=present, other=0.0)
            tl.store(r_at + n * dim, r, mask=present)
    bias = tl.load(delta_bias + channel) if BIAS else 0.0
    skip = tl.load(D + channel) if SKIP else 0.0
    along_D = tl.zeros([BLOCK], tl.float32)
    along_bias = tl.zeros([BLOCK], tl.float32)
    u_at = u + batch * u_batch + channel
    delta_at = delta + batch * delta_batch + channel
    if GATE:
        if GATE:
            z_at = z + batch * z_batch + channel
    grad_at = grad_y + batch * grad_batch + channel
    row_0 = batch * length
    count = (end - start + STEPS - 1) // STEPS
    for done in range(count):
        block = start + (count - 1 - done) * STEPS
        slot = (row_0 + block) // STEPS + sequence
        left = (end - 1 - block).to(tl.int32)
        u_first, delta_first, grad_first = (
            u_at + block * u_row,
            delta_at + block * delta_row,
            grad_at + block * grad_row,
        )
        if GATE:
            z_first = z_at + block * z_row
        dt, dtu, dy = (), (), ()
        for i in tl.static_range(STEPS):
            ahead = tl.minimum(i, left)
            there = present & (i <= left)
            dt_i = tl.where(there, step_size(tl.load(delta_first + ahead * delta_row), bias, SOFTPLUS), 0.0)
            dy_i = tl.where(there, tl.load(grad_first + ahead * grad_row).to(tl.float32), 0.0)
            if GATE:
                gate = tl.load(z_first + ahead * z_row).to(tl.float32)
                dy_i *= gate * sigmoid(gate)
            dt = dt + (dt_i,)
            dtu = dtu + (dt_i * tl.load(u_first + ahead * u_row).to(tl.float32),)
            dy = dy + (dy_i,)
        y = zeros(STEPS, BLOCK)
        along_B = zeros(STEPS, BLOCK)
        through_A = zeros(STEPS, BLOCK)
        rows_at = rows + (slot * GROUPS + group) * (N * STEPS * 2)
        kept_at = kept + slot * N * dim + channel
        next_pairs = row(rows_at, 2 * STEPS, 2)
        next_rate, next_h = tl.load(A_at), tl.load(kept_at)
        next_r, next_A = tl.load(r_at, mask=present, other=0.0), tl.load(dA_at)
        for n in range(N):
            pairs, rate, h, r_n, along_A = next_pairs, next_rate * LOG2_E, (next_h,), next_r, next_A
            m = tl.minimum(n + 1, N - 1)
            next_pairs = row(rows_at + m * (2 * STEPS), 2 * STEPS, 2)
            next_rate, next_h = tl.load(A_at + m), tl.load(kept_at + m * dim)
            next_r, next_A = tl.load(r_at + m * dim, mask=present, other=0.0), tl.load(dA_at + m * dim)
            a, b, c, y_n = (), (), (), ()
            for i in tl.static_range(STEPS):
                pair = pairs[i]
                b = b + (pair.to(tl.int32).to(tl.float32, bitcast=True),)
                c = c + ((pair >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
                a = a + (tl.exp2(dt[i] * rate),)
                h = h + (a[i] * h[i] + dtu[i] * b[i],)
                if GATE:
                    y_n = y_n + (y[i] + h[i + 1] * c[i],)
            if GATE:
                y = y_n
            along_B_n, through_A_n, sums = (), (), ()
            for i in tl.static_range(STEPS - 1, -1, -1):
                g = dy[i] * c[i] + r_n
                sums = (_fold(_over_lanes(g * dtu[i], BLOCK), _over_lanes(dy[i] * h[i + 1], BLOCK), lane, 1),) + sums
                along_B_n = (along_B[i] + g * b[i],) + along_B_n
                r_n = a[i] * g
                rh = r_n * h[i]
                along_A += dt[i] * rh
                through_A_n = (through_A[i] + rate * rh,) + through_A_n
            along_B, through_A = along_B_n, through_A_n
            tl.store(r_at + n * dim, r_n, mask=present)
            tl.store(dA_at + n * dim, along_A, mask=present)
            at = dBC + ((block_of_channels.to(tl.int64) * slots + slot) * N + n) * (2 * STEPS) + lane
            tl.store(at, _over_steps(sums, lane, STEPS), mask=lane < 2 * STEPS)
        target = (row_0 + block) * dim + channel
        for i in tl.static_range(STEPS):
            # The row again, found in another way: the compiler would keep the addresses in registers meanwhile.
            ahead = left - tl.maximum(left - i, 0)
            there = left >= i
            at = ahead * dim
            x = tl.load(u_first + ahead * u_row).to(tl.float32)
            ddt = through_A[i] * LN_2 + along_B[i] * x
            if SOFTPLUS:
                ddt *= sigmoid(tl.load(delta_first + ahead * delta_row).to(tl.float32) + bias)
            ddt = tl.where(there, ddt, 0.0)
            tl.store(ddelta + target + at, ddt.to(ddelta.dtype.element_ty), mask=present & there)
            along_bias += ddt
            dx = along_B[i] * dt[i] + skip * dy[i]
            tl.store(du + target + at, dx.to(du.dtype.element_ty), mask=present & there)
            along_D += dy[i] * x
            if GATE:
                gate = tl.load(z_first + ahead * z_row).to(tl.float32)
                on = sigmoid(gate)
                slope = on * (1.0 + gate * (1.0 - on))
                dgate = tl.load(grad_first + ahead * grad_row).to(tl.float32) * (y[i] + skip * x) * slope
                tl.store(dz + target + at, dgate.to(dz.dtype.element_ty), mask=present & there)
    if INITIAL:
        if (start == begin) & (start < end):
            for n in range(N):
                r = tl.load(r_at + n * dim, mask=present, other=0.0)
                tl.store(dinitial + (sequence * dim + channel) * N + n, r, mask=present)
    if SKIP:
        tl.store(dD + segment * dim + channel, along_D, mask=present)
    if BIAS:
        tl.store(dbias + segment * dim + channel, along_bias, mask=present)


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


@triton.jit
def _over_lanes(x, BLOCK: tl.constexpr):
    """x (BLOCK,) with the channels of one lane added up: (LANES,)."""
    return x if BLOCK == LANES else tl.sum(tl.reshape(x, [LANES, BLOCK // LANES]), axis=1)


@triton.jit
def _fold(x, y, lane, BIT: tl.constexpr):
    """Lanes with BIT clear get x of theirs and of the lane across that bit, lanes with it set y: half of the sum over
    lanes of two values, in one exchange."""
    upper = (lane & BIT) != 0
    return tl.where(upper, y, x) + tl.gather(tl.where(upper, x, y), lane ^ BIT, 0)


@triton.jit
def _over_steps(sums, lane, STEPS: tl.constexpr):
    """From one pair a step, folded over bit 0, what lane 2 i + (0 for dB, 1 for dC) holds of step i."""
    for level in tl.static_range(4):
        if (STEPS >> level) > 1:
            folded = ()
            for i in tl.static_range(STEPS >> (level + 1)):
                folded = folded + (_fold(sums[2 * i], sums[2 * i + 1], lane, 2 << level),)
            sums = folded
        else:
            sums = (sums[0] + tl.gather(sums[0], lane ^ (2 << level), 0),)
    return sums[0]
