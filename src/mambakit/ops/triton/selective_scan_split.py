"""The forward kernel of the selective scan for many channels: SPLIT neighbouring lanes share the states of a channel.

Where there are channels enough for every lane of the chip to have a share of one, sequences need not be cut up, and
each exponential is taken once. The lanes of a channel take turns at what belongs to a step and not to a state: of SPLIT
steps, lane j reads the inputs of the j-th, takes its dt, and writes its y, which is the sum of what all of them hold.
B and C, which all channels of a group share, are arranged for that before: taken as they lie, they would cost a fifth
of all instructions.
"""

# Triton compiles tuples that grow by +.
# mypy: disable-error-code="misc"

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.selective_scan_forward import aligned
from mambakit.ops.triton.selective_scan_steps import LOG2_E, fold, sigmoid, step_size

LANES = tl.constexpr(32)
_RUN_TIME_SIZES = ["length", "rounds", "blocks", "u_batch", "delta_batch", "z_batch"]


@Kernel
@triton.jit(do_not_specialize=["length", "rounds"])
def arrange_rounds(
    B, C, rows, length, rounds, N: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """`rows` float32 (batch, GROUPS, rounds, SPLIT / 2, 2, N, 2): of a round of SPLIT steps the pairs, of each B and C,
    of these all states, and of each the two steps; nought past the end."""
    at = tl.program_id(0) % rounds
    group = tl.program_id(0) // rounds % GROUPS
    batch = (tl.program_id(0) // rounds // GROUPS).to(tl.int64)
    i, n = tl.arange(0, SPLIT)[:, None], tl.arange(0, PADDED)[None, :]
    step = at * SPLIT + i
    there = (step < length) & (n < N)
    source = ((batch * length + step) * GROUPS + group) * N + n
    target = rows + tl.program_id(0).to(tl.int64) * (2 * SPLIT * N) + i // 2 * (4 * N) + n * 2 + i % 2
    tl.store(target, tl.load(B + source, mask=there, other=0.0).to(tl.float32), mask=n < N)
    tl.store(target + 2 * N, tl.load(C + source, mask=there, other=0.0).to(tl.float32), mask=n < N)


@Kernel
@triton.jit(do_not_specialize=_RUN_TIME_SIZES)
def split_outputs(
    u, delta, A, rows, D, z, delta_bias, initial, y, final, kept, length, dim, share, rounds, blocks,
    u_batch, u_row, delta_batch, delta_row, z_batch, z_row,
    N: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    NEAR: tl.constexpr, FULL: tl.constexpr, INTERVAL: tl.constexpr, KEEP: tl.constexpr,
    INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What `outputs` does where a segment is a whole sequence of a batch. A program is LANES / SPLIT channels of one
    group; SPLIT divides N. Activations are loaded DEPTH rounds of SPLIT steps before their use, which the latency of
    memory takes, B and C, which other programs have brought near, NEAR rounds."""
    PER: tl.constexpr = N // SPLIT  # states of a lane
    TOGETHER: tl.constexpr = LANES // SPLIT
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    per_group = blocks // GROUPS
    group = block // per_group
    lane = tl.arange(0, LANES)
    turn = lane % SPLIT
    within = (block % per_group) * TOGETHER + lane // SPLIT
    present = within < share
    channel = group * share + tl.minimum(within, share - 1)
    bias = tl.load(delta_bias + channel) if BIAS else 0.0
    skip = tl.load(D + channel) if SKIP else 0.0
    own = turn * PER  # the first state of the lane
    rates, h = (), ()
    for k in tl.static_range(PER):
        rates = rates + (tl.load(A + channel * N + own + k) * LOG2_E,)
        if INITIAL:
            h = h + (tl.load(initial + (batch * dim + channel) * N + own + k),)
        else:
            h = h + (tl.zeros([LANES], tl.float32),)
    u_step, delta_step = ROWS[0] if ROWS is not None else u_row, ROWS[1] if ROWS is not None else delta_row
    z_step, y_step = ROWS[2] if ROWS is not None else z_row, ROWS[3] if ROWS is not None else dim
    u_at = u + aligned(batch * u_batch, FULL) + channel
    delta_at = delta + aligned(batch * delta_batch, FULL) + channel
    z_at = z + aligned(batch * z_batch, FULL) + channel if GATE else u_at
    y_at = y + batch * length * dim + channel
    words_at = rows.to(tl.pointer_type(tl.int64), bitcast=True) + (batch * GROUPS + group) * rounds * (SPLIT * N) + own
    kept_at = kept + own * y_step + channel
    ROUNDS: tl.constexpr = DEPTH * SPLIT  # steps that the loads under way are for
    whole = length // ROUNDS * ROUNDS
    deltas = _first_columns(delta_at, delta_step, turn, length - 1, DEPTH, SPLIT)
    us = _first_columns(u_at, u_step, turn, length - 1, DEPTH, SPLIT)
    zs = _first_columns(z_at, z_step, turn, length - 1, DEPTH, SPLIT) if GATE else us
    words = ()
    for j in tl.static_range(NEAR):
        words = words + (_words(words_at + tl.minimum(j, rounds - 1) * (SPLIT * N), N, SPLIT),)
    for start in range(0, whole, ROUNDS):
        here, following = tl.cast(start, tl.int64), tl.minimum(start + ROUNDS, whole - ROUNDS).to(tl.int64)
        next_delta, next_u = delta_at + (following + turn) * delta_step, u_at + (following + turn) * u_step
        next_z = z_at + (following + turn) * z_step if GATE else next_u
        y_now = y_at + (here + turn) * y_step
        for j in tl.static_range(DEPTH):  # what is used up makes room, so that nothing under way is ever moved
            now_delta, now_u, now_z, now_words = deltas[0], us[0], zs[0], words[0]
            deltas = deltas[1:] + (tl.load(next_delta + j * SPLIT * delta_step),)
            us = us[1:] + (tl.load(next_u + j * SPLIT * u_step),)
            zs = zs[1:] + (tl.load(next_z + j * SPLIT * z_step),) if GATE else us
            near = (here if j + NEAR < DEPTH else following) * N + (j + NEAR) % DEPTH * SPLIT * N  # a step is N words
            words = words[1:] + (_words(words_at + near, N, SPLIT),)
            dt = step_size(now_delta, bias, SOFTPLUS)
            h, out = _steps(
                h, rates, dt, now_u, now_z, now_words, skip, kept_at, batch, start + j * SPLIT, j * SPLIT, length,
                y_step, lane, present, N, SPLIT, INTERVAL, ROUNDS, KEEP, GATE,
            )  # fmt: skip
            tl.store(y_now + j * SPLIT * y_step, out.to(y.dtype.element_ty), mask=present)
    for first in range(whole, length, SPLIT):
        there = first + turn < length
        mine = tl.minimum(first + turn, length - 1).to(tl.int64)
        dt = tl.where(there, step_size(tl.load(delta_at + mine * delta_step), bias, SOFTPLUS), 0.0)
        last_u = tl.load(u_at + mine * u_step)
        last_z = tl.load(z_at + mine * z_step) if GATE else last_u
        last_words = _words(words_at + tl.cast(first, tl.int64) * N, N, SPLIT)
        h, out = _steps(
            h, rates, dt, last_u, last_z, last_words, skip, kept_at, batch, first, 0, length,
            y_step, lane, present, N, SPLIT, INTERVAL, SPLIT, KEEP, GATE,
        )  # fmt: skip
        tl.store(y_at + mine * y_step, out.to(y.dtype.element_ty), mask=present & there)
    for k in tl.static_range(PER):
        tl.store(final + (batch * dim + channel) * N + own + k, h[k], mask=present)


@triton.jit
def _steps(
    h, rates, dt, u, z, words, skip, kept_at, batch, first, IN_ROUNDS: tl.constexpr, length,
    dim, lane, present, N: tl.constexpr, SPLIT: tl.constexpr, INTERVAL: tl.constexpr,
    ROUNDS: tl.constexpr, KEEP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """SPLIT steps from `first` on: the states after them, and y of the step whose turn the lane has. They are the
    IN_ROUNDS-th ones of ROUNDS, and `first` - IN_ROUNDS is a multiple of that."""
    PER: tl.constexpr = N // SPLIT
    x = u.to(tl.float32)
    dtu = dt * x
    sums = ()
    for i in tl.static_range(SPLIT):
        if KEEP and (IN_ROUNDS + i) % min(INTERVAL, ROUNDS & -ROUNDS) == 0:
            if (first + i) % INTERVAL == 0 and first + i < length:
                slot = (batch * length + first + i) // INTERVAL + batch
                for k in tl.static_range(PER):
                    tl.store(kept_at + slot * N * dim + k * dim, h[k], mask=present)
        dt_i, dtu_i = _of_turn(dt, lane, i, SPLIT), _of_turn(dtu, lane, i, SPLIT)
        total = dt * 0.0
        after = ()
        for k in tl.static_range(PER):
            h_k = tl.exp2(dt_i * rates[k]) * h[k] + dtu_i * _number(words, i, 0, k, PER)
            out_k = h_k * _number(words, i, 1, k, PER)
            total = out_k if k == 0 else total + out_k
            after = after + (h_k,)
        h = after
        sums = sums + (total,)
    out = _to_turns(sums, lane, SPLIT) + skip * x
    if GATE:
        gate = z.to(tl.float32)
        out *= gate * sigmoid(gate)
    return h, out


@triton.jit
def _first_columns(pointer, row_stride, turn, last, DEPTH: tl.constexpr, SPLIT: tl.constexpr):
    """What the lanes whose turns these are read in the first DEPTH rounds."""
    found = ()
    for j in tl.static_range(DEPTH):
        found = found + (tl.load(pointer + tl.minimum(j * SPLIT + turn, last).to(tl.int64) * row_stride),)
    return found


@triton.jit
def _words(at, N: tl.constexpr, SPLIT: tl.constexpr):
    """B and C of a lane's states in a round: words of two float32, by pairs of steps, B and C, and states."""
    words = ()
    for i in tl.static_range(SPLIT):
        for k in tl.static_range(N // SPLIT):
            words = words + (tl.load(at + i * N + k),)
    return words


@triton.jit
def _number(words, i: tl.constexpr, WHICH: tl.constexpr, k: tl.constexpr, PER: tl.constexpr):
    """Of step i B (WHICH 0) or C (1) of the lane's k-th state."""
    word = words[(i // 2 * 2 + WHICH) * PER + k]
    return (word >> (32 * (i % 2))).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _of_turn(x, lane, TURN: tl.constexpr, SPLIT: tl.constexpr):
    """In all lanes of a channel, what the lane of that turn holds."""
    return tl.gather(x, lane // SPLIT * SPLIT + TURN, 0)


@triton.jit
def _to_turns(sums, lane, SPLIT: tl.constexpr):
    """Of SPLIT values the sums over the lanes of a channel, the j-th in the j-th lane: half of them go each time."""
    for level in tl.static_range(4):
        if (SPLIT >> level) > 1:
            folded = ()
            for i in tl.static_range(SPLIT >> (level + 1)):
                folded = folded + (fold(sums[2 * i], sums[2 * i + 1], lane, 1 << level),)
            sums = folded
    return sums[0]
