"""AdamW, which of the parameters it decays, and the learning rate of each step.

Decay pulls a weight matrix towards zero. For A_log, D, a bias, or the scale of a norm, zero means nothing special
(A_log = 0 is A = -1), so these are left alone. So is every other parameter of one dimension or none, and each one
that carries the attribute `_no_weight_decay = True`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mambakit.errors import MambakitError
from mambakit.training.config import TrainingConfig
from mambakit.training.record import stale_epochs

PLATEAU_EPOCHS = 2
"""Under the schedule "plateau": epochs without a better validation loss before the learning rate falls."""
PLATEAU_FACTOR = 0.5
"""What it then is multiplied with."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: the trainable parameters that decay, and those that do not; an empty one is left out."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for module, name, parameter in _own_parameters(model):
        (decayed if _decays(module, name, parameter) else kept).append(parameter)
    if not decayed and not kept:
        raise MambakitError("the model has no trainable parameter: at least one needs requires_grad=True")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, config.weight_decay)
    real = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    # One call for all tensors instead of a dozen for each; it knows no complex numbers.
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True if real else None)


def learning_rate(config: TrainingConfig, step: int, steps: int, validation_losses: Sequence[float]) -> float:
    """The learning rate of step `step` (0, 1, ...) of `steps`, after epochs with these validation losses.

    It rises linearly through the warm-up. Then, with p going from 0 to 1 over the steps that are left,

        cosine:    min + (max - min) (1 + cos(pi p)) / 2
        restarts:  the same in cycles of restart_epochs epochs, 2 restart_epochs, 4 restart_epochs, ...; p goes from 0
                   to 1 in each (SGDR, arXiv 1608.03983)
        constant:  max
        plateau:   max PLATEAU_FACTOR^k, at least min, where k is how often the validation loss stood still
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    lowest = config.min_learning_rate_ratio
    match config.schedule:
        case "constant":
            factor = 1.0
        case "cosine":
            factor = _cosine((step - warmup) / (steps - warmup), lowest)
        case "restarts":
            assert config.restart_epochs is not None
            length = config.restart_epochs * steps / config.epochs
            position = step - warmup + 0.0
            while position >= length:
                position, length = position - length, 2 * length
            factor = _cosine(position / length, lowest)
        case "plateau":
            stale = stale_epochs(validation_losses, config.min_delta)
            falls = sum(epochs > 0 and epochs % PLATEAU_EPOCHS == 0 for epochs in stale)
            factor = max(lowest, PLATEAU_FACTOR**falls)
    return config.learning_rate * factor


def _cosine(progress: float, lowest: float) -> float:
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each trainable parameter once, tied or not, with its module and its name there."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module, name, parameter


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    exempt = (
        getattr(parameter, "_no_weight_decay", False)
        or parameter.ndim < 2
        or name in ("A_log", "D")
        or name.endswith("bias")
        or "norm" in type(module).__name__.lower()
    )
    return not exempt
