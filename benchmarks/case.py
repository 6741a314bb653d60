"""What a benchmark declares: our run, the peers' runs on the same inputs, the goals, and the floor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.floors import Floor, Rates

Run = Callable[[], object]


def times(ratio: float) -> str:
    """A ratio in three digits; one below 1 as its reciprocal: 1/1.5x."""
    if ratio >= 100:
        return f"{ratio:,.0f}x"
    return f"{ratio:.3g}x" if ratio >= 1 else f"1/{times(1 / ratio)}"


@dataclass(frozen=True)
class Goal:
    """The peer's time must be at least `least` times ours; below 1, ours may take up to 1 / `least` of its time."""

    least: float

    def __str__(self) -> str:
        return f">= {times(self.least)}"

    def met(self, ratio: float) -> bool:
        return ratio >= self.least


@dataclass(frozen=True)
class Peer:
    """Something to compare with.

    Attributes:
        name: as the table shows it.
        prepare: from the case's inputs to the function that is timed; ImportError where its library is missing.
        goal: the ratio to reach; None for information.
        once: a run takes minutes: it is run a single time, without warming up, and left out by --quick.
    """

    name: str
    prepare: Callable[[Any], Run]
    goal: Goal | None = None
    once: bool = False


@dataclass(frozen=True)
class Case:
    """One thing that is timed.

    Attributes:
        name: what it is; `--only` picks by it.
        shape: the sizes, in words.
        inputs: makes what ours and the peers share.
        ours: from the inputs to the function that is timed.
        peers: in the order of the table.
        floor: the least time that this machine could need; None where no bound is sharp enough to print.
    """

    name: str
    shape: str
    inputs: Callable[[], Any]
    ours: Callable[[Any], Run]
    peers: tuple[Peer, ...]
    floor: Callable[[Rates], Floor] | None = None
