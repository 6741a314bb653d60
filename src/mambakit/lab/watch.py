"""The time that a run takes, the time that it may take, and how far the host may run ahead of a GPU."""

import time
from collections.abc import Callable

import torch

from mambakit.errors import MambakitError

_AHEAD = 16  # steps, twice this at most: enough to keep a GPU busy, few enough that nobody waits long for it


class OutOfTime(MambakitError):
    """A run that would not have ended in time was put aside; the same command with more time goes on with it."""


class Watch:
    """Laps of a run of `steps` steps that goes on from `step`.

    Args:
        deadline: of the clock, when the run has to be done; None for any time.
        clock: in seconds.
    """

    def __init__(
        self,
        device: torch.device,
        step: int,
        steps: int,
        deadline: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step, self._steps, self._deadline, self._clock = step, steps, deadline, clock
        self._at, self._laps = clock(), 0
        self._event: torch.cuda.Event | None = None
        self._on_gpu = device.type == "cuda"

    def lap(self, step: int) -> tuple[float, bool]:
        """Seconds since the lap before, and whether what is left is likely to be done in time.

        The first lap says little: libraries are loaded and kernels compiled in it.
        """
        now = self._clock()
        seconds, taken = now - self._at, step - self._step
        self._at, self._step, self._laps = now, step, self._laps + 1
        if self._deadline is None or (self._laps == 1 and now < self._deadline):
            return seconds, True
        return seconds, now + seconds / max(1, taken) * (self._steps - step) <= self._deadline

    def passed(self, step: int) -> None:
        """Step `step` was launched: wait where too many are on their way."""
        if self._on_gpu and step % _AHEAD == 0:
            if self._event is not None:
                self._event.synchronize()
            self._event = torch.cuda.Event()
            self._event.record()
