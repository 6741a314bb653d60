"""The walks along a segment of the scan of Mamba-2, the state of one head (a block of its headdim) in registers.

With c_i = a_1 + ... + a_i the sums of the logarithms of the decays along a chunk, S the state before it, and "last"
its last step, a chunk is four matrix products:

    y_i = sum_{j <= i} (C_i . B_j) exp(c_i - c_j) dt_j x_j + exp(c_i) S C_i
    S'  = exp(c_last) S + sum_j exp(c_last - c_j) dt_j x_j B_j^T

`walk_states` does the second line alone: for what a segment adds to the state, and, with x, B and dt exp(c_last - c_j)
replaced by dy, C and exp(c_i), for the gradient of the state, which walks backwards.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.ssd_layout import segment_place
from mambakit.ops.triton.ssd_steps import decay_between, decay_from_start, load_runs

_RUN_TIME = ["length", "chunks_of_sequence", "segments_of_sequence", "chunks_of_segment", "chunks", "heads", "blocks"]


@triton.jit
def product(left, right, added, PRECISION: tl.constexpr):
    """left @ right + added in float32; "widened" is for the interpreter, which has no products of bfloat16."""
    if PRECISION == "widened":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc=added, input_precision="ieee")
    return tl.dot(left, right, acc=added, input_precision=PRECISION)


@triton.jit
def rounded(v, like, PRECISION: tl.constexpr):
    """v in the dtype of `like`, for a product; the interpreter truncates where a GPU rounds, so not there."""
    if PRECISION == "widened":
        return v.to(tl.float32)
    return v.to(like.dtype)


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def scores_of(
    left, left_row, right, right_row, in_rows, state,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of rows, (CHUNK, CHUNK), in pieces of the state: all of it, split for tf32, overflows registers."""
    step, m = tl.arange(0, CHUNK), tl.arange(0, PIECE)
    found = tl.zeros([CHUNK, CHUNK], tl.float32)
    for at in tl.range(0, BLOCK_N, PIECE):
        inside = in_rows[:, None] & (at + m < state)[None, :]
        ls = tl.load(left + step[:, None] * left_row + (at + m)[None, :], mask=inside, other=0.0)
        rs = tl.load(right + step[:, None] * right_row + (at + m)[None, :], mask=inside, other=0.0)
        found = product(ls, tl.trans(rs), found, PRECISION)
    return found


@triton.jit
def _read_in_pieces(
    C, C_row, kept, p, in_rows, in_p, state, headdim,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product of C and a state kept in memory, (CHUNK, BLOCK_P), in pieces of the state."""
    step = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK, BLOCK_P], tl.float32)
    for at in tl.range(0, BLOCK_N, PIECE):
        m = at + tl.arange(0, PIECE)
        in_piece = in_rows[:, None] & (m < state)[None, :]
        in_rows_of_S = (m < state)[:, None] & in_p[None, :]
        C_piece = tl.load(C + step[:, None] * C_row + m[None, :], mask=in_piece, other=0.0)
        S_piece = tl.load(kept + m[:, None] * headdim + p[None, :], mask=in_rows_of_S, other=0.0)
        found = product(C_piece, S_piece, found, PRECISION)
    return found


@triton.jit
def rows_at(pointer, sequence, row, batch_stride, row_stride, ALIGN: tl.constexpr):
    """Where a row of a sequence begins; its offset is a multiple of ALIGN."""
    return pointer + tl.multiple_of(sequence * batch_stride + row * row_stride, ALIGN)


@triton.jit
def _place_of_walk(
    table, heads, blocks, length, chunks_of_sequence, segments_of_sequence, chunks_of_segment,
    CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The head, the block of its headdim and the segment that a program walks along; then of the segment the sequence
    of the batch, the first step, the end and the first chunk."""
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    block, segment = rest % blocks, rest // blocks
    batch, start, end, chunk = segment_place(
        table, segment, length, chunks_of_sequence, segments_of_sequence, chunks_of_segment, CHUNK, PACKED
    )
    return head, block, segment, batch, start, end, chunk


@Kernel
@triton.jit(do_not_specialize=[*_RUN_TIME, "x_batch", "B_batch", "C_batch", "z_batch"])
def walk_outputs(
    x, B, C, z, D, runs, initial, y, final, kept, table,
    x_batch, x_row, x_head, B_batch, B_row, B_group, C_batch, C_row, C_group, z_batch, z_row, z_head, D_head, D_row,
    length, chunks_of_sequence, segments_of_sequence, chunks_of_segment, chunks, heads, headdim, state, share, blocks,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_D: tl.constexpr, HAS_INITIAL: tl.constexpr, WRITE_FINAL: tl.constexpr, KEEP: tl.constexpr, FINE: tl.constexpr,
    PACKED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill y over a segment, and the state after it; with KEEP also the states before its chunks.

    In pieces of PIECE rows the states are read back from kept, which without KEEP has a place for every segment.

    initial and final are (segments, heads, headdim, state), kept is (chunks, heads, state, headdim) in the dtype of x.
    """
    head, block, segment, batch, start, end, chunk = _place_of_walk(
        table, heads, blocks, length, chunks_of_sequence, segments_of_sequence, chunks_of_segment, CHUNK, PACKED
    )
    group = head // share
    step = tl.arange(0, CHUNK)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    rows, sequence, chunk = start.to(tl.int64), batch.to(tl.int64), chunk.to(tl.int64)
    x_at = rows_at(x, sequence, rows, x_batch, x_row, ALIGN) + head * x_head
    x_inner = step[:, None] * x_row + p[None, :]
    z_at = rows_at(z, sequence, rows, z_batch, z_row, ALIGN) + head * z_head
    z_inner = step[:, None] * z_row + p[None, :]
    B_at = rows_at(B, sequence, rows, B_batch, B_row, ALIGN) + group * B_group
    B_inner = step[:, None] * B_row + n[None, :]
    C_at = rows_at(C, sequence, rows, C_batch, C_row, ALIGN) + group * C_group
    C_inner = step[:, None] * C_row + n[None, :]
    y_row = heads * headdim
    y_at = y + ((sequence * length + rows) * heads + head) * headdim
    y_inner = step[:, None] * y_row + p[None, :]
    runs_at = runs + (head * chunks.to(tl.int64) + chunk) * CHUNK
    whole = heads.to(tl.int64) * chunks * CHUNK
    in_p, in_n = p < headdim, n < state
    values = p[:, None] * state + n[None, :]
    kept_values = n[:, None] * headdim + p[None, :]
    in_state = in_p[:, None] & in_n[None, :]
    S_at = (segment.to(tl.int64) * heads + head) * headdim * state

    S = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_INITIAL:
        S = tl.trans(tl.load(initial + S_at + values, mask=in_state, other=0.0))
    if HAS_D:
        skip = tl.load(D + head * D_head + p * D_row, mask=in_p, other=0.0)
    earlier = step[:, None] >= step[None, :]
    for k in tl.range(0, tl.cdiv(end - start, CHUNK), num_stages=STAGES):
        number = chunk + k
        t = (number - chunk) * CHUNK
        in_rows = step < end - start - k * CHUNK
        in_x = in_rows[:, None] & in_p[None, :]
        in_B = in_rows[:, None] & in_n[None, :]
        xs = tl.load(x_at + t * x_row + x_inner, mask=in_x, other=0.0)
        Bs = tl.load(B_at + t * B_row + B_inner, mask=in_B, other=0.0)
        if PIECE >= BLOCK_N:
            Cs = tl.load(C_at + t * C_row + C_inner, mask=in_B, other=0.0)
        coarse, fine, last_coarse, last_fine = load_runs(runs_at, t, whole, step, CHUNK, FINE)
        dt = tl.load(runs_at + 2 * whole + t + step)
        narrow = rounded(S, xs, PRECISION)
        keep_at = kept + ((number if KEEP else segment.to(tl.int64)) * heads + head) * headdim * state
        if PIECE < BLOCK_N:
            tl.debug_barrier()  # the last chunk's state has been read
            tl.store(keep_at + kept_values, narrow, mask=in_n[:, None] & in_p[None, :])
            tl.debug_barrier()
        elif KEEP:
            tl.store(keep_at + kept_values, narrow, mask=in_n[:, None] & in_p[None, :])

        if PIECE < BLOCK_N:
            C_now, B_now = C_at + t * C_row, B_at + t * B_row
            scores = scores_of(C_now, C_row, B_now, B_row, in_rows, state, CHUNK, BLOCK_N, PIECE, PRECISION)
        else:
            scores = product(Cs, tl.trans(Bs), None, PRECISION)
        decay = decay_between(coarse[:, None], coarse[None, :], fine[:, None], fine[None, :], FINE)
        scores = rounded(tl.where(earlier, scores * decay * dt[None, :], 0.0), xs, PRECISION)
        if PIECE < BLOCK_N:
            out = _read_in_pieces(
                C_now, C_row, keep_at, p, in_rows, in_p, state, headdim, CHUNK, BLOCK_P, BLOCK_N, PIECE, PRECISION
            )
        else:
            out = product(Cs, narrow, None, PRECISION)
        out *= decay_from_start(coarse, fine, FINE)[:, None]
        out = product(scores, xs, out, PRECISION)
        if HAS_D:
            out += skip[None, :] * xs
        if HAS_Z:
            out *= silu(tl.load(z_at + t * z_row + z_inner, mask=in_x, other=0.0).to(tl.float32))
        tl.store(y_at + t * y_row + y_inner, out, mask=in_x)

        to_end = decay_between(last_coarse, coarse, last_fine, fine, FINE) * dt
        weighed = rounded(xs * to_end[:, None], xs, PRECISION)
        S = S * decay_from_start(last_coarse, last_fine, FINE)
        S = product(tl.trans(Bs), weighed, S, PRECISION)
    if WRITE_FINAL:
        tl.store(final + S_at + values, tl.trans(S), mask=in_state)


@Kernel
@triton.jit(do_not_specialize=[*_RUN_TIME, "v_batch", "k_batch", "z_batch"])
def walk_states(
    v, keys, z, runs, initial, final, factors, kept, table,
    v_batch, v_row, v_head, k_batch, k_row, k_group, z_batch, z_row, z_head, length, chunks_of_sequence,
    segments_of_sequence, chunks_of_segment, chunks, heads, headdim, state, share, blocks,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_INITIAL: tl.constexpr, WRITE_FINAL: tl.constexpr, WRITE_FACTOR: tl.constexpr, KEEP: tl.constexpr,
    FINE: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk a segment: x and B forward, or with REVERSE dy (gated by z) and C backward.

    Fills final (segments, heads, headdim, state), factors (segments, heads): the decay over the segment, and kept
    (chunks, heads, state, headdim): the state met at each chunk, before it (with REVERSE, the gradient after it).
    """
    head, block, segment, batch, start, end, chunk = _place_of_walk(
        table, heads, blocks, length, chunks_of_sequence, segments_of_sequence, chunks_of_segment, CHUNK, PACKED
    )
    group = head // share
    step = tl.arange(0, CHUNK)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    rows, sequence, chunk = start.to(tl.int64), batch.to(tl.int64), chunk.to(tl.int64)
    v_at = rows_at(v, sequence, rows, v_batch, v_row, ALIGN) + head * v_head
    v_inner = step[:, None] * v_row + p[None, :]
    z_at = rows_at(z, sequence, rows, z_batch, z_row, ALIGN) + head * z_head
    z_inner = step[:, None] * z_row + p[None, :]
    k_at = rows_at(keys, sequence, rows, k_batch, k_row, ALIGN) + group * k_group
    k_inner = step[:, None] * k_row + n[None, :]
    runs_at = runs + (head * chunks.to(tl.int64) + chunk) * CHUNK
    whole = heads.to(tl.int64) * chunks * CHUNK
    in_p, in_n = p < headdim, n < state
    values = p[:, None] * state + n[None, :]
    kept_values = n[:, None] * headdim + p[None, :]
    in_state = in_p[:, None] & in_n[None, :]
    S_at = (segment.to(tl.int64) * heads + head) * headdim * state

    S = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_INITIAL:
        S = tl.trans(tl.load(initial + S_at + values, mask=in_state, other=0.0))
    factor = 1.0
    count = tl.cdiv(end - start, CHUNK)
    for index in tl.range(0, count, num_stages=STAGES):
        k = count - 1 - index if REVERSE else index
        number = chunk + k
        t = (number - chunk) * CHUNK
        in_rows = step < end - start - k * CHUNK
        in_v = in_rows[:, None] & in_p[None, :]
        vs = tl.load(v_at + t * v_row + v_inner, mask=in_v, other=0.0)
        ks = tl.load(k_at + t * k_row + k_inner, mask=in_rows[:, None] & in_n[None, :], other=0.0)
        coarse, fine, last_coarse, last_fine = load_runs(runs_at, t, whole, step, CHUNK, FINE)
        if KEEP:
            keep_at = kept + (number * heads + head) * headdim * state
            tl.store(keep_at + kept_values, S, mask=in_n[:, None] & in_p[None, :])
        if REVERSE:
            weight = decay_from_start(coarse, fine, FINE)
        else:
            dt = tl.load(runs_at + 2 * whole + t + step)
            weight = decay_between(last_coarse, coarse, last_fine, fine, FINE) * dt
        weighed = vs * weight[:, None]
        if HAS_Z:
            weighed *= silu(tl.load(z_at + t * z_row + z_inner, mask=in_v, other=0.0).to(tl.float32))
        weighed = rounded(weighed, vs, PRECISION)
        passes = decay_from_start(last_coarse, last_fine, FINE)
        S = product(tl.trans(ks), weighed, S * passes, PRECISION)
        factor *= passes
    if WRITE_FINAL:
        tl.store(final + S_at + values, tl.trans(S), mask=in_state)
    if WRITE_FACTOR:
        tl.store(factors + segment.to(tl.int64) * heads + head, factor)
