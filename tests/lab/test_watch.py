"""The time of a run: laps, and whether the rest is likely to end in time."""

import torch

from mambakit.lab.watch import Watch

CPU = torch.device("cpu")


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rest_is_judged_by_the_pace_of_the_last_lap() -> None:
    clock = Clock()
    watch = Watch(CPU, 0, 100, 200.0, clock)
    clock.now = 150.0  # fifty seconds for ten steps: the first lap, in which kernels are compiled
    assert watch.lap(10) == (50.0, True)
    clock.now = 155.0  # half a second a step: 40 seconds for the 80 that are left
    assert watch.lap(20) == (5.0, True)
    clock.now = 165.0  # a second a step
    assert watch.lap(30) == (10.0, False)


def test_a_first_lap_past_the_deadline_is_the_last() -> None:
    clock = Clock()
    watch = Watch(CPU, 0, 100, 120.0, clock)
    clock.now = 121.0
    assert watch.lap(99) == (21.0, False)


def test_without_a_deadline_there_is_time() -> None:
    clock = Clock()
    watch = Watch(CPU, 0, 100, None, clock)
    for step in (1, 2):
        clock.now += 1e6
        assert watch.lap(step) == (1e6, True)
