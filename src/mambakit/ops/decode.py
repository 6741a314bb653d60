"""One token through a block, or through what lies between the projections of a mixer: few launches where launches are
most of the time.

Blocks and mixers call these on a GPU for a single step that records no gradient, and are otherwise what they do by
their operations; results agree as closely as two backends do.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops import dispatch, triton
from mambakit.ops.inputs import NormInputs

_EARLY_STARTS = (9, 0)  # compute capability

_kernels = triton.Kernels("decode")
_linear_kernels = triton.Kernels("decode_linear")
_norm_kernels = triton.Kernels("rms_norm")
_IN_PLACE: ContextVar[bool] = ContextVar("states_in_place", default=False)
_CAPTURING: ContextVar[bool] = ContextVar("captured", default=False)


def serves(
    x: Tensor, state: tuple[Tensor, ...] | None, cu_seqlens: Tensor | None, parameters: Iterable[Tensor]
) -> bool:
    """Whether x (batch, length, d_model) is such a step: the GPU's, one token on from a state, without gradients.

    Args:
        x: the input of a mixer, or of its block.
        state: of the mixer; None where there is none yet.
        cu_seqlens: of packed sequences.
        parameters: those of the mixer.
    """
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()  # first: a length would become a condition of the program
        and x.shape[1] == 1
        and x.shape[0] > 0
        and state is not None
        and cu_seqlens is None
        and x.dtype != torch.float64
        and not torch.is_autocast_enabled(x.device.type)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state, *parameters)))
        and dispatch.choose(x.device, None, ("triton", "portable", "reference")) == "triton"
    )


@contextlib.contextmanager
def states_in_place(*, captured: bool = False) -> Iterator[None]:
    """Inside, a step writes the states of its mixer over those that it read, and spares copying them there.

    Args:
        captured: whether what is launched becomes a graph in which nothing changes a parameter, so that a kernel may
            read its weights before the kernel in front has ended.
    """
    tokens = _IN_PLACE.set(True), _CAPTURING.set(captured)
    try:
        yield
    finally:
        _IN_PLACE.reset(tokens[0])
        _CAPTURING.reset(tokens[1])


class Convolution(NamedTuple):
    """The causal convolution that follows some outputs of a product, with silu, and its state."""

    weight: Tensor  # (channels, taps)
    bias: Tensor | None  # (channels,)
    state: Tensor  # (batch, taps - 1, channels)
    first: int = 0  # of the outputs


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    z: Tensor | None = None,
    norm_before_gate: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias, of x as a norm and a gate make it, added to a residual.

    Args:
        x: (batch, width).
        weight, bias: (outputs, width) and (outputs,).
        norm: (width,), weight of a root-mean-square norm of x.
        eps: what the norm adds to the mean square.
        z: (batch, width), a gate.
        norm_before_gate: whether the gate multiplies what was normalised, or is normalised with it.
        residual: (batch, outputs).
        dtype: of the result; None: that of weight.

    Returns (batch, outputs).
    """
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype or weight.dtype)
    early = _starts_early(x)
    _linear_kernels.linear(x, z, norm, weight, bias, residual, y, eps, norm_before_gate, None, 0, early)
    return y


def convolved_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, eps: float, convolution: Convolution
) -> tuple[Tensor, Tensor]:
    """`linear` after a norm, some of its outputs going on through a step of a convolution.

    Returns (batch, outputs) in the dtype of weight, and the convolution's next state.
    """
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=weight.dtype)
    state, after = _next(convolution.state)
    steps = (convolution.weight.contiguous(), convolution.bias, state, after)
    early = _starts_early(x)
    _linear_kernels.linear(x, None, norm, weight, bias, None, y, eps, False, steps, convolution.first, early)
    return y, after


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`mambakit.ops.rms_norm` of x (batch, width), in the dtype of weight (width,)."""
    y = torch.empty_like(x, dtype=weight.dtype, memory_format=torch.contiguous_format)
    _norm_kernels.forward(NormInputs(x, weight, None, eps, 1, False), y, y)
    return y


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of a causal convolution with silu.

    Args:
        x: (batch, channels).
        weight, bias: (channels, taps) and (channels,).
        state: (batch, taps - 1, channels), in the dtype of x.

    Returns y (batch, channels) in the dtype of x, and the next state.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    state, after = _next(state)
    _kernels.convolution(x, weight.contiguous(), bias, state, y, after, _starts_early(x))
    return y, after


def mamba_scan(
    u: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """What follows x_proj in a step of Mamba-1: the step size, the scan, the gate.

    Args:
        u, z: (batch, dim).
        projected: (batch, dt_rank + 2 state), what x_proj made.
        dt_weight, dt_bias: (dim, dt_rank) and (dim,), of dt_proj.
        A_log: (dim, state).
        D: (dim,).
        state: (batch, dim, state), float32.

    Returns y (batch, dim) in the dtype of u, and the next state.
    """
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    state, after = _next(state)
    parameters = (dt_weight.contiguous(), dt_bias, A_log.contiguous(), D)
    _kernels.mamba_scan(u, projected, *parameters, z, state, y, after, _starts_early(u))
    return y, after


def mamba2_scan(
    xBC: Tensor,
    dt: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """What follows the convolution in a step of Mamba-2: the scan, and the gate where there is no norm.

    Args:
        xBC: (batch, heads headdim + 2 groups state).
        dt: (batch, heads).
        A_log, dt_bias: (heads,).
        D: (heads, headdim).
        z: (batch, heads headdim), or None for no gate.
        dt_limit: bounds of the step.
        state: (batch, heads, headdim, state), float32.

    Returns y (batch, heads headdim) in the dtype of xBC, and the next state.
    """
    y = xBC.new_empty(xBC.shape[0], state.shape[1] * state.shape[2])
    state, after = _next(state)
    _kernels.mamba2_scan(xBC, dt, A_log, D, z, dt_bias, dt_limit, state, y, after, _starts_early(xBC))
    return y, after


def _next(state: Tensor) -> tuple[Tensor, Tensor]:
    """A state as the kernels read it, and where the next one goes."""
    state = state.contiguous()
    return state, state if _IN_PLACE.get() else torch.empty_like(state)


def _starts_early(x: Tensor) -> bool:
    return _CAPTURING.get() and torch.cuda.get_device_capability(x.device) >= _EARLY_STARTS
