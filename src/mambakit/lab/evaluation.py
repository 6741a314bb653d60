"""How well models answer: loss and accuracies of every split, of every kind of sample, and at lengths never trained."""

from typing import Any

import torch
from torch import Tensor

from mambakit.lab.data import held_out
from mambakit.lab.grouped import GroupedModels, losses
from mambakit.lab.models import MambaForComposite
from mambakit.lab.tasks import Batch, Task
from mambakit.lab.tasks.batch import right_answers

_TOKENS_AT_ONCE = 1 << 24  # 128 MiB of them

SplitResult = dict[str, Any]
"""{"loss": nats, "token": share, "sequence": share, "groups": {name: share of sequences}}; None for what is not finite
or was not asked."""


@torch.no_grad()
def evaluate(grouped: GroupedModels, batch: Batch, batch_size: int, groups: tuple[str, ...]) -> list[SplitResult]:
    """What every model makes of `batch`, whose tensors are (models, samples, ...) each.

    Args:
        batch_size: samples that are looked at together.
        groups: names of the kinds that `batch.group` numbers.
    """
    models, samples = batch.tokens.shape[:2]
    device = batch.tokens.device
    sums = torch.zeros(models, 4, dtype=torch.float64, device=device)  # loss * answers, right, asked, whole sequences
    of_groups = torch.zeros(2, models, max(1, len(groups)), dtype=torch.float64, device=device)
    for start in range(0, samples, batch_size):
        tokens, targets, group = (part[:, start : start + batch_size] for part in batch)
        logits = grouped(tokens, targets.shape[2])
        right, asked = right_answers(logits, targets)  # (models, batch)
        whole = (right == asked).double()
        answers = asked.sum(1).double()
        sums += torch.stack([losses(logits, targets) * answers, right.sum(1), answers, whole.sum(1)], dim=1)
        of_groups[0].scatter_add_(1, group, whole)
        of_groups[1].scatter_add_(1, group, torch.ones_like(whole))
    found = []
    for (loss, right_tokens, asked_tokens, whole_ones), kinds in zip(
        sums.tolist(), of_groups.transpose(0, 1).tolist(), strict=True
    ):
        result: SplitResult = {
            "loss": finite(loss / asked_tokens),
            "token": right_tokens / asked_tokens,
            "sequence": whole_ones / samples,
        }
        if groups:
            shares = zip(groups, *kinds, strict=True)
            result["groups"] = {name: share / count for name, share, count in shares if count}
        found.append(result)
    return found


@torch.no_grad()
def accuracy_at_length(
    model: MambaForComposite, task: Task, length: int, samples: int, chunk: int, device: torch.device
) -> SplitResult:
    """Accuracies on sequences of `length` tokens, read `chunk` tokens at a time.

    Beside the tokens themselves memory is that of one chunk; attention's state alone grows with the sequence.
    """
    tokens_right = tokens_asked = whole = 0
    at_once = max(1, min(samples, _TOKENS_AT_ONCE // length))
    for first in range(0, samples, at_once):
        size = min(at_once, samples - first)
        tokens, targets, _ = held_out(task, "test", size, device, length, first)
        right, asked = right_answers(_chunked_logits(model, tokens, targets.shape[1], chunk), targets)
        tokens_right += int(right.sum())
        tokens_asked += int(asked.sum())
        whole += int((right == asked).sum())
    return {"token": tokens_right / tokens_asked, "sequence": whole / samples, "samples": samples}


def _chunked_logits(model: MambaForComposite, tokens: Tensor, answers: int, chunk: int) -> Tensor:
    """Logits of the last `answers` tokens, (batch, answers, vocabulary)."""
    state, start, kept = None, 0, []
    first_asked = tokens.shape[1] - answers
    for part in tokens.split(chunk, dim=1):
        hidden, state = model.read(part, state, start)
        kept.append(hidden[:, max(0, first_asked - start) :])
        start += part.shape[1]
    return model.head(torch.cat(kept, dim=1))


def finite(value: float) -> float | None:
    """`value`, or None where it is infinite or no number: JSON has neither."""
    return value if abs(value) < float("inf") else None
