"""A scan between its hook points: as the operation gave it, unless its insides were replaced.

A replaced decay or replaced states go step by step; a replaced mixing matrix is multiplied out, and leaves no state to
carry on from: what is returned as such is NaN.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.mechanisms.linear_form import LinearForm

_NEVER = -1e5  # the logarithm of a decay of nothing: its exponential is zero, and sums of it stay finite


class Point(Protocol):
    """Where a forward shows a tensor, and takes back the one to go on with."""

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, or what stands in for it."""

    def asked(self, name: str) -> bool:
        """Whether anything looks at this name."""


class Call(NamedTuple):
    """How the mixer was called: with packed sequences, and with a state to carry on from."""

    packed: bool
    continued: bool


def shown_scan(
    at: Point,
    fused: tuple[Tensor, Tensor],
    form: Callable[[Tensor, Tensor], LinearForm],
    log_decay: Callable[[], Tensor],
    call: Call,
) -> tuple[Tensor, Tensor]:
    """y, D and gate left out, and the state after the last step.

    Args:
        at: the hook points `decay`, `states` and `mixing`.
        fused: y and the state as the operation gives them.
        form: the scan's linear form, of the decay and its logarithm.
        log_decay: makes (batch, length, heads), or (batch, length, d_inner, state) in Mamba-1.
        call: how the mixer was called.

    Raises DataError for what packed sequences, or a state, rule out.
    """
    if not any(at.asked(name) for name in ("decay", "states", "mixing")):
        return fused
    decay, logarithm, changed = _decays(at, log_decay())
    if not (changed or at.asked("states") or at.asked("mixing")):
        return fused
    y, ssm = fused
    if call.packed or y.shape[1] == 0:
        raise DataError("states, mixing and a replaced decay need a batch of sequences, neither packed nor empty")
    if call.continued and at.asked("mixing"):
        raise DataError("mixing covers whole sequences: call without the state of an earlier call")
    linear = form(decay, logarithm)
    states = _states(at, linear, ssm, changed)
    matrix = _matrix(at, linear)
    if states is not None and matrix is not None:
        raise DataError("mixing can't be replaced beside states or decay in one layer: replace one of them")
    if states is not None:
        return linear.read(states).view_as(y), states[:, -1].reshape(ssm.shape)
    if matrix is not None:
        return linear.apply(matrix).reshape(y.shape), torch.full_like(ssm, torch.nan)
    return fused


def _decays(at: Point, log_decay: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The decay and its logarithm to go on with, and whether they were replaced."""
    computed = torch.exp(log_decay)
    decay = at("decay", computed)
    if decay is computed:
        return decay, log_decay, False
    if (decay < 0).any():
        raise DataError("decay must not be negative: it is the share of the state that a step keeps")
    least = math.exp(-80)  # what float32 still holds
    return decay, torch.where(decay > least, decay.clamp(min=least).log(), _NEVER), True


def _states(at: Point, linear: LinearForm, ssm: Tensor, changed: bool) -> Tensor | None:
    """The states after every step, (batch, length, heads, headdim, state), where they or the decay were replaced."""
    if not (changed or at.asked("states")):
        return None
    computed = linear.states()
    shown = computed.reshape(*computed.shape[:2], *ssm.shape[1:])  # Mamba-1's (batch, length, d_inner, state)
    states = at("states", shown)
    return None if states is shown and not changed else states.reshape(computed.shape)


def _matrix(at: Point, linear: LinearForm) -> Tensor | None:
    """M (batch, heads, rank, rank, length, length), where it was replaced."""
    if not at.asked("mixing"):
        return None
    computed = linear.mixing()
    shown = computed if linear.v.shape[2] > 1 else computed[:, :, 0, 0]
    matrix = at("mixing", shown)
    return None if matrix is shown else matrix.reshape(computed.shape)
