"""Multi-query associative recall, MQAR (Zoology, arXiv 2312.04927): pairs of keys and values, then keys asked for.

    k1 v1 k2 v2 k3 v3 | 9 k2 4 1 k1 6 ...   ->   v2 at k2, v1 at k1

Keys come from the lower half of the vocabulary, values from the upper; every key is asked for once, at an even place
after the pairs, near places being likelier: the probability of gap g falls as g^(power - 1). The other tokens are
random. Nothing else than the keys is asked for.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mambakit.errors import DataError
from mambakit.lab.tasks.batch import IGNORED, Batch, check_positive, check_split, distinct, integers


@dataclass(frozen=True)
class AssociativeRecall:
    """Pairs of keys and values, then the value of each key asked for.

    Attributes:
        length: tokens of a sequence, even.
        pairs: of keys and values.
        vocabulary: of keys, values and random tokens.
        power: of the law that gaps follow; 0.01 in Zoology, 1 for uniform.
        training_samples: drawn once; 0 draws every batch afresh.
        test_samples: of the test split, which is drawn from a stream of its own.
    """

    name: ClassVar[str] = "mqar"

    length: int = 64
    pairs: int = 4
    vocabulary: int = 8192
    power: float = 0.01
    training_samples: int = 100_000
    test_samples: int = 3_000
    groups: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    lengths: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        check_positive(self, "pairs", "test_samples")
        if self.length % 2 or self.length < 4 * self.pairs:
            raise DataError(f"length must be even and at least 4 * pairs = {4 * self.pairs}, got {self.length}")
        if self.vocabulary // 2 <= self.pairs:
            raise DataError(f"vocabulary must exceed twice the {self.pairs} pairs, got {self.vocabulary}")
        if not self.power > 0:
            raise DataError(f"power must be positive, got {self.power}")

    def samples(self, split: str) -> int | None:
        return (self.training_samples or None) if split == "train" else self.test_samples

    def length_at(self, step: int, split: str) -> int:
        return self.length

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """(size, length) tokens and (size, length - 2 pairs) answers, IGNORED where no key is asked for."""
        check_split(self, split)
        device, told = generator.device, 2 * self.pairs
        half = self.vocabulary // 2
        keys = distinct(1, half - 1, (size, self.pairs), generator)
        values = distinct(half, self.vocabulary - 1, (size, self.pairs), generator)
        gap = torch.arange(1, (length - told) // 2 + 1, device=device, dtype=torch.float32)
        likely = (gap ** (self.power - 1)).expand(size, -1)
        places = 2 * torch.multinomial(likely, self.pairs, generator=generator)
        asked = integers(0, self.vocabulary - 1, (size, length - told), generator).scatter_(1, places, keys)
        targets = torch.full_like(asked, IGNORED).scatter_(1, places, values)
        pairs = torch.stack([keys, values], dim=2).flatten(1)
        return Batch(torch.cat([pairs, asked], dim=1), targets, keys.new_zeros(size))
