"""The selective scan on the compiled backend; native/selective_scan.cpp says how it works."""

from typing import Any

import torch
from torch import Tensor

from mambakit.ops.cpu import native, pack_bounds, rows, whole
from mambakit.ops.inputs import CHUNK, ScanInputs


def forward(inputs: ScanInputs, y: Tensor, final_state: Tensor, checkpoints: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every `CHUNK`-th step."""
    native.scan_forward(
        *_views(inputs),
        whole(inputs.initial_state),
        *_settings(inputs),
        y,
        final_state,
        checkpoints if checkpoints.shape[0] else None,
    )


def backward(
    inputs: ScanInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: ScanInputs
) -> None:
    """Fill `grads`."""
    native.scan_backward(
        *_views(inputs),
        *_settings(inputs),
        whole(kept[0]),
        rows(grad_y),
        whole(grad_final_state),
        *grads[:9],
    )


def _views(inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias, *_ = inputs
    return rows(u), rows(delta), whole(A), rows(B), rows(C), whole(D), rows(z), whole(delta_bias)


def _settings(inputs: ScanInputs) -> tuple[Any, ...]:
    return pack_bounds(inputs.u, inputs.cu_seqlens), inputs.delta_softplus, CHUNK, torch.get_num_threads()
