"""Which tokens of a batch belong to which sequence: padding taken out, documents kept apart.

A batch with padding, or with several documents in a row, becomes one pack of sequences laid end to end, for which the
core's layers give what the sequences give alone. A padded position so leaves every state untouched, in every mixer.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not to be predicted


@dataclass(frozen=True)
class Packing:
    """A batch (batch, length) of tokens, seen as sequences."""

    real: Tensor  # (batch, length) bool, False for padding
    starts: Tensor  # (batch, length) bool, True for the first token of each sequence
    cu_seqlens: Tensor  # (sequences + 1,) int32
    one_a_row: bool  # whether each row is one sequence, so that states are those of the rows

    def pack(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) to (1, tokens, width)."""
        return hidden[self.real][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, tokens, width) to (batch, length, width), zero for padding."""
        hidden = packed.new_zeros(*self.real.shape, packed.shape[-1])
        return hidden.masked_scatter(self.real[..., None], packed[0])

    def labels(self, labels: Tensor) -> Tensor:
        """Labels without those of first tokens, which would be predicted from another document, or from padding."""
        return labels.masked_fill(self.starts, IGNORED)


def packing_of(
    batch: int,
    length: int,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Packing | None:
    """How a batch is packed; None for one without padding and with one sequence a row.

    Args:
        attention_mask: (batch, past + length), 0 for padding; what stands for the past is left out.
        position_ids: (batch, length) or (1, length); a document starts wherever the position is 0.
        cu_seqlens: (sequences + 1,), the documents' bounds in a batch of one without padding.

    Raises ValueError for shapes that don't fit.
    """
    real = _real(batch, length, attention_mask)
    if cu_seqlens is not None:
        if batch != 1 or real is not None:
            raise ValueError("cu_seqlens needs a batch of one row without padding")
        bounds = cu_seqlens.to(torch.int32)
        if bounds.dim() != 1 or bounds.shape[0] < 2 or bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {bounds.tolist()}")
        starts = torch.zeros(1, length, dtype=torch.bool, device=bounds.device)
        starts[0, bounds[:-1][bounds[:-1] < length].long()] = True
        return Packing(torch.ones_like(starts), starts, bounds, one_a_row=bounds.shape[0] == 2)
    resets = None if position_ids is None else _resets(batch, length, position_ids)
    if real is None and (resets is None or not resets[:, 1:].any()):
        return None
    if real is None:
        assert resets is not None
        real = torch.ones_like(resets)
    first = real & (real.cumsum(1) == 1)
    starts = first if resets is None else real & (first | resets)
    if torch.equal(starts, first):
        # Rows of padding alone are sequences too, of no tokens: states stay with their rows.
        return Packing(real, starts, _bounds(real.sum(1)), one_a_row=True)
    packed_starts = starts[real].nonzero()[:, 0]
    ends = torch.cat([packed_starts[1:], real.sum()[None]])
    return Packing(real, starts, _bounds(ends - packed_starts), one_a_row=False)


def _bounds(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _real(batch: int, length: int, attention_mask: Tensor | None) -> Tensor | None:
    """(batch, length) of the tokens that are no padding; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must have shape (batch, past + length) with batch {batch} and at least {length} columns, "
            f"got {tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, attention_mask.shape[1] - length :] != 0
    return None if real.all() else real


def _resets(batch: int, length: int, position_ids: Tensor) -> Tensor:
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids must have shape ({batch}, {length}), got {tuple(position_ids.shape)}")
    return (position_ids == 0).expand(batch, length)
