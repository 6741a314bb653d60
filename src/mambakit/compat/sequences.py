"""Packed sequences as mamba_ssm marks them: `seq_idx` (batch, length), the number of the sequence of each position.

Here sequences lie end to end in one row, with their bounds in `cu_seqlens`: the rows of a batch are joined, and a new
sequence begins wherever the number changes or a row begins.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.errors import DataError


class Runs(NamedTuple):
    """The sequences in the joined rows of a batch."""

    cu_seqlens: Tensor  # (sequences + 1,)
    numbers: Tensor  # (sequences,), their seq_idx
    first: Tensor  # (batch,), the first sequence of each row
    last: Tensor  # (batch,), the last sequence of each row


def runs_of(seq_idx: Tensor, batch: int, length: int) -> Runs:
    """Where the sequences of `seq_idx` (batch, length) begin and end.

    Raises DataError where the shape is another, the length is 0, or positions of one number are apart.
    """
    if tuple(seq_idx.shape) != (batch, length) or length == 0:
        raise DataError(f"seq_idx must have shape (batch, length) = {(batch, length)}, got {tuple(seq_idx.shape)}")
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    begins = starts.flatten().nonzero().flatten()
    numbers = seq_idx.flatten()[begins]
    rows = begins // length
    if torch.stack([rows, numbers.long()]).unique(dim=1).shape[1] != begins.shape[0]:
        raise DataError("the positions of one sequence in seq_idx must be neighbours; number the sequences in order")
    counts = torch.bincount(rows, minlength=batch)
    last = counts.cumsum(0) - 1
    end = begins.new_tensor([batch * length])
    return Runs(torch.cat([begins, end]), numbers, last - counts + 1, last)


def joined(tensor: Tensor) -> Tensor:
    """(batch, length, ...) as one row, (1, batch * length, ...)."""
    return tensor.reshape(1, -1, *tensor.shape[2:])


def states_of_runs(states: Tensor | None, runs: Runs, carries: Tensor | None = None) -> Tensor | None:
    """What each sequence starts from: its row's state, for the first of a row where `carries` (batch,) says so."""
    if states is None:
        return None
    every = states.new_zeros(runs.numbers.shape[0], *states.shape[1:])
    own = states if carries is None else states * carries.view(-1, *[1] * (states.dim() - 1)).to(states.dtype)
    return every.index_copy(0, runs.first, own)
