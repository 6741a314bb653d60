"""Times functions that take turns in one process, so that whatever else the machine does falls on all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How often and how long."""

    turns: int = 7
    least_turns: int = 3
    turn_seconds: float = 0.15  # a fast function repeats within its turn: its caches are then its own
    budget_seconds: float = 45.0  # of all turns of a case; where a peer takes seconds there are fewer


@dataclass(frozen=True)
class Timing:
    """The times of one function, in milliseconds, in the order that they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a share of the median; 0 for a single run."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


def take_turns(runs: Mapping[str, Callable[[], object]], pace: Pace) -> dict[str, Timing]:
    """Time every function: once unmeasured to warm up, then in turns."""
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(pace.turns):
        if turn >= pace.least_turns and time.perf_counter() - start > pace.budget_seconds:
            break
        gc.collect()
        for name, run in runs.items():
            samples[name] += _turn(run, pace.turn_seconds)
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def run_once(run: Callable[[], object]) -> Timing:
    """Time a function that is too slow to be run twice."""
    return Timing((_milliseconds(run),))


def _turn(run: Callable[[], object], seconds: float) -> list[float]:
    times: list[float] = []
    while sum(times) < seconds * 1e3:
        times.append(_milliseconds(run))
    return times


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
