"""Steps of a layer on a GPU, replayed as one CUDA graph: what a step costs is then its kernels, not their launches.

A graph reads and writes memory where it lay when it was captured: the input, the state and the output have buffers of
their own, and a step ends by writing the next state over the present one. Parameters are read where they are.

Short sequences are bound by launches as well. They are read in pieces of 1, 2, 4 ... steps, each of which has a graph
once its length has come up a few times: capturing costs as much as several readings.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mambakit.nn.graph_capture import capturing, first_line
from mambakit.ops import decode

_WARM_UP = 2  # runs before the capture, in which kernels are compiled and libraries set up
_WORTHWHILE = 3  # readings of a piece that make a graph of it worthwhile
_LONGEST = 255  # steps of a sequence that is read so: in whole pieces of at most 128
_MOST_VECTORS = 4096  # of all rows together; from there on the kernels take longer than their launches


class _Captured(NamedTuple):
    """A graph, and the buffers that it reads from and leaves y in."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor


class GraphedSteps:
    """Steps taken by a layer in fixed buffers, as a CUDA graph if `captured`.

    Args:
        layer: a layer, or a function called as one: `y, state = layer(x, state)`, x and y (batch, length, ...); of a
            longer sequence it may give the last y alone.
        x: (batch, ...), an input of the shape, dtype and device of all.
        state: to carry on from; its sizes must stay as they are from step to step.
        captured: False takes the same steps without a graph.

    Raises RuntimeError, with the reason, where the steps can't be captured.
    """

    def __init__(self, layer: Callable[..., Any], x: Tensor, state: Any, *, captured: bool = True) -> None:
        self._layer = layer
        self._state = tree_map(lambda part: part.detach().clone(), state)
        self._leaves: list[Tensor] = tree_leaves(self._state)
        self._captured, self._longest = captured, _LONGEST
        self._graphs: dict[int, _Captured] = {}
        self._readings: Counter[int] = Counter()
        self._check(x)
        if captured:
            self._graphs[1] = self._capture(x[:, None])

    @property
    def state(self) -> Any:
        """The state after the last step; a copy."""
        return tree_map(torch.clone, self._state)

    def load(self, state: Any) -> None:
        """Carry on from `state`."""
        with torch.no_grad():
            torch._foreach_copy_(self._leaves, tree_leaves(state))

    def step(self, x: Tensor) -> Tensor:
        """y (batch, ...), in float32 at least, for x (batch, ...)."""
        return self._advance(x[:, None])

    def read(self, x: Tensor) -> Tensor | None:
        """The last y of x (batch, length, ...), where there are graphs for it or now become worthwhile.

        Returns None, and leaves the state as it is, where the layer had better read x at once.
        """
        rows, length = x.shape[:2]
        if not 0 < length <= self._longest or rows * length > _MOST_VECTORS:
            return None
        pieces = [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1]
        self._readings.update(pieces)
        if any(piece not in self._graphs and self._readings[piece] < _WORTHWHILE for piece in pieces):
            return None
        if self._captured:
            try:
                for piece in pieces:
                    if piece not in self._graphs:
                        self._graphs[piece] = self._capture(x[:, :piece])
            except RuntimeError:  # what reads longer sequences can't be captured
                self._longest = 0
                return None
        for part in x.split(pieces, dim=1):
            y = self._advance(part)
        return y

    @torch.no_grad()
    def _advance(self, x: Tensor) -> Tensor:
        found = self._graphs.get(x.shape[1])
        if found is None:
            return self._take(x)
        found.x.copy_(x)
        found.graph.replay()
        return found.y.clone()

    def _take(self, x: Tensor, *, captured: bool = False) -> Tensor:
        with decode.states_in_place(captured=captured):
            y, after = self._layer(x, self._state)
        pairs = zip(self._leaves, tree_leaves(after), strict=True)
        moved = [(mine, part) for mine, part in pairs if part.data_ptr() != mine.data_ptr()]
        if moved:
            torch._foreach_copy_([mine for mine, _ in moved], [part for _, part in moved])
        return y[:, -1].to(torch.promote_types(y.dtype, torch.float32))

    @torch.no_grad()
    def _check(self, x: Tensor) -> None:
        _, after = self._layer(x[:, None], self._state)
        if [part.shape for part in tree_leaves(after)] != [part.shape for part in self._leaves]:
            raise RuntimeError("its state grows with every step, as an attention's does")

    @torch.no_grad()
    def _capture(self, x: Tensor) -> _Captured:
        """A graph of what `_take` does to inputs of the form of x; the state stays as it is."""
        before, x = self.state, x.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    self._take(x)
            torch.cuda.current_stream().wait_stream(aside)
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            try:
                with capturing(graph, pool):
                    y = self._take(x, captured=True)
            except RuntimeError as error:
                raise RuntimeError(f"its step can't be captured as a CUDA graph ({first_line(error)})") from error
            finally:
                self.load(before)
        return _Captured(graph, x, y)
