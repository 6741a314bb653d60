"""Memory of the scan's forward and backward with all gradients: its peak, and what autograd keeps between the two.

Every length runs in a process of its own, because an allocator keeps what it once had. The peak is the growth of the
process's resident set over what it held before, inputs included in the latter (Linux, VmHWM); a straight line through
the peaks gives the bytes a token and takes the constant part out. What autograd keeps is counted through
saved-tensor hooks, each storage once.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines import unbind_scan
from benchmarks.cases.scan import Inputs, our_scan
from benchmarks.floors import FLOAT_BYTES
from benchmarks.passes import forward_and_backward

LENGTHS = (512, 1024, 2048, 4096)
DIM, STATE = 1536, 16
STRAIGHT = 0.05  # of the largest peak: how far from the line a peak may lie
SCANS: dict[str, Callable[..., Tensor]] = {"mambakit": our_scan, "unbind loop": unbind_scan}
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemorySample:
    """One length."""

    length: int
    peak_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class MemoryResult:
    """All lengths of one scan."""

    name: str
    dim: int
    state: int
    samples: tuple[MemorySample, ...]

    @property
    def line(self) -> tuple[float, float]:
        """Bytes a token and constant bytes, by least squares."""
        slope, constant = np.polyfit([s.length for s in self.samples], [s.peak_bytes for s in self.samples], 1)
        return float(slope), float(constant)

    @property
    def linear(self) -> bool:
        """Whether every peak lies on the line."""
        slope, constant = self.line
        largest = max(s.peak_bytes for s in self.samples)
        return all(abs(s.peak_bytes - slope * s.length - constant) <= STRAIGHT * largest for s in self.samples)

    @property
    def states_bytes(self) -> int:
        """The bytes a token of a (batch, length, dim, state) tensor."""
        return self.dim * self.state * FLOAT_BYTES

    @property
    def keeps_no_states(self) -> bool:
        """Whether all that autograd keeps is together smaller than one (batch, length, dim, state) tensor."""
        return all(s.saved_bytes < self.states_bytes * s.length for s in self.samples)


def available() -> bool:
    """Whether this system tells the peak of a process."""
    return _STATUS.exists()


def measure(name: str, lengths: Sequence[int] = LENGTHS, dim: int = DIM, state: int = STATE) -> MemoryResult:
    """Measure one of `SCANS` at several lengths, a process each."""
    samples = []
    for length in lengths:
        command = [sys.executable, "-m", "benchmarks.memory", name, str(length), str(dim), str(state)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        samples.append(MemorySample(length, **json.loads(output)))
    return MemoryResult(name, dim, state, tuple(samples))


def _measure_here(name: str, length: int, dim: int, state: int) -> dict[str, int]:
    """One forward and backward in this process, after a short one that loads and starts what is needed."""
    _run(name, Inputs.random(1, 8, dim, state))
    inputs = Inputs.random(1, length, dim, state)
    before = status_bytes("VmRSS")
    saved_bytes = _run(name, inputs)
    return {"peak_bytes": status_bytes("VmHWM") - before, "saved_bytes": saved_bytes}


def _run(name: str, inputs: Inputs) -> int:
    """Forward and backward; the bytes that autograd kept in between."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_and_backward(lambda: SCANS[name](*inputs), inputs)()
    return sum(storages.values())


def status_bytes(field: str) -> int:
    """A size from this process's status, such as VmRSS or VmHWM."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], *map(int, sys.argv[2:]))))
