"""The cross entropy of logits, which for a language model are the largest tensor of a training step.

    loss = mean of log(sum_j exp(logits_j)) - logits_target

Sums are in float32 (float64 for float64). On a GPU the logits are read in the dtype that they have and no copy of them
is made, where torch's loss makes three in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambakit.ops import dispatch, triton
from mambakit.ops.reference.cross_entropy import cross_entropy as reference

_KERNELS = triton.Kernels("cross_entropy")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The mean, or the sum, of the negative log-likelihoods of the targets, in nats; differentiable once in the logits.

    Args:
        logits: (rows, classes).
        targets: (rows,) integers, the class of each row.
        ignore_index: the target of rows that do not count.
        reduction: "mean", over the rows that count, or "sum".
        backend: "triton", "portable" or "reference"; None picks the fastest for the device.

    Returns:
        One number in float32 (float64 for float64); NaN where no row counts, as torch has it.

    Raises:
        ValueError: a shape, a reduction or a backend that does not fit; TypeError: a dtype that is not floating.

    >>> cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, -100]))
    tensor(1.3863)
    """
    dispatch.check_tensors(logits=logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (rows, classes), got {tuple(logits.shape)}")
    dispatch.check_shape("targets", targets, (logits.shape[0],), "(rows,)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    name = dispatch.choose(logits.device, backend, ("triton", "portable", "reference"), _refusal_of(logits))
    if name == "triton":
        return _CrossEntropy.apply(logits, targets.contiguous(), ignore_index, reduction)
    wide = logits.to(dispatch.accumulation_dtype(logits))
    if name == "reference":
        return reference(wide, targets, ignore_index, reduction)
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction=reduction)


def _refusal_of(logits: Tensor) -> Any:
    def refusal(name: str) -> str | None:
        if name != "triton":
            return None
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return "torch.compile and function transforms go through torch's own cross entropy"
        return "its cross entropy takes no float64" if logits.dtype == torch.float64 else None

    return refusal


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        losses, log_sums = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
        _KERNELS.forward(logits, targets, ignore_index, losses, log_sums)
        count = (targets != ignore_index).sum() if reduction == "mean" else None
        ctx.save_for_backward(logits, targets, log_sums, count)
        ctx.ignore_index = ignore_index
        return losses.sum() if count is None else losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sums, count = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        scale = grad_loss if count is None else grad_loss / count
        _KERNELS.backward(logits, targets, ctx.ignore_index, log_sums, scale, grad)
        return grad, None, None, None
