"""What a task is: a source of batches whose splits can't overlap, and the accuracies that it is judged by.

A task is a frozen dataclass of plain settings. `batch` draws samples on the device of the generator that it is given:
the same settings, split and generator give the same samples. Answers are asked for at the last positions only, so that
a model need not compute logits anywhere else.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from mambakit.errors import DataError

IGNORED = -100
"""The target at a position where nothing is asked for; torch's cross entropy skips it."""


class Batch(NamedTuple):
    """Sequences and what is asked about them."""

    tokens: Tensor  # (batch, length) int64
    targets: Tensor  # (batch, answers) int64, of the last `answers` positions; IGNORED where nothing is asked for
    group: Tensor  # (batch,) int64, the place of a sample's kind in the task's `groups`; 0 where it has none


class Task(Protocol):
    """A synthetic task; its settings are the fields of a frozen dataclass."""

    name: ClassVar[str]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the kinds of samples that accuracies are told apart by; empty for none."""

    @property
    def vocabulary(self) -> int:
        """Tokens are 0, 1, ..., vocabulary - 1."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits; the first is trained on."""

    def samples(self, split: str) -> int | None:
        """How many samples the split has, drawn once and gone through in epochs; None: each batch is drawn afresh."""

    def length_at(self, step: int, split: str) -> int:
        """Tokens of the sequences at a step of the training, or of an evaluation after it."""

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """`size` samples of `length` tokens, on the generator's device."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths to extrapolate to, when training is done; empty for a task of one length."""


class Accuracy(NamedTuple):
    """Shares in [0, 1] of what was answered right."""

    token: float  # of the answers
    sequence: float  # of the sequences, with every answer right


def right_answers(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each sequence, how many answers are right and how many there are; (batch,) int64 each.

    Args:
        logits: (batch, answers, vocabulary).
        targets: (batch, answers).
    """
    asked = targets != IGNORED
    right = (logits.argmax(-1) == targets) & asked
    return right.sum(-1), asked.sum(-1)


def accuracy(logits: Tensor, targets: Tensor) -> Accuracy:
    """Token and sequence accuracy of logits (batch, answers, vocabulary) for targets (batch, answers)."""
    right, asked = right_answers(logits, targets)
    return Accuracy(float(right.sum() / asked.sum()), float((right == asked).float().mean()))


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform integers of [low, high], both included, on the generator's device."""
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


def distinct(low: int, high: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(rows, count) uniform integers of [low, high], both included, distinct within a row."""
    rows, count = shape
    order = torch.rand(rows, high - low + 1, generator=generator, device=generator.device)
    return order.topk(count, dim=1).indices + low


def check_split(task: Task, split: str) -> None:
    """Raise DataError for a split that the task does not have."""
    if split not in task.splits:
        raise DataError(f"split must be one of {', '.join(task.splits)} for the task {task.name}, got {split!r}")


def check_positive(task: Any, *names: str) -> None:
    """Raise DataError for a field among `names` that is not at least 1."""
    for name in names:
        if getattr(task, name) < 1:
            raise DataError(f"{name} of the task {task.name} must be at least 1, got {getattr(task, name)}")
