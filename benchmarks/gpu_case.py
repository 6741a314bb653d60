"""One measured case on a GPU: inputs for ours and its peers, what the hardware allows, how exact each is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS = "mambakit"  # by which the contenders have ours


@dataclass(frozen=True)
class Floor:
    """What an operation can't do without: device memory moved once, matrix products, exponentials."""

    bytes: float
    matrix_operations: float = 0.0  # a multiplication and an addition are two
    exponentials: float = 0.0

    def milliseconds(self, ceilings: "Ceilings") -> float:
        """The longest of the three times: no version runs faster."""
        exponentials = self.exponentials / ceilings.exponentials_a_second
        products = self.matrix_operations / ceilings.matrix_operations_a_second
        return 1e3 * max(self.bytes / ceilings.bytes_a_second, products, exponentials)


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches, measured: a large copy, a large bfloat16 product; exponentials from its clock."""

    bytes_a_second: float
    matrix_operations_a_second: float
    exponentials_a_second: float


@dataclass(frozen=True)
class Contender:
    """One implementation on the inputs of a case."""

    forward: Callable[[], Any]
    forward_backward: Callable[[], Any] | None = None
    results: Callable[[], Mapping[str, Tensor]] | None = None
    """Outputs and gradients by name, to hold against those of float64."""
    once: bool = False
    """Whether it is so slow that one run, without another to warm up, has to do; it warms itself up when built."""


@dataclass(frozen=True)
class Case:
    """Implementations on one shape and dtype.

    `contenders` build an implementation on its inputs when its turn comes, and raise ImportError where a peer is absent
    and NotImplementedError where it refuses the case. The goals of each rival are its times over ours, for the forward
    and for both passes; None where there is no goal.
    """

    operation: str  # "selective scan"
    shape: str  # "(8, 2048, 2048, 16)", spelled as the page of the table spells it
    dtype: torch.dtype
    contenders: Mapping[str, Callable[[], Contender]]  # ours among them
    goals: Mapping[str, tuple[float | None, float | None]]
    forward_floor: Floor
    forward_backward_floor: Floor | None = None
    exact: Callable[[], Mapping[str, Tensor]] | None = None
    """What `results` gives in float64, of a shape small enough for it."""
    notes: tuple[str, ...] = field(default=())
