"""The cross entropy as it is written: -log of the share that softmax gives to the target."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """One number; see `mambakit.ops.cross_entropy`."""
    counts = targets != ignore_index
    rows = torch.arange(len(targets), device=targets.device)
    chosen = logits.log_softmax(dim=-1)[rows, targets.where(counts, 0)]
    total = -chosen.where(counts, 0).sum()
    return total / counts.sum() if reduction == "mean" else total
