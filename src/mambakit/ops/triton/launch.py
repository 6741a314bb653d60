"""What every launch shares: the device that it goes to, what it costs the host, and strides that loads may rely on."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

_NOWHERE_ELSE = contextlib.nullcontext()
_TRITON_WITH_KNOWN_LAUNCHER = (3, 6)
LARGEST = (1 << 31) - 1  # of a number that Triton passes in 32 bits


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `tensor`."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(tensor.device)


@functools.cache
def processors_of(device: torch.device) -> int:
    """How many multiprocessors share the programs of a kernel; few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class Kernel:
    """A Triton kernel that is launched as ever, `kernel[grid](*tensors, *numbers, **constants)`, at less cost.

    Triton finds out anew for each launch which of its compiled forms to run, which takes the host longer than many a
    kernel takes the GPU. What decides about it is little: dtypes, absent tensors, constants, and the alignment of
    tensors and of those numbers that are not in `do_not_specialize`. By that the compiled form is looked up here, and
    the function behind it called with plain addresses. Triton launches itself what this does not know to be the same:
    another version of Triton, a tensor that is not aligned to 16 bytes, a number of more than 32 bits, a listener.

    Parameters come in this order: tensors (or None), integers, `tl.constexpr`.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._bound = functools.lru_cache(maxsize=1024)(self.bind)  # the same launches come again and again
        self._tensors: int | None = None  # how many there are: known from the first launch
        parameters = function.params if isinstance(function, JITFunction) else ()
        self._given = sum(not parameter.is_constexpr for parameter in parameters)
        self._absent = (None,) * (len(parameters) - self._given)  # the launcher skips what is constant
        self._specialised = [not parameter.do_not_specialize for parameter in parameters[: self._given]]
        in_order = not any(parameter.is_constexpr for parameter in parameters[: self._given])
        self._direct = _launcher_is_known() and bool(parameters) and in_order

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        tensors = self._tensors
        if tensors is None:
            tensors = self._tensors = next((i for i, value in enumerate(args) if type(value) is int), len(args))
        self._bound(grid, *args[tensors:], **constants)(*args[:tensors])

    def bind(self, grid: tuple[int, ...], *numbers: int, **constants: Any) -> Callable[..., None]:
        """The launch but for its tensors: worth keeping where the same one comes again."""
        ordinary = self.function[grid]
        small = not numbers or (max(numbers) <= LARGEST and min(numbers) >= -LARGEST)
        if not (self._direct and small):

            def launch_as_ever(*tensors: Tensor | None) -> None:
                if _now.noted is None:
                    ordinary(*tensors, *numbers, **constants)

            return launch_as_ever
        classes = [
            (2 if number == 1 else number & 15 == 0) if specialised else None
            for number, specialised in zip(numbers, self._specialised[self._given - len(numbers) :], strict=True)
        ]
        form = (*classes, *constants, *constants.values())
        whole_grid = (*grid, 1, 1)[:3]
        last = (*numbers, *self._absent)
        compiled, active, runtime = self._compiled, driver.active, triton.knobs.runtime

        def launch(*tensors: Tensor | None) -> None:
            device = active.get_current_device()
            key = (device, *[None if tensor is None else tensor.dtype for tensor in tensors], form)
            if _now.noted is not None:
                if key not in compiled:
                    dtypes = key[1:-1]
                    _now.noted.append(
                        functools.partial(self.function.warmup, *dtypes, *numbers, grid=grid, **constants)
                    )
                return
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            bits = 0
            for pointer in pointers:
                if pointer is not None:
                    bits |= pointer
            if bits & 15 or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
                ordinary(*tensors, *numbers, **constants)
                return
            found = compiled.get(key)
            if not found:
                if found is None and _now.asks:
                    raise _NotCompiled
                kernel = ordinary(*tensors, *numbers, **constants)
                if found is None:
                    compiled[key] = _direct_launch(kernel)
                return
            function, *fixed = found
            function(*whole_grid, active.get_current_stream(device), *fixed, *pointers, *last)

        return launch


class _Now(threading.local):
    """What becomes of a launch whose kernel is not compiled yet, in this thread."""

    asks = False  # it raises `_NotCompiled`
    noted: list[Callable[[], object]] | None = None  # what compiles it goes here, and nothing at all is launched


_now = _Now()


class _NotCompiled(Exception):
    """A launch would have to compile its kernel."""


def launched_together(tensor: Tensor, run: Callable[[], None], ahead: Callable[[], None] = lambda: None) -> None:
    """Call `run`, which launches kernels on the device of `tensor`. Where one of them is not compiled, all that are
    not, and those that `ahead` would launch, are compiled side by side first: one after another they would be what a
    first step takes. `run` is called up to three times then: until it meets the first of them, to note all, and to its
    end. What is noted launches nothing, for one kernel may read where another has written what to read; so `ahead` may
    be given memory that nobody has filled.
    """
    if _now.asks:
        run()
        return
    _now.asks = True
    try:
        run()
        return
    except _NotCompiled:
        _note_and_compile(tensor, run, ahead)
    finally:
        _now.asks = False
    run()


def _note_and_compile(tensor: Tensor, run: Callable[[], None], ahead: Callable[[], None]) -> None:
    _now.noted = []
    try:
        run()
        ahead()
        with on_device_of(tensor):
            _compile_together(_now.noted)
    finally:
        _now.noted = None


def _compile_together(kernels: Iterable[Callable[[], object]]) -> None:
    """A compiler at work leaves Python to the others. What does not compile says so when it is launched."""
    kernels = list(kernels)
    with ThreadPoolExecutor(len(kernels)) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        for compile_kernel in kernels:
            compile_kernel()


def _launcher_is_known() -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version == _TRITON_WITH_KNOWN_LAUNCHER and torch.version.hip is None


def _direct_launch(compiled: Any) -> tuple[Any, ...]:
    """The function that launches `compiled` and its arguments between the stream and the kernel's own; () for none."""
    if not isinstance(compiled, CompiledKernel):
        return ()
    launcher = compiled.run
    if not hasattr(launcher, "launch") or launcher.global_scratch_size or launcher.profile_scratch_size:
        return ()
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    no_scratch, no_hooks = (None, None), (None, None, None)
    return (
        launcher.launch, compiled.function, cooperative, dependent, *no_scratch, compiled.packed_metadata, *no_hooks,
    )  # fmt: skip


def float32_products() -> str:
    """How the tensor cores form a product of float32: "tf32x3", as exact as float32, or "tf32" where torch may, too."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@functools.lru_cache(maxsize=1024)
def stride_divisor(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides, in elements.

    Kernels take strides unspecialised, so that no change of a length compiles them anew, and this divisor for the
    alignment of loads.
    """
    divisor = 16
    while any(stride % divisor for stride in strides):
        divisor //= 2
    return divisor


def rows_contiguous(tensor: Tensor) -> Tensor:
    """`tensor` with neighbouring elements along its last axis; copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
