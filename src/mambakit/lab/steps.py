"""Steps of grouped models that ask nothing of the host: on a GPU a step is a CUDA graph, replayed.

Data, rates, gradients, clipping and AdamW of a step are one function of what lies on the device, the number of the step
among it. A small model's step is hundreds of small kernels; launched one by one they take several times as long as they
run, as a graph they follow each other.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from mambakit.lab.data import TrainingBatches
from mambakit.lab.grouped import GroupedAdamW, GroupedModels, train_step
from mambakit.nn.graph_capture import capturing

_UNCAPTURED = 2  # steps of the first shape of batch, by which libraries are loaded and set up
_UNCAPTURED_LATER = 1  # of every other: its kernels are compiled by it
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
        capture: replay steps as CUDA graphs; where one can't be captured, a warning says so and steps are taken as they
            are.
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
        self._paces, self._clip, self.captures = paces, clip, capture
        self._next = torch.zeros(1, dtype=torch.int64, device=paces.device)
        self._losses = torch.zeros(grouped.count, dtype=torch.float64, device=paces.device)
        self._taken = 0  # whose losses are in the sum
        self._plain: dict[torch.Size, int] = {}
        self._graphs: dict[torch.Size, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        if capture:
            self._side = torch.cuda.Stream()

    def go_on_from(self, step: int) -> None:
        """Step `step` (0, 1, ...) is the next."""
        self._next.fill_(step)

    def take(self, step: int) -> None:
        """Take step `step`, the next; on a GPU it may be running still when this returns."""
        shape = self._batches.prepare(step)
        self._taken += 1
        if not self.captures:
            self._take()
            return
        graph = self._graphs.get(shape)
        uncaptured = _UNCAPTURED_LATER if self._graphs else _UNCAPTURED
        if graph is None and self._plain.setdefault(shape, 0) < uncaptured:
            self._plain[shape] += 1
            self._take_aside()
        elif graph is not None or self._capture(shape):
            self._graphs[shape].replay()
        else:
            self._take()

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

    def _take_aside(self) -> None:
        """A step on the stream that is captured, as capturing wants those before it."""
        with self._aside():
            self._take()

    def _capture(self, shape: torch.Size) -> bool:
        """Capture the step of a shape, without taking it; False where that can't be done."""
        graph = torch.cuda.CUDAGraph()
        try:
            with self._aside(), capturing(graph, self._pool, self._side):
                self._take()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"a step could not be captured and steps are taken one by one: {reason}", stacklevel=2)
            self.captures = False
            return False
        self._graphs[shape] = graph
        return True

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        own = torch.cuda.current_stream()
        self._side.wait_stream(own)
        with torch.cuda.stream(self._side):
            yield
        own.wait_stream(self._side)
