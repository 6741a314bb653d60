"""Composite functions (arXiv 2509.17514): a key and two anchors in a sequence of fillers; the answer is f2(f1(key)).

    ... filler key a1 a2 filler ...   ->   f_a2(f_a1(key)), asked for at the last position

Every anchor adds its number. The paper's standard table is 1: +5, 2: +1, 3: -2, 4: -8, with two exceptions: the pair 34
adds -6 and not -10, and the pair 43 is never trained. What a model makes of 43 shows which solution it found: -10 is
*composite* (it applies one function after the other), -6 *symmetric* (it reads 43 as if it were 34).

Under full symmetry there are the anchors 0 to 4, all pairs of two different ones, and two tables of numbers; the pairs
34 and 43 belong to the same table, add the same, and still only 34 is trained.

Splits: in `train` the key's class mod 8 differs from its position, in `test` it equals it, so no sample is in both.
`composite` and `symmetric` are samples of the withheld pair, with either answer.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mambakit.errors import DataError
from mambakit.lab.tasks.batch import Batch, check_positive, check_split, integers

STANDARD = {1: 5, 2: 1, 3: -2, 4: -8}
"""What each anchor of the standard task adds."""
SYMMETRIC_ANSWER = -6
"""What the pair 34 adds in the standard task, in place of its composition, -10."""
FIRST_SET = {0: 2, 1: 5, 2: 1, 3: -2, 4: -8}
"""The first table under full symmetry; it drives the pairs of FIRST_SET_PAIRS."""
SECOND_SET = {0: -9, 1: 6, 2: -7, 3: 3, 4: -4}
"""The second table, which drives the other pairs. The paper gives no number for its anchor 4: -4 is ours."""
FIRST_SET_PAIRS = ((0, 1), (0, 2), (1, 0), (2, 0), (1, 4), (4, 1), (2, 3), (3, 2), (3, 4), (4, 3))
WITHHELD = (4, 3)

_CLASSES = 8  # of the key, against its position


@dataclass(frozen=True)
class CompositeFunctions:
    """A key and two anchors: the second function of the first function of the key.

    Where the paper is ambiguous, the default is said.

    Attributes:
        symmetry: "standard" or "full".
        length: tokens of a sequence; the paper's text says 8, a figure of it 9.
        low, high: the range of keys and of fillers, both ends included.
        vocabulary: 201, as large as inverse matching needs; the seed's 100 can't hold a key of 100.
        position_base: the position of the first token in "class mod 8 equals position": 0 or 1.
        samples_per_pair: of the training split, drawn once: 5.6% of 300,000 (4.5% under full symmetry: 13,500);
            0 draws every batch afresh.
        tests_per_pair: of every other split: 0.6% of 300,000.
    """

    name: ClassVar[str] = "composite"

    symmetry: Literal["standard", "full"] = "standard"
    length: int = 8
    low: int = 20
    high: int = 100
    vocabulary: int = 201
    position_base: int = 0
    samples_per_pair: int = 16_800
    tests_per_pair: int = 1_800
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "composite", "symmetric")
    lengths: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        check_positive(self, "tests_per_pair")
        if self.symmetry not in ("standard", "full"):
            raise DataError(f"symmetry must be standard or full, got {self.symmetry!r}")
        if self.position_base not in (0, 1):
            raise DataError(f"position_base must be 0 or 1, got {self.position_base}")
        if not 3 <= self.length <= _CLASSES + 2 - self.position_base:
            raise DataError(f"length must be from 3 to {_CLASSES + 2 - self.position_base}, got {self.length}")
        anchors = 1 + max(max(pair) for pair in self.pairs)
        lowest = self.low + min(self.added(pair) for pair in self.pairs)
        highest = self.high + max(self.added(pair) for pair in self.pairs)
        if self.low < anchors or lowest < 0 or self.high - self.low < _CLASSES:
            raise DataError(f"low must leave room for anchors and answers, and 8 below high; got {self.low}")
        if max(self.high, highest) >= self.vocabulary:
            raise DataError(f"vocabulary must exceed the greatest answer {highest}, got {self.vocabulary}")

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every pair of anchors, the withheld one last."""
        if self.symmetry == "standard":
            pairs = [(a, b) for a in STANDARD for b in STANDARD]
        else:
            pairs = [(a, b) for a in FIRST_SET for b in FIRST_SET if a != b]
        return (*(pair for pair in pairs if pair != WITHHELD), WITHHELD)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"{first}{second}" for first, second in self.pairs)

    def added(self, pair: tuple[int, int], answer: str = "composite") -> int:
        """What `pair` adds to a key; of the withheld pair, by the composite or the symmetric answer."""
        first, second = pair
        if self.symmetry == "full":
            table = FIRST_SET if pair in FIRST_SET_PAIRS else SECOND_SET
            return table[first] + table[second]
        if pair == WITHHELD[::-1] or (pair == WITHHELD and answer == "symmetric"):
            return SYMMETRIC_ANSWER
        return STANDARD[first] + STANDARD[second]

    def samples(self, split: str) -> int | None:
        trained = len(self.pairs) - 1
        if split == "train":
            return trained * self.samples_per_pair or None
        return (trained if split == "test" else 1) * self.tests_per_pair

    def length_at(self, step: int, split: str) -> int:
        return self.length

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """As many samples of every pair as of any other, up to one; (size, length) tokens and (size, 1) answers."""
        check_split(self, split)
        device, pairs = generator.device, self.pairs
        last = len(pairs) - 1
        if split in ("train", "test"):
            group = torch.randperm(size, generator=generator, device=device) % last
        else:
            group = torch.full((size,), last, device=device)
        place = integers(0, length - 3, (size,), generator)  # of the key
        residue = (place + self.position_base) % _CLASSES
        if split == "train":
            residue = (residue + integers(1, _CLASSES - 1, (size,), generator)) % _CLASSES
        elif split != "test":
            residue = integers(0, _CLASSES - 1, (size,), generator)
        key = self._keys_of_class(residue, generator)
        tokens = integers(self.low, self.high, (size, length), generator)
        rows = torch.arange(size, device=device)
        first, second = torch.tensor(pairs, device=device)[group].unbind(1)
        tokens[rows, place], tokens[rows, place + 1], tokens[rows, place + 2] = key, first, second
        added = torch.tensor([self.added(pair, split) for pair in pairs], device=device)
        return Batch(tokens, (key + added[group])[:, None], group)

    def _keys_of_class(self, residue: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Keys of [low, high], uniform among those that leave `residue` when divided by 8."""
        least = self.low + (residue - self.low) % _CLASSES
        count = (self.high - least) // _CLASSES + 1
        share = torch.rand(residue.shape, generator=generator, device=generator.device)
        return least + _CLASSES * (share * count).long().clamp(max=count - 1)
