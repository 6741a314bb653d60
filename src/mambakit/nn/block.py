"""A mixer with its norm and residual, x + mixer(norm(x)), and if wanted an MLP with its own; sums kept in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.nn.joints import has_hooks
from mambakit.nn.linear import Linear
from mambakit.ops import decode


class GatedMLP(nn.Module):
    """fc2(y silu(gate)), where y and gate are the two halves of fc1(x); no biases.

    Args:
        d_model: width of the input and output.
        d_intermediate: width of y and of the gate.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(d_model, 2 * d_intermediate, bias=False, device=device, dtype=dtype)
        self.fc2 = Linear(d_intermediate, d_model, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)  # (batch, length, d_intermediate) each
        return self.fc2(y * F.silu(gate))


class Block(nn.Module):
    """Pre-norm residual block: `hidden, state = block(hidden, state)`.

    Args:
        mixer: a sequence layer, `y, state = mixer(x, state, cu_seqlens=...)`, x and y (batch, length, d_model).
        d_model: its width.
        d_intermediate: width of a gated MLP after the mixer, with a norm and a residual of its own; 0 for none.
        norm_eps: added to the mean square in the RMS norms.
        dropout: share of what is added to the residual that is dropped in training.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        mixer: nn.Module,
        d_model: int,
        *,
        d_intermediate: int = 0,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.RMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        self.mixer = mixer
        self.norm2, self.mlp = None, None
        if d_intermediate:
            self.norm2 = nn.RMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
            self.mlp = GatedMLP(d_model, d_intermediate, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """hidden (batch, length, d_model); the sum that is returned is float32 at least."""
        residual = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self._steps_at_once(residual, state, cu_seqlens):
            step, state = self.mixer.step_with_residual(residual[:, 0], self.norm, state)  # type: ignore[operator]
            residual = step[:, None]
        else:
            y, state = self.mixer(self.norm(residual.to(self.norm.weight.dtype)), state, cu_seqlens=cu_seqlens)
            residual = residual + F.dropout(y, self.dropout, self.training)
        if self.norm2 is not None and self.mlp is not None:
            y = self.mlp(self.norm2(residual.to(self.norm2.weight.dtype)))
            residual = residual + F.dropout(y, self.dropout, self.training)
        return residual, state

    def _steps_at_once(self, residual: Tensor, state: Any, cu_seqlens: Tensor | None) -> bool:
        """Whether the mixer takes this step with its norm and residual, as on a GPU where launches are most of it."""
        steps_with_residual = getattr(self.mixer, "steps_with_residual", None)
        return (
            steps_with_residual is not None
            and state is not None
            and decode.serves(residual, state, cu_seqlens, self.parameters())
            and not (self.dropout and self.training)
            and type(self.norm) is nn.RMSNorm
            and not has_hooks(self.norm)
            and steps_with_residual()
        )
