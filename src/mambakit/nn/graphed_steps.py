"""Steps of a layer on a GPU, replayed as one CUDA graph: what a step costs is then its kernels, not their launches.

A graph reads and writes memory where it lay when it was captured: the input, the state and the output have buffers of
their own, and a step ends by writing the next state over the present one. Parameters are read where they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mambakit.ops import decode

_WARM_UP = 2  # runs before the capture, in which kernels are compiled and libraries set up


class GraphedSteps:
    """Steps taken by a layer in fixed buffers, as a CUDA graph if `captured`.

    Args:
        layer: a layer, or a function called as one: `y, state = layer(x, state)`, x and y (batch, 1, ...).
        x: (batch, ...), an input of the shape, dtype and device of all.
        state: to carry on from; its sizes must stay as they are from step to step.
        captured: False takes the same steps without a graph.

    Raises RuntimeError, with the reason, where the steps can't be captured.
    """

    def __init__(self, layer: Callable[..., Any], x: Tensor, state: Any, *, captured: bool = True) -> None:
        self._layer = layer
        self._x = x.clone()
        self._state = tree_map(lambda part: part.detach().clone(), state)
        self._leaves: list[Tensor] = tree_leaves(self._state)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._check(x)
        if captured:
            self._capture()

    @property
    def state(self) -> Any:
        """The state after the last step; a copy."""
        return tree_map(torch.clone, self._state)

    def load(self, state: Any) -> None:
        """Carry on from `state`."""
        with torch.no_grad():
            torch._foreach_copy_(self._leaves, tree_leaves(state))

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """y (batch, ...), in float32 at least, for x (batch, ...)."""
        self._x.copy_(x)
        if self._graph is None:
            return self._take()
        self._graph.replay()
        return self._y.clone()

    def _take(self, *, captured: bool = False) -> Tensor:
        with decode.states_in_place(captured=captured):
            y, after = self._layer(self._x[:, None], self._state)
        pairs = zip(self._leaves, tree_leaves(after), strict=True)
        moved = [(mine, part) for mine, part in pairs if part.data_ptr() != mine.data_ptr()]
        if moved:
            torch._foreach_copy_([mine for mine, _ in moved], [part for _, part in moved])
        return y[:, 0].to(torch.promote_types(y.dtype, torch.float32))

    @torch.no_grad()
    def _check(self, x: Tensor) -> None:
        _, after = self._layer(x[:, None], self._state)
        if [part.shape for part in tree_leaves(after)] != [part.shape for part in self._leaves]:
            raise RuntimeError("its state grows with every step, as an attention's does")

    @torch.no_grad()
    def _capture(self) -> None:
        before = self.state
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._x.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    self._take()
            torch.cuda.current_stream().wait_stream(aside)
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._y = self._take(captured=True)
            except RuntimeError as error:
                raise RuntimeError(f"its step can't be captured as a CUDA graph ({_first_line(error)})") from error
        self._graph = graph
        self.load(before)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
