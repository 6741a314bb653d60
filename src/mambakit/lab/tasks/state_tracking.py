"""Parity and modular arithmetic: tasks that need a state that turns, not one that only decays (arXiv 2603.15569).

    1 0 1 1          ->   1, the sum mod 2
    3 + 2 * 4 - 1 =  ->   0, the value mod 5; * before + and -, or from left to right; with brackets, if wanted

Training draws one length for each batch from [shortest, longest], and under a curriculum longest rises in stages to
its full value. `test` has the longest trained length, `ood` a greater one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.tasks.batch import Batch, check_positive, check_split, integers
from mambakit.training.batches import derived_seed

PLUS, MINUS, TIMES, OPEN, CLOSE, EQUALS = range(6)  # after the numbers


@dataclass(frozen=True)
class SequenceLengths:
    """How long sequences are, as training goes on.

    Attributes:
        shortest, longest: of training, both included.
        unseen: the length of the split `ood`.
        stages: of the curriculum, in which the longest rises in equal parts; 1 for none.
        first_longest: the longest of the first stage; 0 for one of those parts above the shortest.
        length_step: between lengths of training; a GPU's steps are captured for each length of its own.
        stage_steps: of each stage but the last, which lasts.
        test_samples: of the splits `test` and `ood`, drawn from streams of their own.

    When training is done, the lengths longest, 2 longest, 4 longest and 8 longest are judged.
    """

    shortest: int = 3
    longest: int = 40
    unseen: int = 160
    stages: int = 1
    first_longest: int = 0
    length_step: int = 1
    stage_steps: int = 10_000
    test_samples: int = 1_000
    groups: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ("train", "test", "ood")

    def __post_init__(self) -> None:
        check_positive(self, "shortest", "stages", "length_step", "stage_steps", "test_samples")
        if self.first_longest and not self.shortest <= self.first_longest <= self.longest:
            raise DataError(
                f"first_longest must be 0 or from shortest to longest, {self.shortest} to {self.longest}, "
                f"got {self.first_longest}"
            )
        if not self.shortest <= self.longest <= self.unseen:
            raise DataError(
                f"shortest, longest and unseen must rise, got {self.shortest}, {self.longest} and {self.unseen}"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.longest << doubled for doubled in range(4))

    def samples(self, split: str) -> int | None:
        return None if split == "train" else self.test_samples

    def length_at(self, step: int, split: str) -> int:
        if split != "train":
            return self.longest if split == "test" else self.unseen
        greatest = self._longest_of_stage(min(self.stages, 1 + step // self.stage_steps))
        # Of the step alone, so that models of different seeds, trained as one, have batches of one shape.
        lengths = range(self.shortest, greatest + 1, self.length_step)
        return lengths[derived_seed(step) % len(lengths)]

    def _longest_of_stage(self, stage: int) -> int:
        """Of stage 1, 2, ..."""
        if not self.first_longest:
            return self.shortest + (self.longest - self.shortest) * stage // self.stages
        if stage == self.stages:
            return self.longest
        return self.first_longest + (self.longest - self.first_longest) * (stage - 1) // (self.stages - 1)


@dataclass(frozen=True)
class Parity(SequenceLengths):
    """The sum of bits mod 2.

    Lengths, curriculum and samples are set as in `SequenceLengths`.

    Attributes:
        supervise: "last" asks for the parity at the last position, "every" for that of every prefix.
    """

    name: ClassVar[str] = "parity"

    supervise: str = "last"
    vocabulary: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.supervise not in ("last", "every"):
            raise DataError(f"supervise must be last or every, got {self.supervise!r}")
        if self.vocabulary < 2:
            raise DataError(f"vocabulary must be at least 2, got {self.vocabulary}")

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """(size, length) tokens and the answers asked for."""
        check_split(self, split)
        tokens = integers(0, 1, (size, length), generator)
        sums = tokens.cumsum(1) % 2
        return Batch(tokens, sums if self.supervise == "every" else sums[:, -1:], tokens.new_zeros(size))


@dataclass(frozen=True)
class ModularArithmetic(SequenceLengths):
    """The value of an expression mod 5 or another number, asked for at the equals sign that ends it.

    Lengths, curriculum and samples are set as in `SequenceLengths`. Lengths count tokens without the equals sign;
    without brackets they are odd, an even one meaning the next lower.

    Attributes:
        modulus: numbers are 0, ..., modulus - 1; the signs + - * ( ) = follow them in the vocabulary.
        precedence: * before + and - when there are no brackets; without it they are taken from left to right.
        brackets: expressions with brackets around every operation.
        structures: with brackets, how many ways of bracketing a batch has; its samples are spread over them.
    """

    name: ClassVar[str] = "modular-arithmetic"

    modulus: int = 5
    precedence: bool = True
    brackets: bool = False
    structures: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "structures")
        if self.modulus < 2:
            raise DataError(f"modulus must be at least 2, got {self.modulus}")

    @property
    def vocabulary(self) -> int:
        return self.modulus + 6

    def batch(self, split: str, size: int, length: int, generator: torch.Generator) -> Batch:
        """(size, length or fewer, and one) tokens and (size, 1) answers."""
        check_split(self, split)
        if self.brackets:
            shares = [len(part) for part in torch.arange(size).tensor_split(min(self.structures, size))]
            drawn = [self._bracketed(length, share, generator) for share in shares]
            tokens, value = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        else:
            tokens, value = self._flat((length + 1) // 2, size, generator)
        equals = torch.full((size, 1), self.modulus + EQUALS, device=generator.device)
        return Batch(torch.cat([tokens, equals], dim=1), value[:, None] % self.modulus, value.new_zeros(size))

    def _flat(self, numbers: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(size, 2 numbers - 1) tokens and their value."""
        operands = integers(0, self.modulus - 1, (size, numbers), generator)
        signs = integers(PLUS, TIMES, (size, numbers - 1), generator)
        tokens = operands.new_empty(size, 2 * numbers - 1)
        tokens[:, ::2], tokens[:, 1::2] = operands, self.modulus + signs
        slope, added = self._composed(signs, operands[:, 1:])
        return tokens, slope * operands[:, 0] + added

    def _composed(self, signs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """What the rest of an expression makes of its first number: a slope and what is added, (size,) each.

        From left to right there is a total of the finished terms, 0 at first, and a term, at first that number. A sign
        and a number make them total + p term + q and r term + w, and so do any that follow each other: neighbours are
        put together until one is left, in few operations for all samples and signs.
        """
        times = signs == TIMES
        signed = torch.where(signs == MINUS, -numbers, numbers)
        zero = torch.zeros_like(signs)
        ends = ~times if self.precedence else zero  # whether the term is finished
        kept = torch.where(times, numbers, zero if self.precedence else 1)
        maps = torch.stack([ends.long(), zero, kept, signed.where(~times, zero)])  # p, q, r, w
        nothing = maps.new_zeros(4, len(signs), 1)
        nothing[2] = 1
        if not maps.shape[2]:
            maps = nothing
        while maps.shape[2] > 1:
            if maps.shape[2] % 2:
                maps = torch.cat([maps, nothing], dim=2)
            p, q, r, w = maps[:, :, ::2]
            then_p, then_q, then_r, then_w = maps[:, :, 1::2]
            maps = torch.stack([p + then_p * r, q + then_q + then_p * w, then_r * r, then_r * w + then_w])
            maps %= self.modulus
        p, q, r, w = maps[:, :, 0]
        return p + r, q + w

    def _bracketed(self, length: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(size, length) tokens and their value: a number, -number, or (left sign right), each side such again."""
        if length <= 2:
            number = integers(0, self.modulus - 1, (size, 1), generator)
            if length == 1:
                return number, number[:, 0]
            return torch.cat([self._sign(MINUS, number), number], dim=1), -number[:, 0]
        if length <= 4:  # no operation fits: brackets around less
            tokens, value = self._bracketed(length - 2, size, generator)
            return torch.cat([self._sign(OPEN, tokens), tokens, self._sign(CLOSE, tokens)], dim=1), value
        share = torch.rand((), generator=generator, device=generator.device)
        left_length = 1 + min(length - 5, int(share * (length - 4)))
        left, a = self._bracketed(left_length, size, generator)
        right, b = self._bracketed(length - 3 - left_length, size, generator)
        sign = integers(PLUS, TIMES, (size,), generator)
        value = torch.where(sign == PLUS, a + b, torch.where(sign == MINUS, a - b, a * b)) % self.modulus
        ends = self._sign(OPEN, left), self._sign(CLOSE, left)
        return torch.cat([ends[0], left, self.modulus + sign[:, None], right, ends[1]], dim=1), value

    def _sign(self, sign: int, like: Tensor) -> Tensor:
        return torch.full_like(like[:, :1], self.modulus + sign)
