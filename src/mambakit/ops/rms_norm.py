"""The root-mean-square norm, plain and gated: the gated one stands between the scan and the out-projection of Mamba-2.

    rms_norm(x)          = weight x / sqrt(mean(x^2) + eps), the mean over each group of channels
    gated_rms_norm(x, z) = rms_norm(x silu(z)), or rms_norm(x) silu(z) with norm_before_gate

Sums are in float32 (float64 for float64) whatever the dtype of x. On a GPU one kernel casts, normalises and gates, in
the torch operator `mambakit::rms_norm`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops import dispatch, operator, triton
from mambakit.ops.inputs import NormInputs
from mambakit.ops.portable.rms_norm import gated_rms_norm_in_blocks, rms_norm_in_blocks
from mambakit.ops.portable.rms_norm import rms_norm as portable
from mambakit.ops.reference.rms_norm import rms_norm as reference

_KERNELS = {"portable": portable, "reference": reference}
_WIDEST_ON_TRITON = 16384  # channels of a group, which a program holds whole


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, groups: int = 1, backend: str | None = None) -> Tensor:
    """Divide x by the root of its mean square; differentiable in both tensors.

    Args:
        x: (..., dim).
        weight: (dim,).
        eps: added to the mean square.
        groups: how many groups of neighbouring channels have a mean of their own; it divides dim.
        backend: "triton", "portable" or "reference"; None picks the fastest for the device.

    Returns:
        y (..., dim) in the dtype of x.

    Raises:
        ValueError: a shape, a number of groups or a backend that does not fit; TypeError: a dtype that is not floating.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
    tensor([0.8485, 1.1314])
    """
    _check(x, weight, None, groups)
    name = _backend(x, backend, groups)
    if name == "triton":
        return _run(NormInputs(x, weight, None, eps, groups, False), name)[0]
    wide, kernel = dispatch.accumulation_dtype(x, weight), _KERNELS[name]
    if kernel is portable and _nothing_is_recorded(x, weight):
        return rms_norm_in_blocks(x, weight.to(wide), eps, groups).to(x.dtype)
    return kernel(x.to(wide), weight.to(wide), eps, groups).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`rms_norm` of x gated by z (..., dim), which opens the gate before the norm or after it.

    The other arguments, what is returned and what is raised are as in `rms_norm`.
    """
    _check(x, weight, z, groups)
    name = _backend(x, backend, groups)
    if name == "triton":
        return _run(NormInputs(x, weight, z, eps, groups, norm_before_gate), name)[0]
    wide, kernel = dispatch.accumulation_dtype(x, weight, z), _KERNELS[name]
    if kernel is portable and _nothing_is_recorded(x, weight, z):
        return gated_rms_norm_in_blocks(x, weight.to(wide), z, eps, groups, norm_before_gate).to(x.dtype)
    rows, gate, weight = x.to(wide), F.silu(z.to(wide)), weight.to(wide)
    if norm_before_gate:
        return (kernel(rows, weight, eps, groups) * gate).to(x.dtype)
    return kernel(rows * gate, weight, eps, groups).to(x.dtype)


def _backend(x: Tensor, requested: str | None, groups: int) -> str:
    def case_refusal(name: str) -> str | None:
        if name == "triton" and x.shape[-1] > groups * _WIDEST_ON_TRITON:
            return (
                f"its norm takes groups of {_WIDEST_ON_TRITON} channels at most, and these have {x.shape[-1] // groups}"
            )
        return None

    return dispatch.choose(x.device, requested, ("triton", *_KERNELS), case_refusal)


def _nothing_is_recorded(*tensors: Tensor) -> bool:
    """Whether this is plain execution on the CPU, without gradients, compilation or function transforms."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.numel() for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _check(x: Tensor, weight: Tensor, z: Tensor | None, groups: int) -> None:
    dispatch.check_tensors(x=x, weight=weight, z=z)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., dim), got a scalar")
    dim = x.shape[-1]
    if groups < 1 or dim % groups != 0:
        raise ValueError(f"groups must divide dim: got {groups} groups for dim {dim}")
    dispatch.check_shape("weight", weight, (dim,), "(dim,)")
    dispatch.check_shape("z", z, tuple(x.shape), "(..., dim)")


def _outputs(inputs: NormInputs, keep: bool, backend: str) -> tuple[Tensor, ...]:
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    return y, y.new_empty(0)  # the norm has no state


_run = operator.register("rms_norm", NormInputs, _outputs, {"triton": triton.Operation("rms_norm")})
