"""Makes toy.py importable by the tests, as it is by the scripts that they start, and keeps the runs on the CPU."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU, for which bitwise equality is promised, unless the test is marked `gpu`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(request.node.get_closest_marker("gpu") is None).lower())
    # accelerate chooses the device once in a process.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def start_script() -> Callable[..., subprocess.Popen[str]]:
    """Start a Python script of this folder with arguments and further environment variables, and without any GPU."""

    def start(name: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(HERE / name), *map(str, arguments)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
