"""The selective scan, forward and with all gradients, as the Mamba mixer calls it: with D, z, delta_bias, softplus."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import floors
from benchmarks.baselines import stepwise_scan, unbind_scan
from benchmarks.case import Case, Goal, Peer, Run
from benchmarks.passes import forward_and_backward, forward_only
from mambakit import ops


class Inputs(NamedTuple):
    """Of one scan; softplus(delta + delta_bias) lies near Mamba's initial steps."""

    u: Tensor  # (batch, length, dim)
    delta: Tensor  # (batch, length, dim)
    A: Tensor  # (dim, state)
    B: Tensor  # (batch, length, state)
    C: Tensor  # (batch, length, state)
    D: Tensor  # (dim,)
    z: Tensor  # (batch, length, dim)
    delta_bias: Tensor  # (dim,)

    @classmethod
    def random(cls, batch: int, length: int, dim: int, state: int) -> "Inputs":
        """Inputs of these sizes, the same every time."""
        torch.manual_seed(0)
        u, delta, z = (torch.randn(batch, length, dim) for _ in range(3))
        B, C = (torch.randn(batch, length, state) for _ in range(2))
        A = -torch.arange(1.0, state + 1).repeat(dim, 1)
        return cls(u, delta, A, B, C, torch.ones(dim), z, torch.rand(dim) - 4)


def our_scan(*inputs: Tensor) -> Tensor:
    """`ops.selective_scan` of the tensors of `Inputs`."""
    return cast(Tensor, ops.selective_scan(*inputs, delta_softplus=True))


def cases(batch: int = 1, length: int = 2048, dim: int = 1536, state: int = 16) -> list[Case]:
    """Forward of the whole operation and of its bare recurrence, and forward with backward."""
    shape = f"({batch}, {length}, {dim}, {state})"

    def inputs() -> Inputs:
        return Inputs.random(batch, length, dim, state)

    return [
        Case(
            "scan forward",
            shape,
            inputs,
            _forward(our_scan),
            (
                Peer("unbind loop", _forward(unbind_scan), Goal(60)),
                Peer("step-by-step loop", _forward(stepwise_scan)),
                Peer("mambapy pscan", _forward_of_mambapy),
                Peer("torch.exp, materialised", _exponentials, Goal(2)),
                Peer("torch.exp, out= reused", _exponentials_into),
            ),
            lambda rates: floors.scan(rates, batch, length, dim, state, gated=True, backward=False),
        ),
        Case(
            "scan forward, bare",
            f"{shape}, no D, z, bias, softplus",
            inputs,
            _bare_forward,
            (Peer("torch.exp, materialised", _exponentials),),
            lambda rates: floors.scan(rates, batch, length, dim, state, gated=False, backward=False),
        ),
        Case(
            "scan forward + backward",
            shape,
            inputs,
            _backward(our_scan),
            (
                Peer("unbind loop", _backward(unbind_scan), Goal(25)),
                Peer("step-by-step loop", _backward(stepwise_scan)),
            ),
            lambda rates: floors.scan(rates, batch, length, dim, state, gated=True, backward=True),
        ),
    ]


def _forward(scan: Callable[..., Tensor]) -> Callable[[Inputs], Run]:
    return lambda inputs: forward_only(lambda: scan(*inputs))


def _backward(scan: Callable[..., Tensor]) -> Callable[[Inputs], Run]:
    return lambda inputs: forward_and_backward(lambda: scan(*inputs), inputs)


def _bare_forward(inputs: Inputs) -> Run:
    steps = F.softplus(inputs.delta + inputs.delta_bias)
    return forward_only(lambda: ops.selective_scan(inputs.u, steps, inputs.A, inputs.B, inputs.C))


def _forward_of_mambapy(inputs: Inputs) -> Run:
    from mambapy.pscan import pscan

    u, delta, A, B, C, D, z, delta_bias = inputs

    def forward() -> Tensor:
        dt = F.softplus(delta + delta_bias)
        h = pscan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None])
        return ((h @ C[..., None])[..., 0] + D * u) * F.silu(z)

    return forward_only(forward)


def _exponents(inputs: Inputs) -> Tensor:
    return F.softplus(inputs.delta + inputs.delta_bias)[..., None] * inputs.A  # (batch, length, dim, state)


def _exponentials(inputs: Inputs) -> Run:
    exponents = _exponents(inputs)
    return forward_only(lambda: torch.exp(exponents))


def _exponentials_into(inputs: Inputs) -> Run:
    exponents = _exponents(inputs)
    out = torch.empty_like(exponents)
    return forward_only(lambda: torch.exp(exponents, out=out))
