"""Very long sequences in chunks with carried state: the time per token must not grow with the length, nor the memory.

Each length runs in a process of its own, so that its peak of memory is its own (Linux, VmHWM).
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.memory import status_bytes
from mambakit.nn import MIXERS

LENGTHS = (1_024, 16_384, 262_144, 1_048_576)
NAMES = ("mamba", "mamba2", "mamba3")
D_MODEL, CHUNK = 64, 1_024


@dataclass(frozen=True)
class LongRun:
    """One length of one mixer."""

    length: int
    microseconds_a_token: float
    peak_bytes: int  # growth over the process before the run


@dataclass(frozen=True)
class LongResult:
    """All lengths of one mixer."""

    name: str
    runs: tuple[LongRun, ...]

    @property
    def slope(self) -> float:
        """By what power of the length the time per token grows; 0 for a linear whole."""
        lengths, times = zip(*((run.length, run.microseconds_a_token) for run in self.runs), strict=True)
        return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def measure(name: str, lengths: Sequence[int] = LENGTHS) -> LongResult:
    """Run one mixer over each length, a process each."""
    runs = []
    for length in lengths:
        command = [sys.executable, "-m", "benchmarks.long_sequences", name, str(length)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(LongRun(length, **json.loads(output)))
    return LongResult(name, tuple(runs))


@torch.no_grad()
def _measure_here(name: str, length: int) -> dict[str, float]:
    torch.manual_seed(0)
    layer = MIXERS[name](D_MODEL)
    x = torch.randn(1, CHUNK, D_MODEL)  # the same chunk again and again: the input itself would take memory
    _, state = layer(x)
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    for _ in range(length // CHUNK):
        _, state = layer(x, state)
    seconds = time.perf_counter() - start
    grown = max(0, status_bytes("VmHWM") - before)
    return {"microseconds_a_token": 1e6 * seconds / length, "peak_bytes": grown}


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], int(sys.argv[2]))))
