"""Induction heads (arXiv 2312.00752, section 4.1.2): what followed the special token when it came before?

    3 7 * 5 2 ... 9 *   ->   5

The special token, the last of the vocabulary, comes once at a random place and once more at the end; the other tokens
are random. Training is at one length; `lengths` are those it is judged at afterwards.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mambakit.errors import DataError
from mambakit.lab.tasks.batch import Batch, check_positive, check_split, integers


@dataclass(frozen=True)
class InductionHeads:
    """What followed the special token when it came before?

    Attributes:
        length: tokens of a training sequence.
        vocabulary: the special token among them.
        longest: the lengths judged at the end are the powers of two from 64 to this one.
        test_samples: of the test split, which is drawn from a stream of its own.
    """

    name: ClassVar[str] = "induction"

    length: int = 256
    vocabulary: int = 16
    longest: int = 1 << 20
    test_samples: int = 1_000
    groups: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def __post_init__(self) -> None:
        check_positive(self, "test_samples")
        if self.length < 3:
            raise DataError(f"length must be at least 3, got {self.length}")
        if self.vocabulary < 3:
            raise DataError(f"vocabulary must be at least 3, got {self.vocabulary}")

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(1 << power for power in range(6, self.longest.bit_length()))

    def samples(self, split: str) -> int | None:
        return None if split == "train" else self.test_samples

    def length_at(self, step: int, split: str) -> int:
        return self.length

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """(size, length) tokens and (size, 1) answers."""
        check_split(self, split)
        special = self.vocabulary - 1
        tokens = integers(0, special - 1, (size, length), generator)
        place = integers(0, length - 3, (size, 1), generator)
        tokens.scatter_(1, place, special)
        tokens[:, -1] = special
        answer = tokens.gather(1, place + 1)
        return Batch(tokens, answer, answer.new_zeros(size))
