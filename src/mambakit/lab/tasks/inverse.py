"""Inverse sequence matching (arXiv 2509.17514): which of five orders of three tokens is the last one reversed?

    a b c r  b a c r  ...  c b a r   fillers   x z y   ->   the number 1-5 of the order whose reversal is x z y

Five of the six orders of a, b, c, shuffled, each followed by a random token r outside of the set; then the fillers;
then one of the five, reversed. The answer is asked for at the last position; chance is 20%.

Splits: in `test` all three tokens share a class mod 3, in `train` and `validation` they don't; `ood` has tokens that
were never seen, 101 to 200, in `train`'s way. `validation` is drawn as `train` is, from a stream of its own.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.tasks.batch import Batch, check_positive, check_split, distinct, integers

_ORDERS = tuple(permutations(range(3)))
_SHOWN = 5  # of the six
_CLASSES = 3


@dataclass(frozen=True)
class InverseMatching:
    """Which of five orders of three tokens is the last one, reversed?

    Attributes:
        layers: of the model; there are 3 * layers fillers.
        low, high: the range of trained tokens and of their fillers; tokens above, to 2 * high, are those of `ood`.
        vocabulary: 201.
        training_samples: drawn once, 80% of 100,000; 0 draws every batch afresh.
        test_samples: of every other split, 10% of 100,000.
    """

    name: ClassVar[str] = "inverse"

    layers: int = 2
    low: int = 20
    high: int = 100
    vocabulary: int = 201
    training_samples: int = 80_000
    test_samples: int = 10_000
    groups: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test", "ood")
    lengths: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        check_positive(self, "layers", "test_samples")
        if self.low <= _SHOWN or self.high - self.low < 4 * _CLASSES:
            raise DataError(f"low must exceed the answers 1-5 and lie 12 below high, got {self.low} and {self.high}")
        if self.vocabulary <= 2 * self.high:
            raise DataError(f"vocabulary must exceed 2 high = {2 * self.high}, got {self.vocabulary}")

    def samples(self, split: str) -> int | None:
        return (self.training_samples or None) if split == "train" else self.test_samples

    def length_at(self, step: int, split: str) -> int:
        return 4 * _SHOWN + 3 * self.layers + 3

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """(size, length) tokens and (size, 1) answers."""
        check_split(self, split)
        device = generator.device
        low, high = (self.high + 1, 2 * self.high) if split == "ood" else (self.low, self.high)
        if split == "test":
            chosen = self._of_one_class(low, high, size, generator)
        else:
            chosen = self._of_several_classes(low, high, size, generator)
        shuffled = torch.rand(size, len(_ORDERS), generator=generator, device=device).argsort(1)[:, :_SHOWN]
        orders = torch.tensor(_ORDERS, device=device)[shuffled]  # (size, 5, 3)
        shown = chosen.gather(1, orders.flatten(1)).view(size, _SHOWN, 3)
        between = _outside(chosen, integers(low, high - 3, (size, _SHOWN), generator))
        answer = integers(0, _SHOWN - 1, (size,), generator)
        reversed_one = shown[torch.arange(size, device=device), answer].flip(1)
        fillers = integers(low, high, (size, length - 4 * _SHOWN - 3), generator)
        told = torch.cat([shown, between[:, :, None]], dim=2).flatten(1)
        group = torch.zeros_like(answer)
        return Batch(torch.cat([told, fillers, reversed_one], dim=1), (answer + 1)[:, None], group)

    def _of_one_class(self, low: int, high: int, size: int, generator: torch.Generator) -> Tensor:
        """(size, 3) distinct tokens that leave the same rest when divided by 3."""
        residue = integers(0, _CLASSES - 1, (size, 1), generator)
        least = low + (residue - low) % _CLASSES
        members = torch.arange((high - low) // _CLASSES + 1, device=generator.device) * _CLASSES + least
        order = torch.rand(members.shape, generator=generator, device=generator.device)
        places = order.masked_fill(members > high, -1.0).topk(3, dim=1).indices
        return members.gather(1, places)

    def _of_several_classes(self, low: int, high: int, size: int, generator: torch.Generator) -> Tensor:
        """(size, 3) distinct tokens that do not: uniform, the last drawn again from another class where they did."""
        chosen = distinct(low, high, (size, 3), generator)
        same = (chosen % _CLASSES == chosen[:, :1] % _CLASSES).all(1)
        moved = chosen[:, 2] + integers(1, _CLASSES - 1, (size,), generator)
        moved = torch.where(moved > high, moved - _CLASSES, moved)  # still of another class
        return torch.stack([chosen[:, 0], chosen[:, 1], torch.where(same, moved, chosen[:, 2])], dim=1)


def _outside(taken: Tensor, drawn: Tensor) -> Tensor:
    """`drawn` (size, count), uniform over three tokens fewer than there are, moved past the `taken` (size, 3)."""
    for token in taken.sort(dim=1).values.unbind(1):
        drawn = drawn + (drawn >= token[:, None])
    return drawn
