"""Selective copying (arXiv 2312.00752, section 4.1.1): data tokens lie scattered in noise; repeat them in their order.

    noise 7 noise noise 3 noise ... marker marker ...   ->   7 3 ..., one for each marker

Token 0 is noise, the last token of the vocabulary the marker, those between are data. The tokens before the markers
number `length`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mambakit.errors import DataError
from mambakit.lab.tasks.batch import Batch, check_positive, check_split, integers


@dataclass(frozen=True)
class SelectiveCopying:
    """Data tokens scattered in noise, to be repeated in their order.

    Attributes:
        length: tokens before the markers, noise and data.
        data_tokens: how many are to be copied.
        vocabulary: noise, the marker, and the rest data.
        test_samples: of the test split, which is drawn from a stream of its own.
    """

    name: ClassVar[str] = "selective-copying"

    length: int = 4096
    data_tokens: int = 16
    vocabulary: int = 16
    test_samples: int = 256
    groups: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    lengths: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        check_positive(self, "data_tokens", "test_samples")
        if self.length < self.data_tokens:
            raise DataError(f"length must hold the {self.data_tokens} data tokens, got {self.length}")
        if self.vocabulary < 4:
            raise DataError(f"vocabulary must hold noise, marker and two data tokens, got {self.vocabulary}")

    def samples(self, split: str) -> int | None:
        return None if split == "train" else self.test_samples

    def length_at(self, step: int, split: str) -> int:
        return self.length + self.data_tokens

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """(size, length) tokens and (size, data_tokens) answers."""
        check_split(self, split)
        context = length - self.data_tokens
        data = integers(1, self.vocabulary - 2, (size, self.data_tokens), generator)
        places = torch.rand(size, context, generator=generator, device=generator.device).topk(self.data_tokens, dim=1)
        tokens = torch.zeros(size, length, dtype=torch.int64, device=generator.device)
        tokens.scatter_(1, places.indices.sort(dim=1).values, data)
        tokens[:, context:] = self.vocabulary - 1
        return Batch(tokens, data, data.new_zeros(size))
