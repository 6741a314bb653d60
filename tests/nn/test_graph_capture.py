"""What happens around a capture must not end it, and a capture that fails must leave no trace."""

import contextlib
import gc
from typing import Any

import pytest
import torch

from mambakit.nn import graph_capture
from mambakit.nn.graph_capture import Replayed, capturing


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to torch.cuda, by name."""
    done: list[str] = []

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Any:
        yield
        done.append("captured")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "set_stream", done.append)
    monkeypatch.setattr(graph_capture, "_let_the_generator_draw", lambda: done.append("generator"))
    return done


def test_garbage_is_collected_before_and_after_a_capture_and_not_in_it(without_a_gpu: list[str]) -> None:
    graph: Any = object()
    with capturing(graph):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert without_a_gpu == ["captured"]
    gc.disable()
    try:
        with capturing(graph):
            pass
        assert not gc.isenabled()  # as it was found
    finally:
        gc.enable()


def test_after_a_failed_capture_stream_generator_and_collector_are_as_before(without_a_gpu: list[str]) -> None:
    graph: Any = object()
    for _ in range(2):  # the lock is free again
        with pytest.raises(RuntimeError, match="cannot wait"), capturing(graph):
            raise RuntimeError("cannot wait for the device")
        assert gc.isenabled()
    assert without_a_gpu == ["the stream", "generator"] * 2


class _Graph:
    """What a CUDA graph does, told by name."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def replay(self) -> None:
        self.told.append("replayed")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of calls, without a GPU."""
    told: list[str] = []

    class Stream:
        def wait_stream(self, _: Any) -> None:
            pass

    @contextlib.contextmanager
    def capturing(*_: Any) -> Any:
        told.append("captured:")
        yield
        told.append("done")

    monkeypatch.setattr(graph_capture, "capturing", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(told))
    return told


def test_a_call_that_comes_again_is_captured_once_and_replayed(told: list[str]) -> None:
    calls = Replayed()
    for _ in range(4):
        calls.call("a", lambda: told.append("a"))
    assert told == ["a", "a", "captured:", "a", "done", "replayed", "replayed"]
    told.clear()
    for _ in range(2):  # what the first loaded and set up is there
        calls.call("b", lambda: told.append("b"))
    calls.call("a", lambda: told.append("a"))
    assert told == ["b", "captured:", "b", "done", "replayed", "replayed"]
    assert calls.refused == {}


def test_what_can_not_be_captured_is_called_as_ever_and_others_are_captured(told: list[str]) -> None:
    attempts = iter([False, False, True, False, False])

    def waits() -> None:
        if next(attempts):
            raise RuntimeError("it waits\nand here is advice")
        told.append("waits")

    calls = Replayed()
    for _ in range(4):
        calls.call("a", waits)
    assert calls.refused == {"a": "it waits"}
    assert told == ["waits", "waits", "captured:", "waits", "waits"]
    told.clear()
    for _ in range(3):
        calls.call("b", lambda: told.append("b"))
    assert told == ["b", "b", "captured:", "b", "done", "replayed"]


@pytest.mark.gpu
def test_a_graph_that_is_garbage_does_not_end_the_capture_of_another() -> None:
    x = torch.zeros(4, device="cuda")
    old = torch.cuda.CUDAGraph()
    with capturing(old):
        y = x + 1
    circle: list[Any] = [old, y]
    circle.append(circle)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)  # a collection with every other object
    try:
        del circle, old
        new = torch.cuda.CUDAGraph()
        with capturing(new):
            made = [[torch.zeros_like(x)] for _ in range(20)]
            y = x + len(made)
    finally:
        gc.set_threshold(*thresholds)
    new.replay()
    assert y.tolist() == [20.0] * 4


@pytest.mark.gpu
def test_after_a_failed_capture_the_gpu_goes_on_as_before() -> None:
    x, stream = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError), capturing(torch.cuda.CUDAGraph()):
        x.sum().item()
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(0)
    drawn = torch.randn(8, device="cuda")
    torch.manual_seed(0)
    torch.testing.assert_close(torch.randn(8, device="cuda"), drawn, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        y = torch.randn(8, device="cuda")
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
