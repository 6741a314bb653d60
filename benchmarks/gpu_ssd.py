"""The scan of Mamba-2 on a GPU beside mamba-ssm's Triton kernels and flash-linear-attention's, and its one-step form.

Shapes are (batch, length, heads, headdim, state), with one group, D and dt_bias. flash-linear-attention's
`chunk_simple_gla` is the same function of keys and queries expanded over the heads, of values that dt has scaled and of
given logarithms of the decays: what it is spared is not counted.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_case import OURS, Case, Contender, Floor
from mambakit.ops import ssd, ssd_step

_CHUNK = 64  # steps: where the products within a chunk and those with the state balance
_PEER_CHUNK = 256  # mamba-ssm's default
_NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    headdim: int
    state: int

    def spelled(self) -> str:
        return f"({', '.join(map(str, self))})"


def cases() -> Iterator[Case]:
    """Every case, the goals being those of the project."""
    half = torch.bfloat16
    yield _scan(Shape(8, 2048, 64, 64, 128), half, (1.6, 1.8), fla=True)
    yield _scan(Shape(1, 65536, 32, 64, 128), half, (1.6, 1.6), fla=True)
    yield _scan(Shape(2, 512, 8, 64, 128), half, exact=True)
    yield _step(1, 80, 64, 128)
    yield _step(64, 80, 64, 128)
    yield _scan(Shape(8, 2048, 32, 64, 128), half, fla=True)
    yield _scan(Shape(2, 512, 8, 64, 128), torch.float32, exact=True)
    yield _scan(Shape(1, 524288, 32, 64, 128), half, backward=False)


def _scan(
    shape: Shape,
    dtype: torch.dtype,
    goals: tuple[float | None, float | None] = (None, None),
    *,
    backward: bool = True,
    exact: bool = False,
    fla: bool = False,
) -> Case:
    def ours() -> Contender:
        return _contender(shape, dtype, functools.partial(ssd, dt_softplus=True), backward, exact)

    def mamba_ssm() -> Contender:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
            return mamba_chunk_scan_combined(
                x, dt, A, B, C, chunk_size=_PEER_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True
            )

        return _contender(shape, dtype, call, backward, exact)

    def in_float64() -> Mapping[str, Tensor]:
        wide = {name: t.double() for name, t in _tensors(shape, dtype).items()}
        return _results(functools.partial(ssd, dt_softplus=True, backend="reference"), wide)

    others: dict[str, Callable[[], Contender]] = {"mamba-ssm": mamba_ssm}
    notes = ("errors are those of this shape",) if exact else ()
    if fla:
        others["fla"] = functools.partial(_fla, shape, dtype)
        notes = ("fla is given keys and queries of every head, scaled values and decays",)
    return Case(
        operation="ssd",
        shape=shape.spelled(),
        dtype=dtype,
        contenders={OURS: ours, **others},
        goals={"mamba-ssm": goals, **({"fla": (1.0, 1.0)} if fla else {})},
        forward_floor=_forward_floor(shape, dtype),
        forward_backward_floor=_forward_backward_floor(shape, dtype) if backward else None,
        exact=in_float64 if exact else None,
        notes=notes,
    )


def _fla(shape: Shape, dtype: torch.dtype) -> Contender:
    from fla.ops.simple_gla import chunk_simple_gla

    t = _tensors(shape, dtype)
    dt = F.softplus(t["dt"].float() + t["dt_bias"])
    q, k = (t[name].expand(-1, -1, shape.heads, -1).contiguous() for name in ("C", "B"))
    v, g = (t["x"] * dt[..., None]).to(dtype), dt * t["A"]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v, g)]
    grad = torch.randn_like(v)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(chunk_simple_gla(*leaves, scale=1.0)[0], leaves, grad)

    return Contender(_without_gradients(lambda: chunk_simple_gla(q, k, v, g, scale=1.0)), forward_backward)


def _step(batch: int, heads: int, headdim: int, state: int) -> Case:
    dtype = torch.bfloat16
    t = functools.partial(torch.randn, device="cuda")

    def tensors() -> dict[str, Tensor]:
        torch.manual_seed(0)
        rows = {"x": (heads, headdim), "dt": (heads,), "B": (1, state), "C": (1, state)}
        found = {name: t(batch, *inner, dtype=dtype) for name, inner in rows.items()}
        parameters = {"A": -torch.rand(heads, device="cuda"), "D": t(heads), "dt_bias": t(heads) - 3}
        return {"state": t(batch, heads, headdim, state), **found, **parameters}

    def ours() -> Contender:
        given = tensors()
        return Contender(_without_gradients(lambda: ssd_step(**given, dt_softplus=True)))

    def mamba_ssm() -> Contender:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        g = tensors()
        dt, A = g["dt"][..., None].expand(-1, -1, headdim), g["A"][:, None, None].expand(-1, headdim, state)
        D, dt_bias = (g[name][:, None].expand(-1, headdim) for name in ("D", "dt_bias"))
        return Contender(
            lambda: selective_state_update(
                g["state"], g["x"], dt, A, g["B"], g["C"], D=D, dt_bias=dt_bias, dt_softplus=True
            )
        )

    return Case(
        operation="ssd step",
        shape=f"({batch}, {heads}, {headdim}, {state})",
        dtype=dtype,
        contenders={OURS: ours, "mamba-ssm": mamba_ssm},
        goals={"mamba-ssm": (1.0, None)},
        forward_floor=Floor(bytes=2 * 4 * batch * heads * headdim * state),
        notes=("ours returns the next state, mamba-ssm writes it over the old one",),
    )


def _tensors(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch, length, heads, headdim, state = shape
    t = functools.partial(torch.randn, device="cuda")
    return {
        "x": t(batch, length, heads, headdim, dtype=dtype),
        "dt": t(batch, length, heads, dtype=dtype),
        "A": -torch.exp(t(heads)),
        "B": t(batch, length, 1, state, dtype=dtype),
        "C": t(batch, length, 1, state, dtype=dtype),
        "D": t(heads),
        "dt_bias": t(heads) - 3,  # steps of about 0.05, as models have them
    }


def _contender(shape: Shape, dtype: torch.dtype, call: Callable[..., Tensor], backward: bool, exact: bool) -> Contender:
    given = _tensors(shape, dtype)
    forward = _without_gradients(lambda: call(**given))
    if not backward:
        return Contender(forward)
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    grad = torch.randn_like(given["x"])

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(**leaves), list(leaves.values()), grad)

    return Contender(forward, forward_backward, (lambda: _results(call, given)) if exact else None)


def _results(call: Callable[..., Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y and every gradient, of one fixed gradient of y that bfloat16 holds exactly."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    y = call(**leaves)
    torch.manual_seed(1)
    grad = torch.randn(y.shape, device=y.device).bfloat16().to(y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _sizes(shape: Shape, dtype: torch.dtype) -> tuple[float, float, float]:
    """Bytes of x, bytes of B with C and dt, and the steps of all heads."""
    batch, length, heads, headdim, state = shape
    width, steps = torch.finfo(dtype).bits // 8, batch * length
    return width * steps * heads * headdim, width * steps * (2 * state + heads), steps * heads


def _forward_floor(shape: Shape, dtype: torch.dtype) -> Floor:
    """x, B, C and dt in, y out; products with the state in and out, and within chunks those of pairs that count."""
    x, rest, steps = _sizes(shape, dtype)
    products = 4 * shape.headdim * shape.state + _CHUNK * shape.headdim + _CHUNK * shape.state / shape.heads
    return Floor(2 * x + rest, steps * products, exponentials=steps * _CHUNK / 2)


def _forward_backward_floor(shape: Shape, dtype: torch.dtype) -> Floor:
    """The forward again, and dy in and the gradients out; twice its products, and once those of the state anew."""
    x, rest, steps = _sizes(shape, dtype)
    forward = _forward_floor(shape, dtype)
    products = 3 * forward.matrix_operations + steps * 2 * shape.headdim * shape.state
    return Floor(forward.bytes + 3 * x + 2 * rest, products, 2 * forward.exponentials)
