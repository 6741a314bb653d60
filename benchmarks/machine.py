"""What the benchmarks run on, in a few lines."""

import os
import platform
from pathlib import Path

import torch

from mambakit.ops import cpu, dispatch


def describe() -> dict[str, str]:
    """The processor, threads and versions, by name."""
    return {
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "mambakit": _kernels(),
    }


def load_average() -> str:
    """Over the last minute; this process counts."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _kernels() -> str:
    backend = dispatch.choose(torch.device("cpu"))
    return f"backend cpu, {cpu.native.instruction_set()}" if backend == "cpu" else f"backend {backend}"
