"""The norms of `mamba_ssm.ops.triton.layer_norm`: the residual is added, then normalised, and on request returned.

sum = dropout(rowscale x) + dropout(x1) + residual;   y = norm(sum),   y1 = norm(sum) with the second weight
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.compat.refusal import NotServed


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Add and normalise.

    Args:
        x, x1, residual: (..., dim).
        weight, bias, weight1, bias1: (dim,); with weight1 there is a second output.
        dropout_p: of x and of x1.
        rowscale: (...,), factors on x.
        prenorm: also return the sum, in the dtype of the residual (or float32 with residual_in_fp32, or that of x).
        is_rms_norm: the RMS norm and not the layer norm.

    Returns y in the dtype of x, then y1, then the sum, those that there are. Raises NotServed for return_dropout_mask.
    """
    if return_dropout_mask:
        raise NotServed("return_dropout_mask: torch's dropout does not give its mask; leave it out")
    if bias1 is not None and weight1 is None:
        raise NotServed("bias1 needs weight1")
    if x1 is not None and rowscale is not None:
        raise NotServed("rowscale with x1: scale x before the call")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide)
    if rowscale is not None:
        total = total * rowscale.to(wide)[..., None]
    total = F.dropout(total, dropout_p)
    if x1 is not None:
        total = total + F.dropout(x1.to(wide), dropout_p)
    kept = x.dtype
    if residual is not None:
        total, kept = total + residual.to(wide), residual.dtype
    elif residual_in_fp32:
        kept = wide
    outputs = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        outputs.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        outputs.append(total.to(kept))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_fn` with the RMS norm."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


class RMSNorm(nn.Module):
    """`y = norm(x, residual)` by `rms_norm_fn`; with prenorm, (y, sum). Its only parameter is `weight`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _norm(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    shape = (total.shape[-1],)
    normed = F.rms_norm(total, shape, eps=eps) if is_rms_norm else F.layer_norm(total, shape, eps=eps)
    y = normed * weight.to(total.dtype)
    return y if bias is None else y + bias.to(total.dtype)
