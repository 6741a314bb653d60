"""The GPU backend: kernels in Triton, which is loaded when the first of them is called.

Triton reads TRITON_INTERPRET when a kernel is defined: with TRITON_INTERPRET=1 its interpreter runs the kernels on
tensors of the CPU, slowly, to check their logic where there is no GPU.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AVAILABLE = importlib.util.find_spec("triton") is not None

_LEAST_CAPABILITY = (8, 0)  # bfloat16 products, asynchronous copies


@functools.cache  # Triton, too, holds to what it read first
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
        value = getattr(_module(self.name), attribute)
        setattr(self, attribute, value)  # found at once from now on
        return value


class Operation(Kernels):
    """The same of a backend of `mambakit.ops.operator`: what a call finds not to be compiled is compiled side by side,
    and by `forward_before_backward` with what the backward needs."""

    def forward(self, *arguments: Any) -> None:
        """Of inputs, y, the final state and what is kept."""
        self._together(arguments[1], functools.partial(_module(self.name).forward, *arguments))

    def forward_before_backward(self, inputs: Any, y: Tensor, final_state: Tensor, *kept: Tensor) -> None:
        """The forward of a call whose gradients are asked for."""
        kernels = _module(self.name)

        def ahead() -> None:
            kernels.backward(inputs, kept, y, None, type(inputs)(*map(_unfilled, inputs)))

        self._together(y, functools.partial(kernels.forward, inputs, y, final_state, *kept), ahead)

    def backward(self, inputs: Any, kept: tuple[Tensor, ...], grad_y: Tensor, *arguments: Any) -> None:
        """Of these, the gradient of the final state and the gradients to fill."""
        self._together(grad_y, functools.partial(_module(self.name).backward, inputs, kept, grad_y, *arguments))

    def _together(self, tensor: Tensor, *calls: Callable[[], None]) -> None:
        _module("launch").launched_together(tensor, *calls)


@functools.cache
def _module(name: str) -> Any:
    if interpreting():
        _let_loops_run_to_computed_bounds()
    return importlib.import_module(f"mambakit.ops.triton.{name}")


def _unfilled(value: Any) -> Tensor | None:
    """A gradient of an input, if it can have one."""
    differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return torch.empty_like(value, memory_format=torch.contiguous_format) if differentiable else None


@functools.cache
def _capability_refusal(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, _LEAST_CAPABILITY))
        return f"it needs compute capability {least}, and this GPU has {found}"
    return None


@functools.cache
def _let_loops_run_to_computed_bounds() -> None:
    # The interpreter's scalars are arrays of one element, which numpy from 2.4 on does not take for integers.
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
