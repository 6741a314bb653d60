"""The scan of Mamba-3 on a GPU beside mamba-ssm's kernels, SISO and MIMO, and its one-step form.

Shapes are (batch, length, heads, headdim, state) with one group, D, z and both biases; a quarter of the state's size in
angles, and for MIMO a rank of 4. mamba-ssm is given steps past softplus and their products with A, ours makes them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_case import OURS, Case, Contender, Floor
from mambakit.ops import Mamba3State, mamba3_scan, mamba3_step

_CHUNK = 64
_RANK = 4

Shape = tuple[int, int, int, int, int]


def cases() -> Iterator[Case]:
    """Every case, the goals being those of the project."""
    yield _scan((8, 2048, 32, 64, 128), torch.bfloat16, None, goal=1.1)
    yield _scan((2, 512, 4, 64, 128), torch.bfloat16, None, exact=True)
    yield _scan((8, 2048, 32, 64, 128), torch.bfloat16, _RANK)
    yield _scan((2, 512, 4, 64, 128), torch.bfloat16, _RANK, exact=True)
    for batch in (1, 64):
        yield _step(batch)


def _scan(shape: Shape, dtype: torch.dtype, rank: int | None, goal: float | None = None, exact: bool = False) -> Case:
    tensors = functools.partial(_tensors, shape, dtype, rank)
    run = functools.partial(mamba3_scan, dt_softplus=True, interleaved=rank is None)

    def ours() -> Contender:
        return _contender(run, tensors(), exact)

    def mamba_ssm() -> Contender:
        return _contender(_mamba_ssm_siso() if rank is None else _mamba_ssm_mimo(dtype), tensors(), exact)

    def in_float64() -> Mapping[str, Tensor]:
        wide = {name: tensor.double() for name, tensor in tensors().items()}
        return _results(functools.partial(run, backend="reference"), wide)

    return Case(
        operation="mamba3 SISO" if rank is None else f"mamba3 MIMO, rank {rank}",
        shape=str(shape),
        dtype=dtype,
        contenders={OURS: ours, "mamba-ssm": mamba_ssm},
        goals={"mamba-ssm": (goal, goal)},
        forward_floor=_floor(shape, dtype, rank or 1, 1),
        forward_backward_floor=_floor(shape, dtype, rank or 1, 3),
        exact=in_float64 if exact else None,
        notes=("errors are those of this shape",) if exact else (),
    )


def _mamba_ssm_siso() -> Callable[..., Tensor]:
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    def call(**t: Tensor) -> Tensor:
        dt = F.softplus(t["dt"].float() + t["dt_bias"]).transpose(1, 2)
        return mamba3_siso_combined(
            Q=t["C"],
            K=t["B"],
            V=t["x"],
            ADT=t["A"].transpose(1, 2) * dt,
            DT=dt,
            Trap=t["trap"].transpose(1, 2),
            Q_bias=t["C_bias"].squeeze(1),
            K_bias=t["B_bias"].squeeze(1),
            Angles=t["angles"].unsqueeze(2).expand(-1, -1, t["x"].shape[2], -1),
            D=t["D"],
            Z=t["z"],
            chunk_size=_CHUNK,
        )

    return call


def _mamba_ssm_mimo(dtype: torch.dtype) -> Callable[..., Tensor]:
    from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo

    def call(**t: Tensor) -> Tensor:
        dt = F.softplus(t["dt"].float() + t["dt_bias"]).transpose(1, 2)
        return mamba3_mimo(
            Q=t["C"],
            K=t["B"],
            V=t["x"],
            ADT=t["A"].transpose(1, 2) * dt,
            DT=dt,
            Trap=t["trap"].transpose(1, 2),
            Q_bias=t["C_bias"],
            K_bias=t["B_bias"],
            MIMO_V=t["mimo_x"],
            MIMO_Z=t["mimo_z"],
            MIMO_Out=t["mimo_o"],
            Angles=t["angles"].unsqueeze(2).expand(-1, -1, t["x"].shape[2], -1),
            D=t["D"],
            Z=t["z"],
            chunk_size=_CHUNK // _RANK,
            rotary_dim_divisor=4,
            dtype=dtype,
        )

    return call


def _step(batch: int) -> Case:
    heads, headdim, state = 32, 64, 128

    def ours() -> Contender:
        given = _tensors((batch, 1, heads, headdim, state), torch.bfloat16, None)
        weights = {name: given.pop(name) for name in ("D", "dt_bias", "B_bias", "C_bias")}
        row = {name: tensor[:, 0] for name, tensor in given.items()}
        carried = Mamba3State(
            angle=torch.rand(batch, heads, state // 4, device="cuda"),
            ssm=torch.randn(batch, heads, headdim, state, device="cuda"),
            k=torch.randn(batch, 1, heads, state, device="cuda"),
            v=torch.randn(batch, heads, headdim, device="cuda", dtype=torch.bfloat16),
        )
        return Contender(_without_gradients(lambda: mamba3_step(carried, **row, **weights, dt_softplus=True)))

    return Case(
        operation="mamba3 step",
        shape=f"({batch}, {heads}, {headdim}, {state})",
        dtype=torch.bfloat16,
        contenders={OURS: ours},
        goals={},
        forward_floor=Floor(bytes=2 * 4 * batch * heads * (headdim * state + state)),
    )


def _tensors(shape: Shape, dtype: torch.dtype, rank: int | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch, length, heads, headdim, state = shape
    ranks = () if rank is None else (rank,)

    def rows(*inner: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(batch, length, *inner, device="cuda").to(dtype)

    def weights(*inner: int) -> Tensor:
        return torch.randn(heads, *inner, device="cuda")

    tensors = {
        "x": rows(heads, headdim),
        "dt": rows(heads, dtype=torch.float32),
        "A": -2 * torch.rand(batch, length, heads, device="cuda"),
        "B": rows(*ranks, 1, state),
        "C": rows(*ranks, 1, state),
        "trap": rows(heads),
        "angles": rows(state // 4),
        "D": weights(),
        "z": rows(heads, headdim),
        "dt_bias": weights() - 3,
        "B_bias": weights(rank or 1, state),
        "C_bias": weights(rank or 1, state),
    }
    if rank is not None:
        tensors |= {name: weights(rank, headdim) for name in ("mimo_x", "mimo_z", "mimo_o")}
    return tensors


def _contender(call: Callable[..., Tensor], given: Mapping[str, Tensor], exact: bool) -> Contender:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    grad = torch.randn_like(given["x"])

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(**leaves), list(leaves.values()), grad)

    results = (lambda: _results(call, given)) if exact else None
    return Contender(_without_gradients(lambda: call(**given)), forward_backward, results)


def _results(call: Callable[..., Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y and every gradient, of one fixed gradient of y that bfloat16 holds exactly."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
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


def _floor(shape: Shape, dtype: torch.dtype, rank: int, passes: int) -> Floor:
    """Inputs and outputs once a pass; each product of the forward once a pass."""
    batch, length, heads, headdim, state = shape
    steps, width = batch * length, torch.finfo(dtype).bits // 8
    moved = steps * (width * (3 * heads * headdim + 2 * rank * state + heads + state // 4) + 8 * heads)
    rows = _CHUNK / 2 * (headdim + state) + 2 * headdim * state  # within a chunk those pairs that count; the state
    return Floor(passes * moved, passes * 2 * steps * heads * rank * rows)
