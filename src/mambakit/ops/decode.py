"""One token through a block, or through what lies between the projections of a mixer: few launches where launches are
most of the time.

Blocks and mixers call these on a GPU for a single step that records no gradient, and are otherwise what they do by
their operations; results agree as closely as two backends do.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from mambakit.ops import dispatch, triton

_EARLY_STARTS = (9, 0)  # compute capability

_kernels = triton.Kernels("decode")
_linear_kernels = triton.Kernels("decode_linear")
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
    """Inside, a step writes the state of a scan over the one that it read, and spares copying it there.

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
    _linear_kernels.linear(x, z, norm, weight, bias, residual, y, eps, norm_before_gate, _starts_early(x))
    return y


def mamba_scan(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    conv: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What lies between in_proj and out_proj in a step of Mamba-1.

    Args:
        x, z: (batch, dim).
        conv_weight, conv_bias: (dim, taps) and (dim,).
        x_proj: (dt_rank + 2 state, dim).
        dt_weight, dt_bias: (dim, dt_rank) and (dim,), of dt_proj.
        A_log: (dim, state).
        D: (dim,).
        conv: (batch, taps - 1, dim), in the dtype of x.
        state: (batch, dim, state), float32.

    Returns y (batch, dim) in the dtype of x, and both states.
    """
    early, x_proj, conv_weight = _starts_early(x), x_proj.contiguous(), conv_weight.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    conv, state = conv.contiguous(), state.contiguous()
    conv_after, after = (conv, state) if _IN_PLACE.get() else (torch.empty_like(conv), torch.empty_like(state))
    projected = x.new_empty(x.shape[0], x_proj.shape[0])
    _kernels.mamba_select(x, conv_weight, conv_bias, conv, x_proj, projected, early)
    parameters = (dt_weight.contiguous(), dt_bias, A_log.contiguous(), D)
    _kernels.mamba_scan(x, conv_weight, conv_bias, projected, *parameters, z, conv, state, y, conv_after, after, early)
    return y, conv_after, after


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
        weight, bias: (channels, taps) and (channels,), of the convolution.
        A_log, dt_bias: (heads,).
        D: (heads, headdim).
        z: (batch, heads headdim), or None for no gate.
        dt_limit: bounds of the step.
        conv: (batch, taps - 1, channels).
        state: (batch, heads, headdim, state), float32.

    Returns y (batch, heads headdim) in the dtype of xBC, and both states.
    """
    y = xBC.new_empty(xBC.shape[0], state.shape[1] * state.shape[2])
    conv, state = conv.contiguous(), state.contiguous()
    conv_after, after = torch.empty_like(conv), state if _IN_PLACE.get() else torch.empty_like(state)
    parameters = (weight.contiguous(), bias, A_log, D, z, dt_bias, dt_limit)
    _kernels.mamba2_scan(xBC, dt, *parameters, conv, state, y, conv_after, after, _starts_early(xBC))
    return y, conv_after, after


def _starts_early(x: Tensor) -> bool:
    return _CAPTURING.get() and torch.cuda.get_device_capability(x.device) >= _EARLY_STARTS
