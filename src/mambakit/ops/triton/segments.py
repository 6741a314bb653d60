"""Segments: the pieces of sequences that programs of a scan over the length work on side by side.

A sequence is cut into segments of `size` steps from its start, the last one shorter. Sequences of a batch are all of
one length, and a program works out its segment from its number; those of a pack are looked up in a table, made on the
device, whose length is bounded without reading `cu_seqlens`: pieces that no sequence fills have `end <= start`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mambakit.ops.packing import sequence_bounds

FIELDS = tl.constexpr(5)  # of a row of the table: start, end, start of the sequence, its end, its number


def segment_counts(batch: int, length: int, sequences: int, size: int, *, packed: bool) -> tuple[int, int]:
    """How many segments there are in all, those that stay empty included, and in every sequence of a batch (0 for a
    pack)."""
    if packed:
        return length // size + sequences, 0
    each = -(-length // size)
    return batch * each, each


def tables(cu_seqlens: Tensor | None, length: int, size: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Of a pack, (segments, FIELDS) int64, and the first segment of each sequence, (sequences + 1,) int64; else None.

    Raises ValueError when `cu_seqlens` does not rise from 0 to `length`: read once for each tensor, not each call.
    """
    return (None, None) if cu_seqlens is None else _packed(cu_seqlens, length, size, count)


# Of each cu_seqlens seen and alive: its version and length when it was checked, and its tables by segment size and by
# the stream that makes them, for which alone they are there in time.
_SEEN: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def _packed(cu_seqlens: Tensor, length: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing can be read here
        return _tables(cu_seqlens, size, count)
    if cu_seqlens.is_inference():  # no version tells whether it has changed
        sequence_bounds(1, length, cu_seqlens)
        return _tables(cu_seqlens, size, count)
    state = (cu_seqlens._version, length)
    known = _SEEN.get(cu_seqlens)
    if known is None or known[0] != state:
        sequence_bounds(1, length, cu_seqlens)
        known = _SEEN[cu_seqlens] = (state, {})
    case = (size, torch.cuda.current_stream().cuda_stream if cu_seqlens.is_cuda else None)
    if case not in known[1]:
        known[1][case] = _tables(cu_seqlens, size, count)
    found: tuple[Tensor, Tensor] = known[1][case]
    return found


def _tables(cu_seqlens: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """What `tables` returns, of a pack."""
    bounds = cu_seqlens.to(torch.int64)
    pieces = (bounds[1:] - bounds[:-1] + size - 1) // size
    firsts = torch.cat([torch.zeros_like(bounds[:1]), pieces.cumsum(0)])
    numbers = torch.arange(count, device=bounds.device)
    if count == 0:
        return numbers.new_empty(0, 5), firsts
    sequence = torch.searchsorted(firsts[1:], numbers, right=True).clamp(max=len(pieces) - 1)
    first, last = bounds[sequence], bounds[sequence + 1]
    start = first + (numbers - firsts[sequence]) * size
    return torch.stack([start, torch.minimum(start + size, last), first, last, sequence], dim=1), firsts


@triton.jit
def locate(segment, table, length, size, each, PACKED: tl.constexpr):
    """(batch, sequence, start, end, start of the sequence, its end) of a segment, int64."""
    if PACKED:
        row = table + segment * FIELDS
        batch = segment.to(tl.int64) * 0
        start, end, first, last = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        sequence = tl.load(row + 4)
    else:
        batch = (segment // each).to(tl.int64)
        sequence = batch
        start = (segment % each).to(tl.int64) * size
        first = batch * 0
        last = first + length
        end = tl.minimum(start + size, last)
    return batch, sequence, start, end, first, last
