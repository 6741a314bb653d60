"""The gradients of a chunk of the scan of Mamba-2, given the state before it and the gradient of the state after it.

With c_i, S and "last" as in ssd_forward, G the gradient of the state after the chunk, and for j <= i

    L_ji = exp(c_i - c_j)        R_ji = (x_j . dy_i) L_ji         Z_ji = R_ji (B_j . C_i)

the gradients are

    dx_j = dt_j (sum_i (B_j . C_i) L_ji dy_i + exp(c_last - c_j) G B_j) + D dy_j
    dC_i = sum over heads of sum_j dt_j R_ji B_j + exp(c_i) S^T dy_i
    dB_j = sum over heads of sum_i dt_j R_ji C_i + dt_j exp(c_last - c_j) G^T x_j

A program of `value_gradients` takes a chunk and several heads of a group, so that B . C is formed once; so does one of
`pair_gradients`, in whose registers the sum of dt_j R_ji over its heads stays. Products of pairs have the source j
along their rows, ready to multiply dy from registers. `key_gradients` sums dB, or dC, over heads. One kernel for all
would read S, G, x and dy once, but its tiles overflow the registers: one for the first two took three fifths more time
than they do on an H200. What the decays and dt need (see ssd_steps):

    across_i  = exp(c_i) dy_i . S C_i + (sum_j dt_j Z_ji - dt_i sum_k Z_ik)
    within_k  = sum_{j < k <= i} dt_j Z_ji
    dscale_j  = sum_i Z_ji + exp(c_last - c_j) x_j . G B_j
    sent_j    = dt_j exp(c_last - c_j) x_j . G B_j
    through   = exp(c_last) <G, S>

where half precision takes the brackets for `within`, and float32 `within` for the brackets, whose difference is not
exact where a step forgets everything.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.ssd_forward import product, rounded, rows_at, scores_of, silu
from mambakit.ops.triton.ssd_layout import chunk_place
from mambakit.ops.triton.ssd_steps import decay_between, decay_from_start, load_runs

_RUN_TIME = ["length", "chunks_of_sequence", "chunks", "heads", "splits", "heads_of_program"]
_RUN_TIME_STRIDES = ["x_batch", "B_batch", "C_batch", "z_batch"]


@Kernel
@triton.jit(do_not_specialize=[*_RUN_TIME, *_RUN_TIME_STRIDES])
def value_gradients(
    x, B, C, z, D, dy, runs, states, state_grads, dx, dz, steps, through, table,
    x_batch, x_row, x_head, B_batch, B_row, B_group, C_batch, C_row, C_group, z_batch, z_row, z_head, D_head, D_row,
    length, chunks_of_sequence, chunks, heads, headdim, state, share, splits, heads_of_program,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_STATES: tl.constexpr, HAS_STATE_GRADS: tl.constexpr,
    FINE: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill dx, dz, what each chunk adds to dD (chunks, heads, headdim), what the states before and after it give to
    `steps` (4, heads, places): across, dscale and sent, and `through` (heads, chunks).

    states and state_grads are (chunks, heads, state, headdim); dy, dx, dz are contiguous.

    The states lack where they are zero, and so do their gradients. In float32 they are multiplied in pieces of PIECE
    rows: what is split for tf32 overflows the registers otherwise.
    """
    group, first, end_head, chunk, _, sequence, rows, in_rows = _heads_of_chunk(
        table, length, chunks_of_sequence, heads, share, splits, heads_of_program, CHUNK, PACKED
    )
    step, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    in_n = n < state
    in_B = in_rows[:, None] & in_n[None, :]
    B_at = rows_at(B, sequence, rows, B_batch, B_row, ALIGN) + group * B_group
    C_at = rows_at(C, sequence, rows, C_batch, C_row, ALIGN) + group * C_group
    x_base = rows_at(x, sequence, rows, x_batch, x_row, ALIGN)
    z_base = rows_at(z, sequence, rows, z_batch, z_row, ALIGN)
    dy_base = (sequence * length + rows) * heads * headdim
    chunks_wide = chunks.to(tl.int64)
    whole = chunks_wide * heads

    across, dscale, sent = steps, steps + whole * CHUNK, steps + 2 * whole * CHUNK
    later = step[None, :] >= step[:, None]
    if PIECE < BLOCK_N:
        scores = scores_of(B_at, B_row, C_at, C_row, in_rows, state, CHUNK, BLOCK_N, PIECE, PRECISION)
    else:
        Bs = tl.load(B_at + step[:, None] * B_row + n[None, :], mask=in_B, other=0.0)
        Cs = tl.load(C_at + step[:, None] * C_row + n[None, :], mask=in_B, other=0.0)
        scores = product(Bs, tl.trans(Cs), None, PRECISION)
    for head in tl.range(first, end_head, num_stages=STAGES):
        place = (chunks_wide * head + chunk) * CHUNK
        coarse, fine, last_coarse, last_fine = load_runs(runs, place, whole * CHUNK, step, CHUNK, FINE)
        dt = tl.load(runs + 2 * whole * CHUNK + place + step)
        across_i = tl.zeros([CHUNK], tl.float32)
        written_in = tl.zeros([CHUNK], tl.float32)
        kept = 0.0
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            # Tiles are loaded from shared memory where they are named: late, so that few are in registers at once.
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            in_p = p < headdim
            in_x = in_rows[:, None] & in_p[None, :]
            state_at = (chunk * heads + head) * headdim * state
            read = tl.zeros([CHUNK, BLOCK_P], tl.float32)
            moved = tl.zeros([CHUNK, BLOCK_P], tl.float32)
            if PIECE < BLOCK_N:
                if HAS_STATES or HAS_STATE_GRADS:
                    for at in tl.range(0, BLOCK_N, PIECE):
                        m = at + tl.arange(0, PIECE)
                        in_piece = in_rows[:, None] & (m < state)[None, :]
                        in_state = (m < state)[:, None] & in_p[None, :]
                        in_states = m[:, None] * headdim + p[None, :]
                        if HAS_STATES:
                            Cs = tl.load(C_at + step[:, None] * C_row + m[None, :], mask=in_piece, other=0.0)
                            S = tl.load(states + state_at + in_states, mask=in_state, other=0.0)
                            read = product(Cs, S, read, PRECISION)
                        if HAS_STATE_GRADS:
                            Bs = tl.load(B_at + step[:, None] * B_row + m[None, :], mask=in_piece, other=0.0)
                            G = tl.load(state_grads + state_at + in_states, mask=in_state, other=0.0)
                            moved = product(Bs, G, moved, PRECISION)
                        if HAS_STATES and HAS_STATE_GRADS:
                            kept += tl.sum(tl.sum(S * G, 1), 0)
            else:
                in_state = in_n[:, None] & in_p[None, :]
                in_states = n[:, None] * headdim + p[None, :]
                if HAS_STATES:
                    S = tl.load(states + state_at + in_states, mask=in_state, other=0.0)
                if HAS_STATE_GRADS:
                    G = tl.load(state_grads + state_at + in_states, mask=in_state, other=0.0)
                if HAS_STATES and HAS_STATE_GRADS:
                    kept += tl.sum(tl.sum(S.to(tl.float32) * G.to(tl.float32), 1), 0)
                if HAS_STATES:
                    read = product(Cs, S, None, PRECISION)
                if HAS_STATE_GRADS:
                    moved = product(Bs, G, None, PRECISION)
            in_dy = step[:, None] * (heads * headdim) + p[None, :]
            dy_at = dy_base + head * headdim
            dys = tl.load(dy + dy_at + in_dy, mask=in_x, other=0.0)
            if HAS_STATES:
                read *= decay_from_start(coarse, fine, FINE)[:, None]
                if not HAS_Z:
                    across_i += tl.sum(read * dys, 1)
            xs = tl.load(x_base + head * x_head + (step[:, None] * x_row + p[None, :]), mask=in_x, other=0.0)
            if HAS_STATE_GRADS:
                moved *= decay_between(last_coarse, coarse, last_fine, fine, FINE)[:, None]
                written_in += tl.sum(moved * xs, 1)
            decay = decay_between(coarse[None, :], coarse[:, None], fine[None, :], fine[:, None], FINE)
            reached = tl.where(later, scores * decay, 0.0)
            if HAS_D:
                skip = tl.load(D + head * D_head + p * D_row, mask=in_p, other=0.0)
            if HAS_Z:
                zs = tl.load(z_base + head * z_head + (step[:, None] * z_row + p[None, :]), mask=in_x, other=0.0)
                zs = zs.to(tl.float32)
                on = 1.0 / (1.0 + tl.exp(-zs))
                weighed = tl.trans(rounded(reached * dt[:, None], xs, PRECISION))
                out = product(weighed, xs, read, PRECISION)
                if HAS_D:
                    out += skip[None, :] * xs
                tl.store(dz + dy_at + in_dy, dys * out * (on * (1.0 + zs * (1.0 - on))), mask=in_x)
                dys = rounded(dys * (zs * on), xs, PRECISION)
                if HAS_STATES:
                    across_i += tl.sum(read * dys, 1)
            dxs = product(rounded(reached, xs, PRECISION), dys, moved, PRECISION) * dt[:, None]
            if HAS_D:
                dxs += skip[None, :] * dys
            tl.store(dx + dy_at + in_dy, dxs, mask=in_x)

        tl.store(across + place + step, across_i)
        tl.store(dscale + place + step, written_in)
        tl.store(sent + place + step, dt * written_in)
        tl.store(through + chunks_wide * head + chunk, kept * decay_from_start(last_coarse, last_fine, FINE))


@Kernel
@triton.jit(do_not_specialize=[*_RUN_TIME, *_RUN_TIME_STRIDES])
def pair_gradients(
    x, B, C, z, dy, runs, dpairs, dD, steps, table,
    x_batch, x_row, x_head, B_batch, B_row, B_group, C_batch, C_row, C_group, z_batch, z_row, z_head,
    length, chunks_of_sequence, chunks, heads, headdim, state, share, splits, heads_of_program,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, FINE: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill the sums of dt_j R_ji over each program's heads, dpairs (splits, chunks, groups, CHUNK, CHUNK), and add to
    `steps` of `value_gradients` what pairs of steps give: to across and dscale, in float32 to within and not across."""
    group, first, end_head, chunk, split, sequence, rows, in_rows = _heads_of_chunk(
        table, length, chunks_of_sequence, heads, share, splits, heads_of_program, CHUNK, PACKED
    )
    step = tl.arange(0, CHUNK)
    B_at = rows_at(B, sequence, rows, B_batch, B_row, ALIGN) + group * B_group
    C_at = rows_at(C, sequence, rows, C_batch, C_row, ALIGN) + group * C_group
    x_base = rows_at(x, sequence, rows, x_batch, x_row, ALIGN)
    z_base = rows_at(z, sequence, rows, z_batch, z_row, ALIGN)
    dy_base = (sequence * length + rows) * heads * headdim
    chunks_wide = chunks.to(tl.int64)
    whole = chunks_wide * heads

    across, dscale, within = steps, steps + whole * CHUNK, steps + 3 * whole * CHUNK
    later = step[None, :] >= step[:, None]
    scores = scores_of(B_at, B_row, C_at, C_row, in_rows, state, CHUNK, BLOCK_N, PIECE, PRECISION)
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for head in tl.range(first, end_head, num_stages=STAGES):
        place = (chunks_wide * head + chunk) * CHUNK
        coarse, fine, _, _ = load_runs(runs, place, whole * CHUNK, step, CHUNK, FINE)
        dt = tl.load(runs + 2 * whole * CHUNK + place + step)
        reach = tl.zeros([CHUNK, CHUNK], tl.float32)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            in_p = p < headdim
            in_x = in_rows[:, None] & in_p[None, :]
            xs = tl.load(x_base + head * x_head + (step[:, None] * x_row + p[None, :]), mask=in_x, other=0.0)
            in_dy = step[:, None] * (heads * headdim) + p[None, :]
            dys = tl.load(dy + dy_base + head * headdim + in_dy, mask=in_x, other=0.0)
            if HAS_Z:
                zs = tl.load(z_base + head * z_head + (step[:, None] * z_row + p[None, :]), mask=in_x, other=0.0)
                dys = rounded(dys * silu(zs.to(tl.float32)), xs, PRECISION)
            if HAS_D:
                dD_at = (chunk * heads + head) * headdim + p
                tl.store(dD + dD_at, tl.sum(dys.to(tl.float32) * xs.to(tl.float32), 0), mask=in_p)
            reach = product(xs, tl.trans(dys), reach, PRECISION)
        decay = decay_between(coarse[None, :], coarse[:, None], fine[None, :], fine[:, None], FINE)
        reach = tl.where(later, reach * decay, 0.0)
        dscores += reach * dt[:, None]
        pairs = reach * scores
        as_source = tl.sum(pairs, 1)
        if FINE:
            passed = tl.cumsum(pairs * dt[:, None], 1, reverse=True)  # by source j and k: to the targets from k on
            tl.store(within + place + step, tl.sum(tl.where(step[None, :] > step[:, None], passed, 0.0), 0))
        else:
            from_pairs = tl.sum(pairs * dt[:, None], 0) - dt * as_source
            tl.store(across + place + step, tl.load(across + place + step) + from_pairs)
        tl.store(dscale + place + step, tl.load(dscale + place + step) + as_source)

    dpairs_at = dpairs + ((chunks_wide * split + chunk) * (heads // share) + group) * CHUNK * CHUNK
    tl.store(dpairs_at + step[:, None] * CHUNK + step[None, :], dscores)


@Kernel
@triton.jit(do_not_specialize=[*_RUN_TIME, "v_batch", "k_batch", "z_batch", "pair_splits", "all_rows"])
def key_gradients(
    v, keys, z, runs, states, dpairs, dkeys, table,
    v_batch, v_row, v_head, k_batch, k_row, k_group, z_batch, z_row, z_head, length, chunks_of_sequence, chunks, heads,
    headdim, state, share, splits, heads_of_program, all_rows, pair_splits,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SOURCE: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_STATES: tl.constexpr, FINE: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill what each program adds to dB (SOURCE: v is x, keys is C, states are their gradients) or dC (dy, B, states).

    dkeys is (splits, batch * length, groups, state); the first of the splits gets what dpairs give.
    """
    group, first, end_head, chunk, split, sequence, rows, in_rows = _heads_of_chunk(
        table, length, chunks_of_sequence, heads, share, splits, heads_of_program, CHUNK, PACKED
    )
    groups = heads // share
    step, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    in_n = n < state
    in_keys = in_rows[:, None] & in_n[None, :]
    v_base = rows_at(v, sequence, rows, v_batch, v_row, ALIGN)
    z_base = rows_at(z, sequence, rows, z_batch, z_row, ALIGN)
    chunks_wide = chunks.to(tl.int64)
    whole = chunks_wide * heads

    found = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    units = (end_head - first) * BLOCKS if HAS_STATES else 0
    for unit in tl.range(first * BLOCKS, first * BLOCKS + units, num_stages=STAGES):
        head, block = unit // BLOCKS, unit % BLOCKS
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        in_v = in_rows[:, None] & (p < headdim)[None, :]
        vs = tl.load(v_base + head * v_head + step[:, None] * v_row + p[None, :], mask=in_v, other=0.0)
        S_at = (chunk * heads + head) * headdim * state + n[:, None] * headdim + p[None, :]
        S = tl.load(states + S_at, mask=in_n[:, None] & (p < headdim)[None, :], other=0.0)
        place = (chunks_wide * head + chunk) * CHUNK
        coarse = tl.load(runs + place + step)
        fine = coarse
        if FINE:
            fine = tl.load(runs + whole * CHUNK + place + step)
        if SOURCE:
            last_coarse = tl.load(runs + place + CHUNK - 1)
            last_fine = last_coarse
            if FINE:
                last_fine = tl.load(runs + whole * CHUNK + place + CHUNK - 1)
            weight = tl.load(runs + 2 * whole * CHUNK + place + step)
            weight *= decay_between(last_coarse, coarse, last_fine, fine, FINE)
        else:
            weight = decay_from_start(coarse, fine, FINE)
        weighed = vs * weight[:, None]
        if HAS_Z:
            zs = tl.load(z_base + head * z_head + step[:, None] * z_row + p[None, :], mask=in_v, other=0.0)
            weighed *= silu(zs.to(tl.float32))
        found = product(rounded(weighed, vs, PRECISION), tl.trans(S), found, PRECISION)

    if split == 0:
        pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
        pairs_at = dpairs + (chunk * groups + group) * CHUNK * CHUNK + step[:, None] * CHUNK + step[None, :]
        for k in range(pair_splits):
            pairs += tl.load(pairs_at + chunks_wide * k * groups * CHUNK * CHUNK)
        k_at = rows_at(keys, sequence, rows, k_batch, k_row, ALIGN) + group * k_group
        ks = tl.load(k_at + step[:, None] * k_row + n[None, :], mask=in_keys, other=0.0)
        narrow = rounded(pairs, ks, PRECISION)
        if SOURCE:
            found += product(narrow, ks, None, PRECISION)
        else:
            found += product(tl.trans(narrow), ks, None, PRECISION)
    target = ((all_rows.to(tl.int64) * split + sequence * length + rows) * groups + group) * state
    target = target + step[:, None] * (groups * state) + n[None, :]
    tl.store(dkeys + target, found, mask=in_keys)


@triton.jit
def _heads_of_chunk(
    table, length, chunks_of_sequence, heads, share, splits, heads_of_program, CHUNK: tl.constexpr, PACKED: tl.constexpr
):
    """What a program takes: a group, the first of its heads and the one after the last, a chunk, and which part of the
    heads they are; then of the chunk the sequence of the batch, the first step, and which of its steps are there."""
    groups = heads // share
    part = tl.program_id(0) % (groups * splits)
    group, split = part // splits, part % splits
    chunk = (tl.program_id(0) // (groups * splits)).to(tl.int64)
    first = group * share + split * heads_of_program
    end_head = tl.minimum(first + heads_of_program, (group + 1) * share)
    batch, start, end = chunk_place(table, chunk, length, chunks_of_sequence, CHUNK, PACKED)
    in_rows = tl.arange(0, CHUNK) < end - start
    return group, first, end_head, chunk, split, batch.to(tl.int64), start.to(tl.int64), in_rows


@Kernel
@triton.jit(do_not_specialize=["splits", "values"])
def sum_splits(parts, total, splits, values, BLOCK: tl.constexpr):
    """total = the sum of parts (splits, values) over the splits, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    found = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        found += tl.load(parts + values.to(tl.int64) * split + at, mask=inside, other=0.0)
    tl.store(total + at, found, mask=inside)
