"""Steps of grouped models that ask nothing of the host: on a GPU a step is a CUDA graph, replayed.

Data, rates, gradients, clipping and AdamW of a step are one function of what lies on the device, the number of the step
among it. A small model's step is hundreds of small kernels; launched one by one they take several times as long as they
run, as a graph they follow each other.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from mambakit.lab.data import TrainingBatches
from mambakit.lab.grouped import GroupedAdamW, GroupedModels, train_step
from mambakit.nn.graph_capture import Replayed

_SWITCHING = threading.Lock()
_in_tf32: list[bool] = []  # what the switch was for each run that wants it, under the lock


@contextlib.contextmanager
def products_in_tf32() -> Iterator[None]:
    """Matrix products of float32 in TF32 on GPUs; a switch of the process, back when the last that asked has left."""
    switch = torch.backends.cuda.matmul
    with _SWITCHING:
        _in_tf32.append(switch.allow_tf32)
        switch.allow_tf32 = True
    try:
        yield
    finally:
        with _SWITCHING:
            before = _in_tf32[0]
            _in_tf32.pop()
            switch.allow_tf32 = before or bool(_in_tf32)


class TrainingSteps:
    """`train_step` over and over: `steps.take(step)`.

    Args:
        paces: of `GroupedAdamW.paces`.
        clip: of `train_step`.
        capture: replay steps as CUDA graphs; where one can't be captured, a warning says so and it is taken as it is.
    """

    def __init__(
        self,
        grouped: GroupedModels,
        optimizer: GroupedAdamW,
        batches: TrainingBatches,
        paces: Tensor,
        clip: float | None,
        capture: bool,
    ) -> None:
        self._grouped, self._optimizer, self._batches = grouped, optimizer, batches
        self._paces, self._clip = paces, clip
        self._next = torch.zeros(1, dtype=torch.int64, device=paces.device)
        self._losses = torch.zeros(grouped.count, dtype=torch.float64, device=paces.device)
        self._taken = 0  # whose losses are in the sum
        self._replayed = Replayed() if capture else None

    @property
    def captures(self) -> bool:
        """Whether steps become graphs, and none could not."""
        return self._replayed is not None and not self._replayed.refused

    def go_on_from(self, step: int) -> None:
        """Step `step` (0, 1, ...) is the next."""
        self._next.fill_(step)

    def take(self, step: int) -> None:
        """Take step `step`, the next; on a GPU it may be running still when this returns."""
        shape = self._batches.prepare(step)
        self._taken += 1
        if self._replayed is None:
            self._take()
        else:
            self._replayed.call(shape, self._take)

    def mean_losses(self) -> list[float]:
        """Every model's mean loss over the steps since this was last asked; waits for them."""
        found = (self._losses / max(1, self._taken)).tolist()
        self._losses.zero_()
        self._taken = 0
        return found

    def _take(self) -> None:
        tokens, targets = self._batches.taken(self._next)
        pace = self._paces[self._next].squeeze(0)
        self._losses += train_step(self._grouped, self._optimizer, tokens, targets, pace, self._clip)
        self._next += 1
