"""The scan of Mamba-3 on the compiled backend; native/linear_recurrence.cpp says how it works."""

from torch import Tensor

from mambakit.ops.cpu import linear_recurrence
from mambakit.ops.cpu.linear_recurrence import Recurrence
from mambakit.ops.mamba3_inputs import WholeScanInputs


def forward(inputs: WholeScanInputs, y: Tensor, final_state: Tensor, kept_states: Tensor, *_: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every chunk."""
    linear_recurrence.forward(*_settings(inputs), y, final_state, kept_states)


def backward(
    inputs: WholeScanInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: WholeScanInputs
) -> None:
    """Fill `grads`."""
    linear_recurrence.backward(*_settings(inputs), kept[0], grad_y, grad_final_state, _recurrence(grads))


def _settings(inputs: WholeScanInputs) -> tuple[Recurrence, bool, Tensor | None, int]:
    return _recurrence(inputs), inputs.interleaved, inputs.cu_seqlens, inputs.chunk_size


def _recurrence(tensors: WholeScanInputs) -> Recurrence:
    return Recurrence(**{name: getattr(tensors, name) for name in Recurrence._fields})
