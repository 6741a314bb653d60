"""Capturing CUDA graphs where other code goes on: other threads, the garbage collector, what is drawn afterwards."""

import contextlib
import gc
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

_CAPTURING = threading.Lock()  # torch captures one graph at a time
_PLAINLY = 2  # calls of the first form before the one that is captured, by which libraries are loaded and set up
_PLAINLY_LATER = 1  # of every other: its kernels are compiled by it


class Replayed:
    """Calls of functions that ask nothing of the host, each form of call a CUDA graph once it came a few times.

    A graph reads and writes memory where it lay when it was captured: what a function reads must stay at its place and
    be filled anew before each call, and what it made at the last call that ran it is filled anew by every later one.

    Attributes:
        refused: forms that could not be captured, and why; a warning says so, and they are called as ever.
    """

    def __init__(self) -> None:
        self.refused: dict[Hashable, str] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._plainly: Counter[Hashable] = Counter()
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()

    def call(self, form: Hashable, function: Callable[[], object]) -> None:
        """Call `function`, or replay what an earlier call of the same form launched."""
        if form not in self._graphs and not self._captured(form, function):
            with self._aside():  # as capturing wants it of the calls before
                function()
        else:
            self._graphs[form].replay()

    def _captured(self, form: Hashable, function: Callable[[], object]) -> bool:
        self._plainly[form] += 1
        if form in self.refused or self._plainly[form] <= (_PLAINLY_LATER if self._graphs else _PLAINLY):
            return False
        graph = torch.cuda.CUDAGraph()
        try:
            with self._aside(), capturing(graph, self._pool, self._side):
                function()
        except RuntimeError as error:
            reason = self.refused[form] = first_line(error)
            warnings.warn(f"could not be captured as a CUDA graph, and goes kernel by kernel: {reason}", stacklevel=4)
            return False
        self._graphs[form] = graph
        return True

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        own = torch.cuda.current_stream()
        self._side.wait_stream(own)
        with torch.cuda.stream(self._side):
            yield
        own.wait_stream(self._side)


def first_line(error: Exception) -> str:
    """What an error says, without the advice that torch adds."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """What is launched inside becomes `graph`, and is not run.

    Other threads may launch and allocate meanwhile, on streams of their own. A graph that is dropped meanwhile would
    end the capture; those that only the garbage collector finds wait until it is over. After a capture that fails the
    current stream is the one from before, and torch's generator draws, neither of which torch itself sees to.

    Args:
        pool: of the graph's memory, of another graph that is never replayed at the same time; None: its own.
        stream: to capture on, which what ran before was launched on; None: one of torch's.

    Raises RuntimeError for what can't be captured, such as a wait for the device.
    """
    with _CAPTURING, _garbage_left_alone():
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                yield
        except RuntimeError:
            torch.cuda.set_stream(before)
            _let_the_generator_draw()
            raise


@contextlib.contextmanager
def _garbage_left_alone() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _let_the_generator_draw() -> None:
    """Give torch's generator a copy of its state: the one that it has thinks that it is still captured."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
