"""The mixers of Mamba with another convolution path: ones for kernels, or with a residual around it.

    ones        kernels fixed at 1: the convolution adds up the last d_conv inputs, whatever their order
    residual    (x, B, C) = silu(conv(U)) + U, the fix of arXiv 2509.17514
    gated       (x, B, C) = silu(conv(U)) * U

U is what the convolution reads: x, B and C in Mamba-2, x alone in Mamba-1. Mamba-3 has no convolution;
`ConvolvedMamba3` puts Mamba-2's there, over x, B and C, so that the same questions can be asked of it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.nn import Mamba, Mamba2, Mamba3, Mamba3State
from mambakit.nn.convolution import silu_convolution

Path = Literal["plain", "residual", "gated"]
"""What becomes of the convolution's result and its input."""


class ConvolvedMamba3State(NamedTuple):
    """What a Mamba-3 with a convolution carries."""

    conv: Tensor  # (batch, d_conv - 1, channels of x, B and C)
    scan: Mamba3State


class ConvolvedMamba3(Mamba3):
    """Mamba-3 with silu(conv1d) over x, B and C before all else: `y, state = mixer(x, state)`.

    Args:
        d_model: width.
        d_conv: taps.
        options: the other arguments of `nn.Mamba3`.
    """

    def __init__(self, d_model: int, *, d_conv: int = 4, **options: Any) -> None:
        super().__init__(d_model, **options)
        self.d_conv = d_conv
        _, x, B, C, *_ = self.widths()
        made: dict[str, Any] = {"device": self.in_proj.weight.device, "dtype": self.in_proj.weight.dtype}
        self.conv1d = nn.Conv1d(x + B + C, x + B + C, d_conv, groups=x + B + C, padding=d_conv - 1, **made)

    def forward(  # type: ignore[override]  # its state has the convolution's beside the scan's
        self, x: Tensor, state: ConvolvedMamba3State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ConvolvedMamba3State]:
        """As `nn.Mamba3`."""
        conv, scan = (None, None) if state is None else state
        z, convolved, rest = self.split_around(self.in_proj(x))
        convolved, conv = self.convolve(convolved, conv, cu_seqlens)
        y, scan = self.mix(torch.cat([z, convolved, rest], dim=-1), scan, cu_seqlens)
        return y, ConvolvedMamba3State(conv, scan)

    def split_around(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z; x, B and C side by side; and dt, A, trap, angles side by side."""
        z, x, B, C, *rest = self.widths()
        return torch.split(projected, [z, x + B + C, sum(rest)], dim=-1)  # type: ignore[return-value]

    def convolve(self, xBC: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """silu(conv1d(xBC)) and the convolution's state."""
        return silu_convolution(self.conv1d, xBC, state, cu_seqlens)


class _Residual:
    """A convolution to which its input is added."""

    def convolve(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = super().convolve(x, state, cu_seqlens)  # type: ignore[misc]
        return y + x, state


class _Gated:
    """A convolution that its input multiplies."""

    def convolve(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = super().convolve(x, state, cu_seqlens)  # type: ignore[misc]
        return y * x, state


class ResidualMamba(_Residual, Mamba):
    """`nn.Mamba` with the residual around its convolution."""


class ResidualMamba2(_Residual, Mamba2):
    """`nn.Mamba2` with the residual around its convolution."""


class ResidualMamba3(_Residual, ConvolvedMamba3):
    """`ConvolvedMamba3` with the residual around its convolution."""


class GatedMamba(_Gated, Mamba):
    """`nn.Mamba` with the input multiplied onto its convolution."""


class GatedMamba2(_Gated, Mamba2):
    """`nn.Mamba2` with the input multiplied onto its convolution."""


class GatedMamba3(_Gated, ConvolvedMamba3):
    """`ConvolvedMamba3` with the input multiplied onto its convolution."""


_CLASSES: dict[str, dict[Path, Callable[..., nn.Module]]] = {
    "mamba": {"plain": Mamba, "residual": ResidualMamba, "gated": GatedMamba},
    "mamba2": {"plain": Mamba2, "residual": ResidualMamba2, "gated": GatedMamba2},
    "mamba3": {"plain": ConvolvedMamba3, "residual": ResidualMamba3, "gated": GatedMamba3},
}
GENERATIONS = tuple(_CLASSES)
"""The mixers that composite models are made of."""


def mixer_class(mixer: str, path: Path = "plain", convolution: bool = True) -> Callable[..., nn.Module]:
    """The class of a generation of Mamba with a convolution path.

    Args:
        mixer: "mamba", "mamba2" or "mamba3".
        convolution: only of Mamba-3: without it, its own self.

    Raises DataError for another mixer.
    """
    if mixer not in _CLASSES:
        raise DataError(f"mixer must be one of {', '.join(_CLASSES)}, got {mixer!r}")
    if mixer == "mamba3" and path == "plain" and not convolution:
        return Mamba3
    return _CLASSES[mixer][path]


@torch.no_grad()
def set_kernels_to_one(model: nn.Module) -> None:
    """Fix every convolution kernel of `model` at 1, out of training's reach; biases stay trainable."""
    kernels = [module.weight for module in model.modules() if isinstance(module, nn.Conv1d)]
    if not kernels:
        raise DataError("the model has no convolution whose kernels could be 1: give it d_conv >= 1")
    for kernel in kernels:
        kernel.fill_(1.0)
        kernel.requires_grad_(False)
