"""The scan of Mamba-2 on the compiled backend; native/linear_recurrence.cpp says how it works."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.cpu import linear_recurrence
from mambakit.ops.cpu.linear_recurrence import Recurrence
from mambakit.ops.inputs import SsdInputs

_RANK = 2  # the kernel has an axis of ranks, of which Mamba-2 uses one


def forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every chunk."""
    recurrence, *_ = _recurrence(inputs)
    settings = False, inputs.cu_seqlens, inputs.chunk_size
    linear_recurrence.forward(recurrence, *settings, y, final_state, kept_states)


def backward(
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: SsdInputs
) -> None:
    """Fill `grads`."""
    A = inputs.A
    recurrence, raw, steps = _recurrence(inputs)
    dlog_decay, dscale = A.new_empty(2, *inputs.dt.shape)
    found = Recurrence(
        grads.x,
        grads.B.unsqueeze(_RANK),
        grads.C.unsqueeze(_RANK),
        grads.z,
        dlog_decay,
        dscale,
        D=grads.D,
        initial_state=grads.initial_state,
    )
    settings = False, inputs.cu_seqlens, inputs.chunk_size
    linear_recurrence.backward(recurrence, *settings, kept[0], grad_y, grad_final_state, found)

    grads.A.copy_((dlog_decay * steps).sum((0, 1)))
    dt = dscale.addcmul_(dlog_decay, A)
    wide = F.softplus(raw) if inputs.dt_softplus else raw
    dt *= (wide >= inputs.dt_min) & (wide <= inputs.dt_max)
    if inputs.dt_softplus:
        dt *= torch.sigmoid(raw)
    grads.dt.copy_(dt)
    if grads.dt_bias is not None:
        grads.dt_bias.copy_(dt.sum((0, 1)))


def _recurrence(inputs: SsdInputs) -> tuple[Recurrence, Tensor, Tensor]:
    """What the kernel is given, and dt before softplus and limits and after."""
    x, dt, A, B, C, D, z, dt_bias, initial_state, *_ = inputs
    raw = dt.to(A.dtype)
    if dt_bias is not None:
        raw = raw + dt_bias
    step = (F.softplus(raw) if inputs.dt_softplus else raw).clamp(inputs.dt_min, inputs.dt_max)
    B, C = B.unsqueeze(_RANK), C.unsqueeze(_RANK)
    return Recurrence(x, B, C, z, step * A, step, D=D, initial_state=initial_state), raw, step
