"""The selective scan of Mamba-1 and its one-step form on a GPU, beside mamba-ssm's kernels."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_case import OURS, Case, Contender, Floor

Shape = tuple[int, int, int, int]  # batch, dim, length, state

_SMALL: Shape = (2, 128, 300, 16)
_SMALL_STEP = (3, 256, 16)
# Shape, and how much faster than mamba-ssm forward and forward with backward are meant to be.
_GOALS: dict[Shape, tuple[float, float]] = {
    (8, 2048, 2048, 16): (1.5, 1.7),
    (1, 2048, 65536, 16): (2.5, 2.5),
    (64, 1536, 128, 16): (1.0, 1.0),
    (1, 1536, 512, 16): (1.0, 1.0),
}
_GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def cases() -> Iterator[Case]:
    """The scan at every shape in bfloat16, the step, and the scan in float32."""
    yield from _scans(torch.bfloat16)
    yield _step((64, 5120, 16), torch.bfloat16)
    yield from _scans(torch.float32)


def _scans(dtype: torch.dtype) -> Iterator[Case]:
    """Every shape; errors, which are those of one small shape, with the first."""
    for place, (shape, goals) in enumerate(_GOALS.items()):
        yield _scan(shape, dtype, *goals, exact=place == 0)


def _scan(shape: Shape, dtype: torch.dtype, forward_goal: float, forward_backward_goal: float, exact: bool) -> Case:
    batch, dim, length, state = shape
    rows, width = batch * length, torch.finfo(dtype).bits // 8
    small = 2 * rows * state * width  # B and C
    return Case(
        "selective scan",
        str(shape),
        dtype,
        {OURS: partial(_our_scan, shape, dtype), "mamba-ssm": partial(_their_scan, shape, dtype)},
        {"mamba-ssm": (forward_goal, forward_backward_goal)},
        Floor(bytes=4 * rows * dim * width + small, exponentials=rows * dim * state),
        Floor(bytes=(4 + 7) * rows * dim * width + 3 * small, exponentials=2 * rows * dim * state),
        exact=partial(_exact_scan, dtype) if exact else None,
        notes=("shape is (batch, dim, length, state); D, z, delta_bias and softplus",),
    )


def _inputs(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers for everybody, channels last; steps as Mamba's initialisation makes them, 0.001 to 0.1."""
    batch, dim, length, state = shape
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*axes: int) -> Tensor:
        return torch.randn(*axes, generator=make, device="cuda")

    step = torch.exp(torch.rand(dim, generator=make, device="cuda") * 4.6 - 6.9)
    rows = {"u": dim, "delta": dim, "z": dim, "grad": dim, "B": state, "C": state}
    tensors = {name: normal(batch, length, width).to(dtype) for name, width in rows.items()}
    tensors["delta"] *= 0.5
    tensors["A"] = -torch.arange(1, state + 1, device="cuda").float().repeat(dim, 1)
    tensors["D"] = normal(dim)
    tensors["delta_bias"] = step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    return tensors


def _our_scan(shape: Shape, dtype: torch.dtype) -> Contender:
    from mambakit.ops import selective_scan

    def function(t: Mapping[str, Tensor]) -> Tensor:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        return selective_scan(*(t[name] for name in names), delta_softplus=True, backend="triton")

    return _contender(function, _inputs(shape, dtype), _inputs(_SMALL, dtype))


def _their_scan(shape: Shape, dtype: torch.dtype) -> Contender:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def function(t: Mapping[str, Tensor]) -> Tensor:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        return selective_scan_fn(*(t[name] for name in names), delta_softplus=True)

    def arranged(t: dict[str, Tensor]) -> dict[str, Tensor]:
        """(batch, channels, length), which theirs is made for."""
        return {name: x.transpose(1, 2).contiguous() if x.dim() == 3 else x for name, x in t.items()}

    measured = _contender(function, arranged(_inputs(shape, dtype)), arranged(_inputs(_SMALL, dtype)))

    def results() -> dict[str, Tensor]:
        assert measured.results is not None
        return {name: x.transpose(1, 2) if x.dim() == 3 else x for name, x in measured.results().items()}

    return Contender(measured.forward, measured.forward_backward, results)


def _contender(function: Callable[[Mapping[str, Tensor]], Tensor], t: dict[str, Tensor], small: Any) -> Contender:
    leaves = {name: x.detach().requires_grad_(name in _GRADIENTS) for name, x in t.items()}

    def forward() -> Tensor:
        with torch.no_grad():
            return function(leaves)

    def forward_backward() -> Any:
        return torch.autograd.grad(function(leaves), [leaves[name] for name in _GRADIENTS], leaves["grad"])

    return Contender(forward, forward_backward, lambda: _results(function, small))


def _results(function: Callable[[Mapping[str, Tensor]], Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_(name in _GRADIENTS) for name, x in t.items()}
    y = function(leaves)
    grads = torch.autograd.grad(y, [leaves[name] for name in _GRADIENTS], leaves["grad"].to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(_GRADIENTS, grads, strict=True)}}


def _exact_scan(dtype: torch.dtype) -> dict[str, Tensor]:
    from mambakit.ops import selective_scan

    def function(t: Mapping[str, Tensor]) -> Tensor:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        return selective_scan(*(t[name] for name in names), delta_softplus=True, backend="reference")

    return _results(function, {name: x.double() for name, x in _inputs(_SMALL, dtype).items()})


def _step(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    batch, dim, state = shape
    return Case(
        "selective scan, one step",
        str(shape),
        dtype,
        {OURS: partial(_our_step, shape, dtype), "mamba-ssm": partial(_their_step, shape, dtype)},
        {"mamba-ssm": (1.0, None)},
        Floor(bytes=2 * batch * dim * state * 4 + 4 * batch * dim * 2, exponentials=batch * dim * state),
        exact=partial(_exact_step, dtype),
        notes=("shape is (batch, dim, state); the state in float32",),
    )


def _step_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    batch, dim, state = shape
    t = _inputs((batch, dim, 1, state), dtype)
    make = torch.Generator("cuda").manual_seed(1)
    t = {name: x[:, 0] if x.dim() == 3 else x for name, x in t.items()}
    return {"state": torch.randn(batch, dim, state, generator=make, device="cuda"), **t}


_STEP_ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def _our_step(shape: tuple[int, int, int], dtype: torch.dtype) -> Contender:
    t, small = _step_inputs(shape, dtype), _step_inputs(_SMALL_STEP, dtype)
    return Contender(lambda: _stepped(t, "triton"), results=lambda: _stepped(small, "triton"))


def _stepped(t: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    from mambakit.ops import selective_scan_step

    arguments = (t[name] for name in _STEP_ARGUMENTS)
    with torch.no_grad():
        y, state = selective_scan_step(t["state"], *arguments, delta_softplus=True, backend=backend)
    return {"y": y, "state": state}


def _their_step(shape: tuple[int, int, int], dtype: torch.dtype) -> Contender:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    t, small = _step_inputs(shape, dtype), _step_inputs(_SMALL_STEP, dtype)

    def run(t: Mapping[str, Tensor]) -> Tensor:
        return selective_state_update(t["state"], *(t[name] for name in _STEP_ARGUMENTS), dt_softplus=True)

    def results() -> dict[str, Tensor]:
        state = small["state"].clone()
        return {"y": run({**small, "state": state}), "state": state}

    return Contender(lambda: run(t), results=results)


def _exact_step(dtype: torch.dtype) -> dict[str, Tensor]:
    return _stepped({name: x.double() for name, x in _step_inputs(_SMALL_STEP, dtype).items()}, "reference")
