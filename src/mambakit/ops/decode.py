"""One token through what lies between the projections of a mixer: few launches where launches are most of the time.

The mixers call these on a GPU for a single step that records no gradient, and are otherwise what they do by their
operations; results agree as closely as two backends do.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from mambakit.ops import dispatch, triton

_kernels = triton.Kernels("decode")
_IN_PLACE: ContextVar[bool] = ContextVar("states_in_place", default=False)


def serves(
    x: Tensor, state: tuple[Tensor, ...] | None, cu_seqlens: Tensor | None, parameters: Iterable[Tensor]
) -> bool:
    """Whether x (batch, length, d_model) is such a step: the GPU's, one token on from a state, without gradients.

    Args:
        x: the input of a mixer.
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
def states_in_place() -> Iterator[None]:
    """Inside, a step writes the state of a scan over the one that it read, and spares copying it there."""
    token = _IN_PLACE.set(True)
    try:
        yield
    finally:
        _IN_PLACE.reset(token)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution with silu in a step of Mamba-1.

    Args:
        x: (batch, channels).
        weight, bias: (channels, width) and (channels,).
        state: (batch, width - 1, channels), in the dtype of x.

    Returns y (batch, channels) in the dtype of x, and the next state.
    """
    y, state = torch.empty_like(x, memory_format=torch.contiguous_format), state.contiguous()
    after = torch.empty_like(state)
    _kernels.convolution(x, weight.contiguous(), bias, state, y, after)
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
    y, state = torch.empty_like(u, memory_format=torch.contiguous_format), state.contiguous()
    after = state if _IN_PLACE.get() else torch.empty_like(state)
    _kernels.mamba_scan(u, projected, dt_weight.contiguous(), dt_bias, A_log.contiguous(), D, z, state, y, after)
    return y, after


def mamba2_scan(
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    conv: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution and the scan in a step of Mamba-2, and the gate where there is no norm.

    Args:
        xBC: (batch, heads headdim + 2 groups state), before the convolution.
        dt: (batch, heads).
        weight, bias: (channels, width) and (channels,), of the convolution.
        A_log, dt_bias: (heads,).
        D: (heads, headdim).
        z: (batch, heads headdim), or None for no gate.
        dt_limit: bounds of the step.
        conv: (batch, width - 1, channels).
        state: (batch, heads, headdim, state), float32.

    Returns y (batch, heads headdim) in the dtype of xBC, and both states.
    """
    y = xBC.new_empty(xBC.shape[0], state.shape[1] * state.shape[2])
    conv, state = conv.contiguous(), state.contiguous()
    conv_after, after = torch.empty_like(conv), state if _IN_PLACE.get() else torch.empty_like(state)
    _kernels.mamba2_scan(
        xBC, dt, weight.contiguous(), bias, A_log, D, z, dt_bias, dt_limit, conv, state, y, conv_after, after
    )
    return y, conv_after, after
