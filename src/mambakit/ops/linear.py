"""x W^T + b, by the faster of the two matrix libraries that torch brings for the CPU.

torch sends float32 products to MKL, which on processors of other makers than its own reaches less than half of what
oneDNN does (on an AMD EPYC 9005: 100 GFLOP/s a core against 215). torch itself uses oneDNN for bfloat16 and inside
torch.compile; here it is asked for by the operator that torch.compile uses. Everything else is left to
torch.nn.functional.linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEAST_ROWS = 32  # with fewer rows a product is a matter of reading the weight, at which MKL is no worse
_WIDE = 64  # columns
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the transpose of weight (out, in), plus bias (out,): (..., out). Differentiable once."""
    if _by_onednn(x, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _AVAILABLE
        and not torch.compiler.is_compiling()  # first: the number of rows would become a condition of the program
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _LEAST_ROWS * max(1, x.shape[-1])
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = _inner(rows, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b (out, in) of a (rows, out) and b (rows, in)."""
    if a.shape[1] > b.shape[1]:
        return _inner(b, a).t()
    # oneDNN has a fast path for a transposed second operand only where that is wide; a narrow one is cheap to copy.
    second = b.t()
    return _product(a.t(), second if b.shape[1] >= _WIDE else second.contiguous())
