"""The scan of Mamba-2 on the CPU: forward by the compiled recurrence, backward by matrix products.

Measured on two cores, the recurrence with its states in the first-level cache takes less time than the products of a
chunk do; the backward's larger products take less than running it in reverse.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.cpu import native, pack_bounds, rows, whole
from mambakit.ops.inputs import SsdInputs
from mambakit.ops.portable.ssd import backward

__all__ = ["backward", "forward"]


def forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every chunk."""
    A, rank = inputs.A, 2  # the kernel has an axis of ranks, of which Mamba-2 uses one
    dt = inputs.dt.to(A.dtype)
    if inputs.dt_bias is not None:
        dt = dt + inputs.dt_bias
    if inputs.dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(inputs.dt_min, inputs.dt_max)
    native.linear_recurrence(
        rows(inputs.x.unsqueeze(rank)),
        rows(inputs.B.unsqueeze(rank)),
        rows(inputs.C.unsqueeze(rank)),
        whole(dt * A),
        whole(dt),
        None,
        whole(inputs.D),
        rows(inputs.z),
        whole(inputs.initial_state),
        pack_bounds(inputs.x, inputs.cu_seqlens),
        inputs.chunk_size,
        torch.get_num_threads(),
        y.unsqueeze(rank),
        final_state,
        kept_states if kept_states.shape[0] else None,
    )
