"""The scans of Mamba-2 and Mamba-3, and whole mixers beside transformers' Mamba-2."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.case import Case, Goal, Peer, Run
from benchmarks.passes import forward_and_backward, forward_only
from mambakit import ops
from mambakit.nn import Mamba2

CHUNK = 64  # steps of the matrix form whose products are timed

_CHUNK_OF_TRANSFORMERS = 256  # its default
# Products of a step's rows with a state or its gradient: y and the state; the gradients of v, k, q and the state.
_PRODUCTS, _BACKWARD_PRODUCTS = 2, 4


class Inputs(NamedTuple):
    """Of one scan of Mamba-2 with one group."""

    x: Tensor  # (batch, length, heads, headdim)
    dt: Tensor  # (batch, length, heads)
    A: Tensor  # (heads,)
    B: Tensor  # (batch, length, 1, state)
    C: Tensor  # (batch, length, 1, state)
    D: Tensor  # (heads,)

    @classmethod
    def random(cls, length: int, heads: int, headdim: int, state: int) -> "Inputs":
        """Inputs of these sizes, the same every time."""
        torch.manual_seed(0)
        B, C = torch.randn(2, 1, length, 1, state).unbind()
        dt = 0.1 * torch.rand(1, length, heads)
        return cls(torch.randn(1, length, heads, headdim), dt, -1 - torch.rand(heads), B, C, torch.ones(heads))


def cases(length: int = 2048, heads: int = 24, headdim: int = 64, state: int = 128) -> list[Case]:
    """The operations beside their products and each other; the mixer of the same sizes beside its peer."""
    shape, d_model = f"(1, {length}, {heads}, {headdim}, {state})", heads * headdim // 2

    def inputs() -> Inputs:
        return Inputs.random(length, heads, headdim, state)

    return [
        Case(
            "ssd forward",
            shape,
            inputs,
            lambda i: forward_only(lambda: ops.ssd(*i)),
            (
                Peer("transformers", lambda i: forward_only(_scan_of_transformers(i)), Goal(6)),
                Peer("its matrix products", lambda i: forward_only(lambda: matrix_products(i)), Goal(1 / 3)),
            ),
            lambda rates: floors.products(rates, _PRODUCTS * length * heads * headdim * state),
        ),
        Case(
            "ssd forward + backward",
            shape,
            inputs,
            lambda i: forward_and_backward(lambda: cast(Tensor, ops.ssd(*i)), i),
            (Peer("transformers", lambda i: forward_and_backward(_scan_of_transformers(i), i), Goal(8)),),
            lambda rates: floors.products(rates, (_PRODUCTS + _BACKWARD_PRODUCTS) * length * heads * headdim * state),
        ),
        Case(
            "mamba3 scan forward",
            shape,
            inputs,
            lambda i: forward_only(_mamba3(i)),
            (Peer("ssd", lambda i: forward_only(lambda: ops.ssd(*i)), Goal(1 / 1.5)),),
        ),
        Case(
            "mamba3 scan forward + backward",
            shape,
            inputs,
            lambda i: forward_and_backward(_mamba3(i), i),
            (Peer("ssd", lambda i: forward_and_backward(lambda: cast(Tensor, ops.ssd(*i)), i), Goal(1 / 1.5)),),
        ),
        Case(
            "mamba2 mixer forward",
            f"(1, {length}, {d_model})",
            lambda: torch.randn(1, length, d_model),
            lambda x: _forward(_ours(d_model, headdim, state), x),
            (Peer("transformers", lambda x: _forward(_transformers(d_model, headdim, state), x), Goal(6)),),
        ),
        Case(
            "mamba2 mixer forward + backward",
            f"(1, {length}, {d_model})",
            lambda: torch.randn(1, length, d_model),
            lambda x: _backward(_ours(d_model, headdim, state), x),
            (Peer("transformers", lambda x: _backward(_transformers(d_model, headdim, state), x), Goal(8)),),
        ),
    ]


def matrix_products(i: Inputs) -> None:
    """The products of the chunked form and nothing between them."""
    heads = i.x.shape[2]
    for start in range(0, i.x.shape[1], CHUNK):
        C, B = (t[:, start : start + CHUNK, 0] for t in (i.C, i.B))  # (1, steps, state)
        rows = i.x[:, start : start + CHUNK]
        scores = C @ B.mT  # (1, steps, steps)
        scores.expand(heads, *scores.shape[1:]) @ rows[0].transpose(0, 1)
        flat = rows.flatten(2)  # (1, steps, heads * headdim)
        state = flat.mT @ B  # (1, heads * headdim, state)
        C @ state.mT


def _mamba3(i: Inputs) -> Callable[[], Tensor]:
    """The scan of Mamba-3, SISO, on inputs of the same sizes, half of the state turning."""
    batch, length, heads, _ = i.x.shape
    trap, angles = torch.randn(batch, length, heads), torch.randn(batch, length, i.B.shape[3] // 4)
    return lambda: cast(Tensor, ops.mamba3_scan(i.x, i.dt, i.A.expand_as(i.dt), i.B, i.C, trap, angles, i.D))


def _scan_of_transformers(i: Inputs) -> Callable[[], Tensor]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def run() -> Tensor:
        result = mamba2_chunk_scan(i.x, i.dt, i.A, i.B, i.C, chunk_size=_CHUNK_OF_TRANSFORMERS, D=i.D)
        return cast(Tensor, result if isinstance(result, Tensor) else result[0])

    return run


def _ours(d_model: int, headdim: int, state: int) -> nn.Module:
    return Mamba2(d_model, d_state=state, headdim=headdim)


def _transformers(d_model: int, headdim: int, state: int) -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = {"hidden_size": d_model, "num_heads": 2 * d_model // headdim, "head_dim": headdim, "state_size": state}
    return Mamba2Mixer(Mamba2Config(**sizes, n_groups=1, num_hidden_layers=1), layer_idx=0)


def _forward(mixer: nn.Module, x: Tensor) -> Run:
    return forward_only(lambda: mixer(x))


def _backward(mixer: nn.Module, x: Tensor) -> Run:
    def forward() -> Tensor:
        result = mixer(x)
        return cast(Tensor, result if isinstance(result, Tensor) else result[0])

    return forward_and_backward(forward, [x, *mixer.parameters()])
