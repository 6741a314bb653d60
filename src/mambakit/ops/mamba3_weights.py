"""What the steps of Mamba-3 weigh: from its inputs to those of the recurrence, one number a step and head.

On the GPU it is an operator of its own, `mambakit::mamba3_weights`, one launch each way instead of some twenty.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambakit.ops import operator, triton
from mambakit.ops.folding import FOLDS, unfolded
from mambakit.ops.mamba3_inputs import Mamba3Inputs, WeightsInputs
from mambakit.ops.mamba3_recurrence import following_step

_KERNELS = triton.Kernels("mamba3_weights")


class Weights(NamedTuple):
    """Of the recurrence of `mambakit.ops.mamba3_recurrence`; all (batch, length, heads) but speeds."""

    log_decay: Tensor
    scale: Tensor
    own: Tensor
    steps: Tensor  # past softplus
    speeds: Tensor  # (batch, length, heads or 1, pairs): the angles turn by speeds * steps


def weights(inputs: Mamba3Inputs, backend: str) -> Weights:
    """The weights of a scan."""
    dt, A, trap, angles, cu_seqlens = inputs.dt, inputs.A, inputs.trap, inputs.angles, inputs.cu_seqlens
    if backend == "triton":
        ends = None
        if cu_seqlens is not None:
            ends = torch.zeros(dt.shape[1] + 1, dtype=torch.int8, device=dt.device)
            ends[cu_seqlens] = 1
            ends = ends[1:]
        given = (dt.contiguous(), inputs.dt_bias, A.contiguous(), trap.contiguous(), angles.contiguous(), ends)
        # As in ops.operator: torch's operator costs several launches where nobody needs it.
        if operator.runs_plainly(given):
            return Weights(*_KERNELS.forward(*given, inputs.dt_softplus))
        with torch.no_grad():  # but for gradients
            plain = operator.runs_plainly(given)
        call = _Recorded.apply if plain else _fused
        return Weights(*call(*given, inputs.dt_softplus))
    if inputs.dt_bias is not None:
        dt = dt + inputs.dt_bias
    if inputs.dt_softplus:
        dt = F.softplus(dt)
    weight = torch.sigmoid(trap)
    own, following = weight * dt, (1 - weight) * dt
    scale = own + following_step(following, cu_seqlens)
    return Weights(dt * A, scale, own, dt, math.pi * torch.tanh(angles))


@torch.library.custom_op("mambakit::mamba3_weights", mutates_args=())
def _fused(
    dt: Tensor, dt_bias: Tensor | None, A: Tensor, trap: Tensor, angles: Tensor, ends: Tensor | None, softplus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _KERNELS.forward(
        dt, dt_bias, A, trap, angles, ends, softplus
    )
    return found


@_fused.register_fake
def _(
    dt: Tensor, dt_bias: Tensor | None, A: Tensor, trap: Tensor, angles: Tensor, ends: Tensor | None, softplus: bool
) -> tuple[Tensor, ...]:
    return (
        *(torch.empty_like(dt, dtype=torch.float32) for _ in range(4)),
        torch.empty_like(angles, dtype=torch.float32),
    )


@torch.library.custom_op("mambakit::mamba3_weights_backward", mutates_args=())
def _fused_backward(
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    ends: Tensor | None,
    softplus: bool,
    grad_log_decay: Tensor | None,
    grad_scale: Tensor | None,
    grad_own: Tensor | None,
    grad_steps: Tensor | None,
    grad_speeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (grad_log_decay, grad_scale, grad_own, grad_steps, grad_speeds)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _KERNELS.backward(
        dt, dt_bias, A, trap, angles, ends, softplus, grads
    )
    return found


@_fused_backward.register_fake
def _(dt: Tensor, dt_bias: Tensor | None, A: Tensor, trap: Tensor, angles: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (dt, A, trap, angles))


@_fused.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Models are more heads: `mambakit.ops.folding`."""
    folded = FOLDS[WeightsInputs].folded(WeightsInputs(*args), in_dims, info.batch_size)
    found = _fused(*(t.contiguous() if isinstance(t, Tensor) else t for t in folded))
    return tuple(unfolded(t, 2, info.batch_size) for t in found), (2,) * len(found)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.softplus = inputs[-1]
    ctx.set_materialize_grads(False)


def _gradients(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    contiguous = (None if grad is None else grad.contiguous() for grad in grads)
    dt, A, trap, angles = backward(*saved, ctx.softplus, *contiguous)
    bias = None if saved[1] is None else dt.sum((0, 1), dtype=saved[1].dtype)
    return dt, bias, A, trap, angles, None, None


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(_fused_backward, ctx, *grads)


_fused.register_autograd(_autograd, setup_context=_setup_context)


class _Recorded(torch.autograd.Function):
    """The operator's gradients without the operator."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        _setup_context(ctx, args, ())
        found: tuple[Tensor, ...] = _KERNELS.forward(*args)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(lambda *args: _KERNELS.backward(*args[:7], args[7:]), ctx, *grads)
