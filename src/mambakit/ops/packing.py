"""Packed sequences: several sequences laid end to end along the length of a batch of one.

`cu_seqlens` (sequences + 1,) holds the cumulative lengths: sequence i occupies [cu_seqlens[i], cu_seqlens[i + 1]).
States are then per sequence: their first axis is `sequences` in place of `batch`.
"""

import itertools

import torch
from torch import Tensor


def sequence_count(batch: int, cu_seqlens: Tensor | None) -> int:
    """How many states there are: one for each sequence of the batch or of the pack."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_packing(batch: int, cu_seqlens: Tensor | None) -> None:
    """Raise unless `cu_seqlens` (if given) is a vector of integers that goes with a batch of one."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {batch}: lay the sequences end to end")


def sequence_bounds(batch: int, length: int, cu_seqlens: Tensor | None) -> list[int]:
    """Offsets of the sequences in the rows of the flattened (batch * length), and the end: sequences + 1 integers.

    Raises ValueError when `cu_seqlens` does not rise from 0 to `length`.
    """
    if cu_seqlens is None:
        return [index * length for index in range(batch + 1)]
    bounds: list[int] = cu_seqlens.tolist()
    rises = all(first <= second for first, second in itertools.pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != length or not rises:
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {bounds}")
    return bounds
