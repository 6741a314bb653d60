"""The loss of a causal language model: each position predicts the label of the next."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mambakit import ops


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers calls ForCausalLMLoss, with its arguments; on a GPU no float32 copy of the logits is made.

    Args:
        logits: (batch, length, vocab_size), of any floating dtype.
        labels: (batch, length), `ignore_index` where nothing is to be predicted.
        vocab_size: classes.
        num_items_in_batch: what the sum is divided by; None for the number of labels that count.
        ignore_index: the label that does not count.
        shift_labels: (batch, length), labels already at the positions that predict them, in place of `labels`.
        kwargs: what transformers passes to losses of other kinds.
    """
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    rows, targets = logits.reshape(-1, vocab_size), targets.flatten().to(logits.device)
    if num_items_in_batch is None:
        return ops.cross_entropy(rows, targets, ignore_index=ignore_index)
    total = ops.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum")
    return total / (
        num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    )
