"""The sums that end the backward of the selective scan, of what its programs leave, always in one order."""

import triton
import triton.language as tl

from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.segments import locate


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
        parts = tl.zeros([TOGETHER, VALUES], tl.float32)
        for first in range(0, per_group, TOGETHER):
            k = first + tl.arange(0, TOGETHER)
            parts += tl.load(
                at + k[:, None].to(tl.int64) * slots * (N * 2 * STEPS),
                mask=there[None, :] & (k < per_group)[:, None],
                other=0.0,
            )
        total = tl.sum(parts, axis=0)
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
