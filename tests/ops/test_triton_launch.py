"""Launches: whichever way a kernel is launched, it does what Triton's own launch of it does."""

# mypy: disable-error-code="no-untyped-def"

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.ops import ssd
from mambakit.ops.triton import Operation

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from mambakit.ops.triton.launch import Kernel, launched_together  # noqa: E402


@triton.jit(do_not_specialize=["offset"])
def _plain(x, y, out, offset, scale, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i).to(tl.float32) * scale
    if y is not None:
        value += tl.load(y + i).to(tl.float32)
    tl.store(out + i, (SIGN * value + (offset % 7).to(tl.float32)).to(out.dtype.element_ty))


class _Recorder:
    """In place of a kernel that Triton does not compile, such as one of its interpreter."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *args, **constants: self.launches.append((grid, args, constants))


def test_what_triton_does_not_compile_is_launched_as_it_is_given() -> None:
    recorder, x = _Recorder(), torch.zeros(3)
    kernel = Kernel(recorder)
    kernel[2, 3](x, None, 5, 1 << 40, BLOCK=4)
    assert recorder.launches == [((2, 3), (x, None, 5, 1 << 40), {"BLOCK": 4})]


def test_a_bound_launch_takes_the_tensors_alone() -> None:
    recorder, x, y = _Recorder(), torch.zeros(3), torch.ones(3)
    launch_of = Kernel(recorder).bind((4,), 7, SIGN=-1)
    launch_of(x, None)
    launch_of(y, x)
    assert [args for _, args, _ in recorder.launches] == [(x, None, 7), (y, x, 7)]


def test_what_triton_does_not_compile_is_launched_once_and_nothing_ahead_of_its_time() -> None:
    recorder = _Recorder()
    kernel = Kernel(recorder)
    launched_together(
        torch.zeros(3),
        lambda: kernel[(4,)](torch.zeros(3), 7, SIGN=-1),
        lambda: kernel[(5,)](torch.zeros(3), 7, SIGN=1),
    )
    assert [grid for grid, _, _ in recorder.launches] == [(4,)]


_WITHOUT_A_GPU = """
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoDevice:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(NoDevice())
from mambakit.ops.triton.causal_conv1d_kernels import sum_tiles
from mambakit.ops.triton.launch import launched_together

done = []
run = triton.JITFunction.run

def run_or_compile(self, *args, warmup, **options):
    if warmup:
        return run(self, *args, warmup=True, **options)
    kernels = self.device_caches[0][0].values()
    done.append((options["WIDTH"], sorted(kernel.asm["cubin"][:4] for kernel in kernels)))

triton.JITFunction.run = run_or_compile
x = torch.zeros(16)

def launch(*widths):
    for width in widths:
        sum_tiles.bind((1, 1), 3, 5, WIDTH=width, BLOCK=32, TILES=64)(x, x, None)

for _ in range(2):
    launched_together(x, lambda: launch(2, 3), lambda: launch(4))
launched_together(x, lambda: launch(5), lambda: launch(2))  # 2 is compiled, and what it would read not written
print(*((width, len(kernels)) for width, kernels in done), set(done[0][1]))
"""


def test_kernels_are_compiled_side_by_side_before_any_is_launched(tmp_path: Path) -> None:
    if not triton.__version__.startswith("3.6."):
        pytest.skip("another Triton compiles what it launches, when it does")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _WITHOUT_A_GPU], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 3) (3, 3) (2, 3) (3, 3) (5, 4) {b'\\x7fELF'}", done.stderr


def test_a_backward_is_prepared_for_where_one_is_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[object] = []
    run = Operation.forward_before_backward

    def forward_before_backward(self: Operation, *arguments: Any) -> None:
        prepared.append(self.name)
        run(self, *arguments)

    monkeypatch.setattr(Operation, "forward_before_backward", forward_before_backward)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, dt = torch.randn(1, 3, 1, 8, device=device), torch.rand(1, 3, 1, device=device)
    B, A = torch.randn(1, 3, 1, 8, device=device), -torch.ones(1, device=device, requires_grad=True)
    with torch.no_grad():
        without = ssd(x, dt, A, B, B, backend="triton")
    assert not prepared
    torch.testing.assert_close(ssd(x, dt, A, B, B, backend="triton"), without)
    assert prepared == ["ssd"]


def test_another_triton_launches_its_kernels_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "99.1.0+later")
    assert not Kernel(_plain)._direct


def _on_gpu(
    kernel: object, dtype: torch.dtype, *, with_y: bool, skew: int, offset: int, scale: int, sign: int
) -> Tensor:
    make = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(64 + skew, generator=make, device="cuda").to(dtype)[skew:] for _ in range(2))
    out = torch.full((64,), torch.nan, device="cuda", dtype=dtype)
    kernel[(1,)](x, y if with_y else None, out, offset, scale, SIGN=sign, BLOCK=64)  # type: ignore[index]
    return out


@pytest.mark.gpu
def test_every_form_of_a_kernel_is_told_apart_from_the_others() -> None:
    kernel = Kernel(_plain)
    forms: list[dict[str, Any]] = [
        {"dtype": dtype, "with_y": with_y, "skew": skew, "offset": offset, "scale": scale, "sign": sign}
        for dtype in (torch.float32, torch.bfloat16)
        for with_y in (True, False)
        for skew in (0, 1)  # of 1: not aligned
        for offset, scale in ((1, 1), (16, 16), (3, 5), (1 << 40, 1))
        for sign in (1, -1)
    ]
    for form in forms * 2:  # at the second time nothing is compiled
        torch.testing.assert_close(_on_gpu(kernel, **form), _on_gpu(_plain, **form), rtol=0, atol=0)


@pytest.mark.gpu
def test_what_was_compiled_together_is_launched_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, src, **_: compiled.append(src))
    kernel = Kernel(_plain)
    x = torch.ones(64, device="cuda")
    outs = [torch.zeros_like(x) for _ in range(3)]

    def launch(*signs: int) -> None:
        for sign, out in zip(signs, outs, strict=False):
            kernel.bind((1,), 7, 3, SIGN=sign, BLOCK=64)(x, None, out)

    for _ in range(2):
        launched_together(x, lambda: launch(1, -1), lambda: launch(1, -1, 2))
        assert [float(out[0]) for out in outs] == [3.0, -3.0, 0.0]
        assert len(compiled) == 3


@pytest.mark.gpu
def test_while_kernels_are_noted_none_is_launched_that_may_read_what_nobody_has_written() -> None:
    kernel = Kernel(_plain)
    x, unwritten = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    kernel.bind((1,), 7, 3, SIGN=1, BLOCK=64)(x, None, torch.empty_like(x))

    def ahead() -> None:  # compiled, as of another call
        kernel.bind((1,), 7, 3, SIGN=1, BLOCK=64)(x, None, unwritten)

    launched_together(x, lambda: kernel.bind((1,), 7, 3, SIGN=2, BLOCK=64)(x, None, torch.empty_like(x)), ahead)
    assert not unwritten.any()


@pytest.mark.gpu
def test_where_no_gradients_are_asked_for_no_backward_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, src, **_: compiled.append(src.name))
    x, dt = torch.randn(1, 5, 3, 24, device="cuda"), torch.rand(1, 5, 3, device="cuda")
    A, D = -torch.rand(3, device="cuda", requires_grad=True), torch.ones(3, device="cuda", requires_grad=True)
    B, C = torch.randn(2, 1, 5, 1, 16, device="cuda")
    with torch.no_grad():
        ssd(x, dt, A, B, C, D, backend="triton")
    forwards = list(compiled)
    ssd(x, dt, A, B, C, D, backend="triton").sum().backward()
    assert set(compiled) > set(forwards) > set()


@pytest.mark.gpu
def test_a_profilers_hooks_hear_of_launches() -> None:
    kernel = Kernel(_plain)
    heard: list[object] = []
    form: dict[str, Any] = {"dtype": torch.float32, "with_y": True, "skew": 0, "offset": 1, "scale": 1, "sign": 1}
    _on_gpu(kernel, **form)
    hook = triton.knobs.runtime.launch_enter_hook
    listener = heard.append
    hook.add(listener)
    try:
        _on_gpu(kernel, **form)
    finally:
        hook.remove(listener)
    assert len(heard) == 1


@pytest.mark.gpu
def test_a_graph_captures_direct_launches() -> None:
    kernel = Kernel(_plain)
    x, out = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")

    def call() -> None:
        kernel[(1,)](x, None, out, 7, 3, SIGN=1, BLOCK=64)

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    x.fill_(2.0)
    graph.replay()
    assert (out == 6.0).all()
