"""The GPU backend: kernels in Triton, which is loaded when the first of them is called.

Triton reads TRITON_INTERPRET when a kernel is defined: with TRITON_INTERPRET=1 its interpreter runs the kernels on
tensors of the CPU, slowly, to check their logic where there is no GPU.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

AVAILABLE = importlib.util.find_spec("triton") is not None

_LEAST_CAPABILITY = (8, 0)  # bfloat16 products, asynchronous copies


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: torch.device) -> str | None:
    """Why the kernels can't serve tensors on `device`; None when they can."""
    if not AVAILABLE:
        return "Triton is not installed (it comes with torch's builds for CUDA)"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"it works on CUDA GPUs and the tensors are on {device.type}"
    return _capability_refusal(device.index)


class Kernels:
    """The module `mambakit.ops.triton.<name>`, imported when its first kernel is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(f"mambakit.ops.triton.{self.name}"), attribute)


@functools.cache
def _capability_refusal(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, _LEAST_CAPABILITY))
        return f"it needs compute capability {least}, and this GPU has {found}"
    return None
