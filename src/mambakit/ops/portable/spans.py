"""The spans of steps that a chunked operation walks through, in order."""

import itertools
from typing import NamedTuple

from torch import Tensor

from mambakit.ops.packing import sequence_bounds


class Span(NamedTuple):
    """At most one chunk of steps: of every sequence of a batch, or of one sequence of a pack."""

    start: int
    end: int
    states: slice  # its sequences, in the tensors of states
    slots: slice  # where the states before the span are kept

    def rows(self, tensor: Tensor) -> Tensor:
        """The steps of the span, from a tensor (batch, length, ...)."""
        return tensor[:, self.start : self.end]


def spans(batch: int, length: int, cu_seqlens: Tensor | None, chunk: int) -> list[Span]:
    """Spans of at most `chunk` steps that cover the batch, or the pack sequence by sequence."""
    if cu_seqlens is None:
        return [
            Span(t, min(t + chunk, length), slice(0, batch), slice(k * batch, (k + 1) * batch))
            for k, t in enumerate(range(0, length, chunk))
        ]
    found: list[Span] = []
    for s, (first, last) in enumerate(itertools.pairwise(sequence_bounds(batch, length, cu_seqlens))):
        for t in range(first, last, chunk):
            found.append(Span(t, min(t + chunk, last), slice(s, s + 1), slice(len(found), len(found) + 1)))
    return found
