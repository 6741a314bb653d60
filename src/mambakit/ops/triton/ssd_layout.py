"""How the scan of Mamba-2 is cut for the GPU: sequences into segments, segments into chunks.

A chunk is what enters one matrix product. A segment is a run of chunks that one program walks through with the state
in its registers: a whole sequence where batch times heads fill the chip, less where they don't. Both begin anew at
each packed sequence. Chunks are numbered through; what belongs to the steps of chunk k is kept at the places
k * chunk + step, so that even a chunk cut short has its fixed place.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mambakit.ops.packing import sequence_bounds


class Layout(NamedTuple):
    """The cut of one call."""

    chunk: int  # steps
    chunks: int  # in all
    chunks_of_sequence: int  # 0 of a pack
    segments: int  # in all
    segments_of_sequence: int  # 0 of a pack
    chunks_of_segment: int
    segmented: bool  # whether a sequence has more than one segment

    @property
    def places(self) -> int:
        """Rows of what is kept for every step."""
        return self.chunks * self.chunk


class Tables(NamedTuple):
    """Where the chunks and segments of packed sequences lie; None for a batch, whose sequences have one length."""

    chunks: Tensor | None  # (chunks, 2): first step and end
    segments: Tensor | None  # (segments, 3): first step, end and first chunk
    first_segment: Tensor | None  # (sequences + 1,)


NO_TABLES = Tables(None, None, None)


def cut(batch: int, length: int, chunk: int, programs: int, wanted: int) -> Layout:
    """Cut a batch where each segment takes `programs` programs and `wanted` fill the chip."""
    chunks = -(-length // chunk)
    per_segment = _chunks_of_segment(chunks, batch * programs, wanted)
    segments = max(1, -(-chunks // per_segment))
    return Layout(chunk, batch * chunks, chunks, batch * segments, segments, per_segment, segments > 1)


# Of each cu_seqlens seen and alive: its version when it was read, and its cuts.
_SEEN: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def cut_pack(length: int, cu_seqlens: Tensor, chunk: int, programs: int, wanted: int) -> tuple[Layout, Tables]:
    """`cut` for packed sequences, whose bounds are read once for each tensor, not each call."""
    if cu_seqlens.is_inference():  # no version tells whether it has changed
        return _cut_pack(length, cu_seqlens, chunk, programs, wanted)
    known = _SEEN.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _SEEN[cu_seqlens] = (cu_seqlens._version, {})
    case = (length, chunk, programs, wanted)
    if case not in known[1]:
        known[1][case] = _cut_pack(length, cu_seqlens, chunk, programs, wanted)
    found: tuple[Layout, Tables] = known[1][case]
    return found


def _cut_pack(length: int, cu_seqlens: Tensor, chunk: int, programs: int, wanted: int) -> tuple[Layout, Tables]:
    bounds = sequence_bounds(1, length, cu_seqlens)
    longest = max((last - first for first, last in itertools.pairwise(bounds)), default=0)
    per_segment = _chunks_of_segment(-(-length // chunk), programs, wanted)
    per_segment = min(per_segment, max(1, -(-longest // chunk)))
    chunk_rows: list[tuple[int, int]] = []
    segment_rows: list[tuple[int, int, int]] = []
    first_segment = [0]
    steps = per_segment * chunk
    for first, last in itertools.pairwise(bounds):
        for start in range(first, last, steps) or (first,):
            end = min(start + steps, last)
            segment_rows.append((start, end, len(chunk_rows)))
            chunk_rows.extend((t, min(t + chunk, end)) for t in range(start, end, chunk))
        first_segment.append(len(segment_rows))
    segmented = len(segment_rows) > len(bounds) - 1
    tables = (
        torch.tensor(rows, dtype=torch.int32, device=cu_seqlens.device)
        for rows in (chunk_rows, segment_rows, first_segment)
    )
    return Layout(chunk, len(chunk_rows), 0, len(segment_rows), 0, per_segment, segmented), Tables(*tables)


def _chunks_of_segment(chunks: int, programs: int, wanted: int) -> int:
    """Whole sequences of `chunks` chunks if they fill the chip; a segment is worth its overhead from 8 chunks on."""
    segments = max(1, wanted // max(1, programs))
    return max(-(-chunks // segments), min(chunks, 8), 1)


@triton.jit
def chunk_place(table, chunk, length, chunks_of_sequence, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """The sequence of the batch, the first step and the end of a chunk."""
    if PACKED:
        batch = chunk * 0
        start = tl.load(table + chunk * 2)
        end = tl.load(table + chunk * 2 + 1)
    else:
        batch = chunk // chunks_of_sequence
        start = (chunk % chunks_of_sequence) * CHUNK
        end = tl.minimum(start + CHUNK, length)
    return batch, start, end


@triton.jit
def segment_place(
    table, segment, length, chunks_of_sequence, segments_of_sequence, chunks_of_segment,
    CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sequence of the batch, the first step, the end and the first chunk of a segment."""
    if PACKED:
        batch = segment * 0
        start = tl.load(table + segment * 3)
        end = tl.load(table + segment * 3 + 1)
        chunk = tl.load(table + segment * 3 + 2)
    else:
        batch = segment // segments_of_sequence
        index = segment % segments_of_sequence
        start = index * chunks_of_segment * CHUNK
        end = tl.minimum(start + chunks_of_segment * CHUNK, length)
        chunk = batch * chunks_of_sequence + index * chunks_of_segment
    return batch, start, end, chunk
