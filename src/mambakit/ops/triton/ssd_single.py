"""The scan of Mamba-2 over sequences of one chunk that start from no state: nothing to walk along, nothing to read.

    y_i = sum_{j <= i} (C_i . B_j) exp(c_i - c_j) dt_j x_j        S = sum_j exp(c_last - c_j) dt_j x_j B_j^T

A program takes a head of a sequence and forms C B^T once for all of its headdim.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.ssd_forward import product, rounded, scores_of, silu
from mambakit.ops.triton.ssd_steps import decay_between, load_runs


@Kernel
@triton.jit(do_not_specialize=["length", "chunks", "heads", "x_batch", "B_batch", "C_batch", "z_batch"])
def single_outputs(
    x, B, C, z, D, runs, y, final,
    x_batch, x_row, x_head, B_batch, B_row, B_group, C_batch, C_row, C_group, z_batch, z_row, z_head, D_head, D_row,
    length, chunks, heads, headdim, state, share,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_D: tl.constexpr, FINE: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill y and final (batch, heads, headdim, state); the sequences of the batch are as many chunks."""
    head, sequence = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    group = head // share
    step = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    in_rows, in_n = step < length, n < state
    x_at = x + tl.multiple_of(sequence * x_batch, ALIGN) + head * x_head
    z_at = z + tl.multiple_of(sequence * z_batch, ALIGN) + head * z_head
    B_at = B + tl.multiple_of(sequence * B_batch, ALIGN) + group * B_group
    C_at = C + tl.multiple_of(sequence * C_batch, ALIGN) + group * C_group
    y_at = y + (sequence * length * heads + head) * headdim
    final_at = final + (sequence * heads + head) * headdim * state
    runs_at = runs + (head * chunks.to(tl.int64) + sequence) * CHUNK
    whole = heads.to(tl.int64) * chunks * CHUNK

    coarse, fine, last_coarse, last_fine = load_runs(runs_at, 0, whole, step, CHUNK, FINE)
    dt = tl.load(runs_at + 2 * whole + step)
    scores = scores_of(C_at, C_row, B_at, B_row, in_rows, state, CHUNK, BLOCK_N, PIECE, PRECISION)
    decay = decay_between(coarse[:, None], coarse[None, :], fine[:, None], fine[None, :], FINE)
    scores = tl.where(step[:, None] >= step[None, :], scores * decay * dt[None, :], 0.0)
    to_end = decay_between(last_coarse, coarse, last_fine, fine, FINE) * dt

    for block in tl.range(0, BLOCKS):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = p < headdim
        in_x = in_rows[:, None] & in_p[None, :]
        xs = tl.load(x_at + step[:, None] * x_row + p[None, :], mask=in_x, other=0.0)
        out = product(rounded(scores, xs, PRECISION), xs, None, PRECISION)
        if HAS_D:
            out += tl.load(D + head * D_head + p * D_row, mask=in_p, other=0.0)[None, :] * xs
        if HAS_Z:
            zs = tl.load(z_at + step[:, None] * z_row + p[None, :], mask=in_x, other=0.0)
            out *= silu(zs.to(tl.float32))
        tl.store(y_at + step[:, None] * (heads * headdim) + p[None, :], out, mask=in_x)
        Bs = tl.load(B_at + step[:, None] * B_row + n[None, :], mask=in_rows[:, None] & in_n[None, :], other=0.0)
        weighed = rounded(xs * to_end[:, None], xs, PRECISION)
        S = product(tl.trans(weighed), Bs, None, PRECISION)
        tl.store(final_at + p[:, None] * state + n[None, :], S, mask=in_p[:, None] & in_n[None, :])
