"""A second's check that every backend of this machine gives what the reference gives."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mambakit.ops import dispatch
from mambakit.ops.causal_conv1d import causal_conv1d
from mambakit.ops.cross_entropy import cross_entropy
from mambakit.ops.mamba3_inputs import Mamba3State
from mambakit.ops.mamba3_scan import mamba3_scan
from mambakit.ops.rms_norm import gated_rms_norm
from mambakit.ops.selective_scan import selective_scan
from mambakit.ops.ssd import ssd

BOUND = 1e-5  # ||got - reference|| / ||reference|| in float32


@dataclass(frozen=True)
class Check:
    """One operation on one backend of one device."""

    operation: str
    backend: str
    device: str
    error: float  # the largest ratio of norms over outputs and gradients
    first_call: float  # seconds of forward and backward, with the compilation of kernels that are compiled when needed

    @property
    def passed(self) -> bool:
        """Whether the error is within what float32 allows; a NaN is not."""
        return self.error <= 10 * BOUND


def self_check() -> Iterator[Check]:
    """Run each operation, forward and backward, on every backend that has it and serves a device of this machine."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for name in dispatch.BACKENDS:
            if name == "reference" or dispatch.refusal(name, torch.device(device)) is not None:
                continue
            if name == "triton" and device == "cpu":  # its interpreter, which takes minutes
                continue
            for operation, run in _OPERATIONS.items():
                generator = torch.Generator().manual_seed(0)
                start = time.perf_counter()
                try:
                    got = run(name, device, generator)
                except ValueError as error:
                    if "can't serve" in str(error):  # no kernel of this operation there
                        continue
                    raise
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                expected = run("reference", device, generator.manual_seed(0))
                worst = max(_error(a, b) for a, b in zip(got, expected, strict=True))
                yield Check(operation, name, device, worst, seconds)


def _error(got: Tensor, expected: Tensor) -> float:
    ratio = ((got - expected).norm() / expected.norm()).item()
    return ratio if ratio == ratio else float("inf")


def _with_gradients(function: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    for leaf in leaves:
        leaf.requires_grad_()
    y, state = function(*leaves)
    grads = torch.autograd.grad(y.sin().sum() + state.sin().sum(), leaves)
    return y.detach(), state.detach(), *grads


def _scan(backend: str, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    batch, length, dim, state = 2, 70, 20, 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    leaves = [
        *(normal(batch, length, dim) for _ in range(2)),
        -normal(dim, state).abs(),
        *(normal(batch, length, 1, state) for _ in range(2)),
        normal(dim),
        normal(batch, length, dim),
        normal(dim),
    ]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        result = selective_scan(*leaves, delta_softplus=True, return_final_state=True, backend=backend)
        return result[0], result[1]

    return _with_gradients(run, leaves)


def _convolution(backend: str, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    shapes = [(2, 70, 20), (20, 4), (20,)]
    leaves = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        result = causal_conv1d(*leaves, activation="silu", return_final_state=True, backend=backend)
        return result[0], result[1]

    return _with_gradients(run, leaves)


def _ssd(backend: str, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    shapes = [(2, 70, 4, 6), (2, 70, 4), (4,), (2, 70, 2, 8), (2, 70, 2, 8), (4,), (2, 70, 4, 6), (4,)]
    leaves = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]
    leaves[2] = -leaves[2].abs()

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        result = ssd(*leaves, dt_softplus=True, return_final_state=True, backend=backend)
        return result[0], result[1]

    return _with_gradients(run, leaves)


def _mamba3(backend: str, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    shapes = [(2, 70, 4, 6), (2, 70, 4), (2, 70, 4), (2, 70, 2, 8), (2, 70, 2, 8), (2, 70, 4), (2, 70, 3)]
    leaves = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]
    leaves[2] = -leaves[2].abs()

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        y, state = mamba3_scan(*leaves, dt_softplus=True, return_final_state=True, backend=backend)
        return y, cast(Mamba3State, state).ssm

    return _with_gradients(run, leaves)


def _norm(backend: str, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    leaves = [torch.randn(*shape, generator=generator).to(device) for shape in [(2, 70, 20), (20,), (2, 70, 20)]]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        y = gated_rms_norm(*leaves, groups=2, backend=backend)
        return y, y

    return _with_gradients(run, leaves)


def _cross_entropy(backend: str, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    logits = torch.randn(70, 300, generator=generator).to(device).requires_grad_()
    targets = torch.randint(300, (70,), generator=generator).to(device)
    loss = cross_entropy(logits, targets, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, logits)


_OPERATIONS = {
    "selective_scan": _scan,
    "causal_conv1d": _convolution,
    "ssd": _ssd,
    "mamba3_scan": _mamba3,
    "gated_rms_norm": _norm,
    "cross_entropy": _cross_entropy,
}
