"""Which backend serves an operation.

| backend   | what it is                                                   | serves                          |
|-----------|--------------------------------------------------------------|---------------------------------|
| triton    | GPU kernels in Triton                                        | CUDA devices                    |
| cpu       | the compiled extension `mambakit._native` (C++17, threaded)  | tensors on the CPU              |
| portable  | chunked PyTorch                                              | any device                      |
| reference | the definition, one step after another, in plain PyTorch     | any device, when asked for      |

`backend=` of an operation comes first, then the environment variable `MAMBAKIT_BACKEND`, then the fastest backend that
serves the device. A backend that was asked for by name and can't serve is an error, never a silent substitution. The
environment variable speaks of whole models, and so of the operations that have the backend: one that has none of that
name, such as a norm on `cpu`, takes its fastest.

Not every operation has a kernel on every backend: `serving` of `choose` names those that it has, fastest first. Nor
does every kernel take every case (a dtype, say): `case_refusal` says why it does not, and the next backend does it.

With TRITON_INTERPRET=1 Triton's interpreter runs the GPU kernels on the CPU, slowly and where asked for by name: this
is how they are tested without a GPU.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import overload

import torch

from mambakit.ops import cpu, triton

BACKENDS = ("triton", "cpu", "portable", "reference")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refusal(backend: str, device: torch.device) -> str | None:
    """Why `backend` can't serve tensors on `device`; None when it can."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"it works on the CPU and the tensors are on {device}"
        if not cpu.AVAILABLE:
            return f"the compiled extension is missing ({cpu.WHY_MISSING})"
    if backend == "triton":
        return triton.refusal(device)
    return None


def choose(
    device: torch.device,
    requested: str | None = None,
    serving: Sequence[str] = BACKENDS,
    case_refusal: Callable[[str], str | None] | None = None,
) -> str:
    """The name of the backend, one of `serving`, that will serve tensors on `device`.

    Args:
        device: where the tensors are.
        requested: the argument `backend` of the operation.
        serving: the backends that the operation has, fastest first.
        case_refusal: of a backend's name, why it can't take the case at hand; None when it can.

    Raises ValueError when the backend asked for by name is unknown or can't serve.
    """

    def reason_against(name: str) -> str | None:
        return refusal(name, device) or (None if case_refusal is None else case_refusal(name))

    asked = requested or os.environ.get("MAMBAKIT_BACKEND") or None
    source = "backend" if requested else "MAMBAKIT_BACKEND"
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"{source}={asked!r} is not a backend; choose one of {', '.join(BACKENDS)}")
    if asked is None or (requested is None and asked not in serving):
        if "cpu" in serving and device.type == "cpu" and not cpu.AVAILABLE:
            _warn_once_that_the_extension_is_missing()
        willing = (name for name in serving if not (name == "triton" and device.type == "cpu"))  # the interpreter
        return next(name for name in willing if reason_against(name) is None)
    reason = reason_against(asked) if asked in serving else f"this operation runs on {', '.join(serving)}"
    if reason is not None:
        raise ValueError(f"{source}={asked!r} can't serve: {reason}")
    return asked


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Raise TypeError for a tensor that is not of a supported floating dtype, ValueError for one on another device.

    Kernels are given addresses: what does not lie on the device of the first tensor must not reach them.
    """
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first, leader = given[0]
    device = leader.device
    for name, tensor in given:
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as {first} is, and is on {tensor.device}")


def check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...], spelled: str) -> None:
    """Raise ValueError unless `tensor` (if there is one) has the `expected` shape, which `spelled` puts in letters."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {spelled} = {expected}, got {tuple(tensor.shape)}")


def accumulation_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 where any input is float64, else float32: the dtype of states, of A, and of every sum."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def common_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype to which all of the tensors promote."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes.pop() if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)


@overload
def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...
@overload
def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None: ...
def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`tensor` in `dtype`; None stays None."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


@functools.cache
def _warn_once_that_the_extension_is_missing() -> None:
    warnings.warn(
        f"mambakit runs on its slower portable backend: {cpu.WHY_MISSING}. Install a C++ compiler and reinstall "
        "mambakit; `mambakit doctor` shows the state.",
        RuntimeWarning,
        stacklevel=4,
    )
