"""Capturing CUDA graphs where other code goes on: other threads, the garbage collector, what is drawn afterwards."""

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import torch

_CAPTURING = threading.Lock()  # torch captures one graph at a time


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
