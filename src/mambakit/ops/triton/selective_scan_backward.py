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
@triton.jit(do_not_specialize=["pieces", "length", "size", "each", "segments"])
def arrange(
    A, B, C, rates, rows, table, segments, pieces, dim, length, size, each,
    N: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """What `gradients` reads again and again, in the order in which it does: `rates` (N, dim), of A, and by `pieces` of
    each segment, STEPS steps of one group, `rows` float32 (slots, GROUPS, N, STEPS, 2), of B and C, nought past the end
    of a sequence."""
    program = tl.program_id(0)
    n = tl.arange(0, PADDED)[:, None]
    if program >= segments * pieces * GROUPS:
        channel = (program - segments * pieces * GROUPS) * BLOCK + tl.arange(0, BLOCK)[None, :]
        there = (n < N) & (channel < dim)
        tl.store(rates + n * dim + channel, tl.load(A + channel * N + n, mask=there, other=0.0) * LOG2_E, mask=there)
    else:
        group = program % GROUPS
        segment = program // GROUPS // pieces
        batch, sequence, start, end, _, _ = locate(segment, table, length, size, each, PACKED)
        block = start + (program // GROUPS % pieces) * STEPS
        if block < end:
            i = tl.arange(0, STEPS)[None, :]
            slot = (batch * length + block) // STEPS + sequence
            there = (block + i < end) & (n < N)
            source = ((batch * length + block + i) * GROUPS + group) * N + n
            target = rows + (((slot * GROUPS + group) * N + n) * STEPS + i) * 2
            b = tl.load(B + source, mask=there, other=0.0).to(tl.float32)
            c = tl.load(C + source, mask=there, other=0.0).to(tl.float32)
            tl.store(target, b, mask=n < N)
            tl.store(target + 1, c, mask=n < N)


@Kernel
@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def gradients(
    u, delta, rates, D, z, delta_bias, rows, kept, grad_y, carries, outer,
    du, ddelta, dz, sums, dBC, dinitial, table, length, dim, share, size, each, slots, blocks,
    u_batch, u_row, delta_batch, delta_row, z_batch, z_row, grad_batch, grad_row,
    N: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, STEPS: tl.constexpr,
    EVEN: tl.constexpr, TOGETHER: tl.constexpr, FETCH: tl.constexpr, WHOLE: tl.constexpr, OUTER: tl.constexpr,
    INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Every gradient over one segment, by blocks of STEPS steps from its end. A lane has BLOCK / LANES channels.

    In a block one state after another: its values at all steps and its decays are in registers, forwards from the kept
    state and then backwards; only the sums over states live on for each step. dB and dC of STEPS steps are 2 STEPS
    values in each lane, and are summed over the lanes into one value a lane: `dBC` (blocks, slots, N, LANES), to be
    added up over the blocks. `sums` (segments, N + 2, dim), of dA, dD and dbias, are to be added up over the segments.

    What a state needs is loaded during the state before it. With FETCH (FULL alone), that and what a block begins with
    are asked for a block ahead and come from the second-level cache, and with 2 what states need from the first. EVEN:
    no block reaches past the end. TOGETHER states, a divisor of N, make a round of the loop: with two, hardly anything
    that was loaded is copied from register to register. What only the end of a block needs of delta is worked out
    there, for registers are what runs out.
    """
    PAIR: tl.constexpr = BLOCK // LANES
    segment = tl.program_id(0) // blocks
    batch, sequence, start, end, begin, _ = locate(segment, table, length, size, each, PACKED)
    block_of_channels = tl.program_id(0) % blocks
    group = block_of_channels // (blocks // GROUPS)
    first_within = (block_of_channels % (blocks // GROUPS)) * BLOCK
    first_channel = group * share + first_within
    lane = tl.arange(0, LANES)
    beside = lane[:, None] * PAIR + tl.arange(0, PAIR)[None, :]
    present = beside < (BLOCK if FULL else share - first_within)  # FULL: the compiler sees that all are
    segment = segment.to(tl.int64)
    bias = tl.zeros([LANES, PAIR], tl.float32)
    skip = tl.zeros([LANES, PAIR], tl.float32)
    if BIAS:
        bias = tl.load(delta_bias + first_channel + beside, mask=present, other=0.0)
    if SKIP:
        skip = tl.load(D + first_channel + beside, mask=present, other=0.0)
    rates_at = rates + first_channel
    carries_at = carries + segment * (N + 1) * dim + first_channel
    sums_at = sums + segment * (N + 2) * dim + first_channel
    for n in range(N):
        tl.store(sums_at + n * dim + beside, tl.zeros([LANES, PAIR], tl.float32), mask=present)
        if WHOLE:
            r = tl.zeros([LANES, PAIR], tl.float32)
            if OUTER:
                r = tl.load(outer + (sequence * dim + first_channel + beside) * N + n, mask=present, other=0.0)
            tl.store(carries_at + n * dim + beside, r, mask=present)
    along_D = tl.zeros([LANES, PAIR], tl.float32)
    along_bias = tl.zeros([LANES, PAIR], tl.float32)
    u_at = u + aligned(batch * u_batch, FULL) + first_channel
    delta_at = delta + aligned(batch * delta_batch, FULL) + first_channel
    z_at = z + aligned(batch * z_batch, FULL) + first_channel if GATE else u_at
    grad_at = grad_y + aligned(batch * grad_batch, FULL) + first_channel
    row_0 = batch * length
    count = (end - start + STEPS - 1) // STEPS
    for done in range(count):
        block = start + (count - 1 - done) * STEPS
        slot = (row_0 + block) // STEPS + sequence
        left = STEPS - 1 if EVEN else (end - 1 - block).to(tl.int32)
        u_first = u_at + block * u_row
        delta_first = delta_at + block * delta_row
        grad_first = grad_at + block * grad_row
        z_first = z_at + block * z_row if GATE else u_first
        if FETCH > 1:
            _fetch(kept + slot * N * dim + first_channel, dim, N, BLOCK, 1)
            _fetch(rows + (slot * GROUPS + group) * (N * STEPS * 2), BLOCK, N * STEPS * 2 // BLOCK, BLOCK, 1)
        if FETCH:
            if block > start:
                _fetch(kept + (slot - 1) * N * dim + first_channel, dim, N, BLOCK, 2)
                _fetch(u_first - STEPS * u_row, u_row, STEPS, BLOCK, 2)
                _fetch(delta_first - STEPS * delta_row, delta_row, STEPS, BLOCK, 2)
                _fetch(grad_first - STEPS * grad_row, grad_row, STEPS, BLOCK, 2)
                if GATE:
                    _fetch(z_first - STEPS * z_row, z_row, STEPS, BLOCK, 2)
        dt, dtu, dy, opening = _steps_of_block(
            u_first + beside, delta_first + beside, grad_first + beside, z_first + beside, u_row, delta_row, grad_row,
            z_row, bias, left, present, STEPS, SOFTPLUS, GATE,
        )  # fmt: skip
        y = _zeros(STEPS, PAIR)
        along_B = _zeros(STEPS, PAIR)
        through_A = _zeros(STEPS, PAIR)
        rows_at = rows + (slot * GROUPS + group) * (N * STEPS * 2)
        kept_at = kept + slot * N * dim + first_channel
        dBC_at = dBC + (block_of_channels.to(tl.int64) * slots + slot) * (N * 2 * STEPS)
        later = _of_state(rates_at, kept_at, carries_at, sums_at, rows_at, 0, dim, beside, present, STEPS)
        for first in range(0, N, TOGETHER):
            for k in tl.static_range(TOGETHER):
                n = first + k
                now = later
                later = _of_state(
                    rates_at, kept_at, carries_at, sums_at, rows_at, tl.minimum(n + 1, N - 1), dim, beside, present,
                    STEPS,
                )  # fmt: skip
                b, c = (), ()
                for i in tl.static_range(STEPS):
                    b = b + (now[4 + i].to(tl.int32).to(tl.float32, bitcast=True),)
                    c = c + ((now[4 + i] >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
                y, along_B, through_A, r, along_A, terms_B, terms_C = _one_state(
                    dt, dtu, dy, y, along_B, through_A, now[0], now[1], now[2], now[3], b, c, STEPS, GATE
                )
                tl.store(carries_at + n * dim + beside, r, mask=present)
                tl.store(sums_at + n * dim + beside, along_A, mask=present)
                at = dBC_at + n * (2 * STEPS) + lane
                tl.store(at, _over_lanes(terms_B, terms_C, lane, STEPS), mask=lane < 2 * STEPS)
        # Backwards, for the compiler would keep the addresses of the way forwards in registers until now.
        final = tl.minimum(STEPS - 1, left)
        u_now = u_first + final * u_row + beside
        delta_now = delta_first + final * delta_row + beside
        target = (row_0 + block + final) * dim + first_channel + beside
        du_now, ddelta_now = du + target, ddelta + target
        dz_now = dz + target if GATE else du_now
        along_D, along_bias = _store_steps(
            u_now, delta_now, du_now, ddelta_now, dz_now, u_row, delta_row, dim, bias, skip, dt, dy, opening, y,
            along_B, through_A, along_D, along_bias, left, present, STEPS, SOFTPLUS, GATE,
        )  # fmt: skip
    if INITIAL:
        if (start == begin) & (start < end):
            for n in range(N):
                r = tl.load(carries_at + n * dim + beside, mask=present, other=0.0)
                tl.store(dinitial + (sequence * dim + first_channel + beside) * N + n, r, mask=present)
    if SKIP:
        tl.store(sums_at + N * dim + beside, along_D, mask=present)
    if BIAS:
        tl.store(sums_at + (N + 1) * dim + beside, along_bias, mask=present)


@triton.jit
def _steps_of_block(
    u_now, delta_now, grad_now, z_now, u_row, delta_row, grad_row, z_row, bias, left, present,
    STEPS: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Of each step of a block: dt, dt u, the gradient of y before the gate, and what that of the gate has beside y.

    `left` is the last step that is there; those after it have neither dt nor a gradient.
    """
    dt, dtu, dy, opening = (), (), (), ()
    for i in tl.static_range(STEPS):
        there = i <= left
        more = tl.where(i < left, 1, 0)  # a row past the end is the last one again
        raw = tl.load(delta_now, mask=present, other=0.0)
        delta_now += more * delta_row
        dt_i = tl.where(there, step_size(raw, bias, SOFTPLUS), 0.0)
        dy_i = tl.where(there, tl.load(grad_now, mask=present, other=0.0).to(tl.float32), 0.0)
        grad_now += more * grad_row
        if GATE:
            gate = tl.load(z_now, mask=present, other=0.0).to(tl.float32)
            z_now += more * z_row
            on = sigmoid(gate)
            opening = opening + (dy_i * on * (1.0 + gate * (1.0 - on)),)
            dy_i *= gate * on
        dt = dt + (dt_i,)
        dtu = dtu + (dt_i * tl.load(u_now, mask=present, other=0.0).to(tl.float32),)
        u_now += more * u_row
        dy = dy + (dy_i,)
    return dt, dtu, dy, opening


@triton.jit
def _store_steps(
    u_now, delta_now, du_now, ddelta_now, dz_now, u_row, delta_row, dim, bias, skip, dt, dy, opening, y,
    along_B, through_A, along_D, along_bias, left, present,
    STEPS: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of u, delta and z of a block from its last step on, from the sums over states; what they add
    to those of D and the bias."""
    for i in tl.static_range(STEPS - 1, -1, -1):
        there = i <= left
        less = tl.where(there, 1, 0)
        x = tl.load(u_now, mask=present, other=0.0).to(tl.float32)
        u_now -= less * u_row
        ddt = through_A[i] * LN_2 + along_B[i] * x
        if SOFTPLUS:
            ddt *= sigmoid(tl.load(delta_now, mask=present, other=0.0).to(tl.float32) + bias)
            delta_now -= less * delta_row
        ddt = tl.where(there, ddt, 0.0)
        tl.store(ddelta_now, ddt.to(ddelta_now.dtype.element_ty), mask=present & there)
        ddelta_now -= less * dim
        along_bias += ddt
        dx = along_B[i] * dt[i] + skip * dy[i]
        tl.store(du_now, dx.to(du_now.dtype.element_ty), mask=present & there)
        du_now -= less * dim
        along_D += dy[i] * x
        if GATE:
            dgate = opening[i] * (y[i] + skip * x)
            tl.store(dz_now, dgate.to(dz_now.dtype.element_ty), mask=present & there)
            dz_now -= less * dim
    return along_D, along_bias


@triton.jit
def _zeros(COUNT: tl.constexpr, PAIR: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([LANES, PAIR], tl.float32),)
    return found


@triton.jit
def _one_state(
    dt, dtu, dy, y, along_B, through_A, rate, h_0, r, along_A, b, c, STEPS: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """One state over STEPS steps, forwards from h_0 and then backwards from r: the sums over states and over steps with
    what it adds, r before the steps, and what the channels of a lane add to dB and dC at each."""
    a, h, y_n = (), (h_0,), ()
    for i in tl.static_range(STEPS):
        a = a + (tl.exp2(dt[i] * rate),)
        h = h + (a[i] * h[i] + dtu[i] * b[i],)
        y_n = y_n + (y[i] + h[i + 1] * c[i] if GATE else y[i],)
    along_B_n, through_A_n, terms_B, terms_C = (), (), (), ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        g = dy[i] * c[i] + r
        terms_B = (tl.sum(g * dtu[i], axis=1),) + terms_B
        terms_C = (tl.sum(dy[i] * h[i + 1], axis=1),) + terms_C
        along_B_n = (along_B[i] + g * b[i],) + along_B_n
        r = a[i] * g
        rh = r * h[i]
        along_A += dt[i] * rh
        through_A_n = (through_A[i] + rate * rh,) + through_A_n
    return y_n, along_B_n, through_A_n, r, along_A, terms_B, terms_C


@triton.jit
def _of_state(rates_at, kept_at, carries_at, sums_at, rows_at, n, dim, beside, present, STEPS: tl.constexpr):
    """The rate, the kept state, r and dA so far of state n of each channel, and its B and C at each step."""
    found = (tl.load(rates_at + n * dim + beside, mask=present, other=0.0),)
    found = found + (tl.load(kept_at + n * dim + beside, mask=present, other=0.0),)
    found = found + (tl.load(carries_at + n * dim + beside, mask=present, other=0.0),)
    found = found + (tl.load(sums_at + n * dim + beside, mask=present, other=0.0),)
    return found + row(rows_at + n * (2 * STEPS), 2 * STEPS, 2)


@triton.jit
def _fetch(pointer, row_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, LEVEL: tl.constexpr):
    """Ask for ROWS rows of BLOCK numbers, to be in the cache of that level when they are loaded."""
    SECTOR: tl.constexpr = 32 // (pointer.dtype.element_ty.primitive_bitwidth // 8)  # numbers that come together
    EACH: tl.constexpr = BLOCK // SECTOR
    PADDED: tl.constexpr = triton.next_power_of_2(ROWS) * EACH
    ASKING: tl.constexpr = "prefetch.global.L1 [$1];" if LEVEL == 1 else "prefetch.global.L2 [$1];"
    place = tl.minimum(tl.arange(0, PADDED), ROWS * EACH - 1)
    at = pointer + (place // EACH) * row_stride + (place % EACH) * SECTOR
    tl.inline_asm_elementwise(
        ASKING + " mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


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
