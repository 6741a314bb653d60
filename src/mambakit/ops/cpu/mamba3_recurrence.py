"""The recurrence of Mamba-3 on the CPU: forward by the compiled recurrence, backward by matrix products."""

import torch
from torch import Tensor

from mambakit.ops.cpu import native, pack_bounds, rows, whole
from mambakit.ops.mamba3_inputs import RecurrenceInputs
from mambakit.ops.portable.mamba3_recurrence import backward

__all__ = ["backward", "forward"]


def forward(inputs: RecurrenceInputs, y: Tensor, final_state: Tensor, before: Tensor) -> None:
    """Fill y, the final state and, unless it is empty, the state before every chunk."""
    native.linear_recurrence(
        rows(inputs.v),
        rows(inputs.k),
        rows(inputs.q),
        whole(inputs.log_decay),
        whole(inputs.scale),
        whole(inputs.gamma),
        None,
        None,
        whole(inputs.initial_state),
        pack_bounds(inputs.v, inputs.cu_seqlens),
        inputs.chunk_size,
        torch.get_num_threads(),
        y,
        final_state,
        before if before.shape[0] else None,
    )
