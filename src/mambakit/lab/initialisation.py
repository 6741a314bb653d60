"""Initial weights by one exponent: W (d1 x d2) ~ N(0, d1^(-2 gamma)), arXiv 2509.17514's knob.

The greater gamma, the smaller the weights: gamma = 0.5 is about the usual initialisation, and at 1 a model begins close
to linear. Two readings:

    "paper"  d1 is the fan-in: the inputs that one output sums over. Every weight matrix, embedding and convolution
             kernel is drawn; rates (A_log), skips (D), norms and biases, among them those of the steps (dt_bias) and
             of Mamba-3's B and C, stay as their mixer made them.
    "seed"   d1 is the tensor's first axis, as it lies in memory. Every parameter of two axes or more is drawn,
             Mamba-1's A_log among them, and every bias is zero, those of the steps too. D and norms stay.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from mambakit.errors import DataError

READINGS = ("paper", "seed")
Reading = Literal["paper", "seed"]

_KEPT = ("A_log", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")


@torch.no_grad()
def initialise(
    model: nn.Module, gamma: float, reading: Reading = "paper", generator: torch.Generator | None = None
) -> None:
    """Draw the weights of `model` in place, in the order of `model.named_parameters()`.

    Args:
        gamma: standard deviations are d1^-gamma.
        reading: "paper" or "seed", as the module says.
        generator: on the CPU; None is torch's own.

    Raises DataError for another reading.
    """
    if reading not in READINGS:
        raise DataError(f"reading must be one of {', '.join(READINGS)}, got {reading!r}")
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        own_name = name.rpartition(".")[2]
        if reading == "seed" and own_name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() >= 2 and not (reading == "paper" and own_name in _KEPT):
            deviation = first_width(owners[id(parameter)], parameter, reading) ** -gamma
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * deviation)


def first_width(module: nn.Module, parameter: Tensor, reading: Reading) -> int:
    """d1 of a parameter of `module`.

    By the paper's reading: of a linear layer (d2, d1) its inputs; of an embedding (d1, d2) its rows, of which
    one is on; of a depthwise kernel (channels, 1, taps) its taps. By the seed's: the first axis.
    """
    if reading == "seed" or isinstance(module, nn.Embedding):
        return parameter.shape[0]
    return parameter[0].numel()
