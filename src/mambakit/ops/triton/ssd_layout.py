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

from mambakit.ops.packing import sequence_bounds


class Layout(NamedTuple):
    """The cut of one call; the three tables are given for packed sequences alone."""

    batch: int
    length: int
    chunk: int  # steps
    chunks: int  # in all
    chunks_of_sequence: int
    segments: int  # in all
    segments_of_sequence: int
    chunks_of_segment: int
    segmented: bool  # whether a sequence has more than one segment
    chunk_table: Tensor | None  # (chunks, 2): first step and end
    segment_table: Tensor | None  # (segments, 3): first step, end and first chunk
    first_segment: Tensor | None  # (sequences + 1,)

    @property
    def places(self) -> int:
        """Rows of what is kept for every step."""
        return self.chunks * self.chunk


def cut(batch: int, length: int, cu_seqlens: Tensor | None, chunk: int, programs: int, wanted: int) -> Layout:
    """Cut a batch, or a pack, where each segment takes `programs` programs and `wanted` fill the chip."""
    if cu_seqlens is None:
        chunks = -(-length // chunk)
        per_segment = _chunks_of_segment(chunks, batch * programs, wanted)
        segments = max(1, -(-chunks // per_segment))
        counts = batch * chunks, chunks, batch * segments, segments, per_segment
        return Layout(batch, length, chunk, *counts, segments > 1, None, None, None)
    bounds = sequence_bounds(batch, length, cu_seqlens)
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
    return Layout(1, length, chunk, len(chunk_rows), 0, len(segment_rows), 0, per_segment, segmented, *tables)


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
    table,
    segment,
    length,
    chunks_of_sequence,
    segments_of_sequence,
    chunks_of_segment,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
):
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
