"""The causal depthwise convolution before every selective scan.

    y_t = activation(bias + sum_k weight_k x_{t - (width - 1) + k})

`mambakit.ops.reference.causal_conv1d` is the definition; the other backends run the torch operator
`mambakit::causal_conv1d`. The state is the last width - 1 inputs.
"""

import torch
from torch import Tensor

from mambakit.ops import dispatch, operator, triton
from mambakit.ops.cpu import causal_conv1d as cpu
from mambakit.ops.inputs import ConvInputs
from mambakit.ops.packing import check_packing, sequence_count
from mambakit.ops.portable import causal_conv1d as portable
from mambakit.ops.reference.causal_conv1d import causal_conv1d as reference

_KERNELS = {"triton": triton.Operation("causal_conv1d"), "cpu": cpu, "portable": portable}
_WIDEST_ON_TRITON = 16  # taps are kept in registers


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps, looking back only; differentiable in every tensor, states included.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); weight[:, -1] multiplies the present input.
        bias: (channels,).
        activation: None, "silu" or its other name "swish".
        initial_state: (batch, width - 1, channels), the inputs before x, oldest first; zero if None.
        return_final_state: also return the last width - 1 inputs, to carry on from.
        cu_seqlens: (sequences + 1,) integers from 0 to length: packed sequences. Batch is then 1, and states are
            (sequences, width - 1, channels).
        backend: "triton", "cpu", "portable" or "reference"; None picks the fastest for the device.

    Returns:
        y (batch, length, channels) in the dtype of x; with `return_final_state`, (y, state) with the state in the
        dtype of x.

    Raises:
        ValueError: a shape, an activation, a backend or cu_seqlens that does not fit; TypeError: a dtype that is not
            floating.

    >>> y, state = causal_conv1d(torch.randn(2, 100, 8), torch.randn(8, 4), activation="silu", return_final_state=True)
    >>> y.shape, state.shape
    (torch.Size([2, 100, 8]), torch.Size([2, 3, 8]))
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    inputs = ConvInputs(x, weight, bias, initial_state, cu_seqlens, silu=activation is not None)
    _check(inputs)
    name = dispatch.choose(x.device, backend, (*_KERNELS, "reference"), lambda name: _case_refusal(name, inputs))
    inputs = _with_common_dtypes(inputs, name)
    y, final_state = reference(inputs) if name == "reference" else _run(inputs, name)
    return (y, final_state) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d` from `state` (batch, width - 1, channels): returns (y, the next state).

    x and y are (batch, channels); the rest is as in `causal_conv1d`.
    """
    y, final_state = causal_conv1d(
        x[:, None],
        weight,
        bias,
        activation=activation,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return y[:, 0], final_state


def _case_refusal(backend: str, inputs: ConvInputs) -> str | None:
    width = inputs.weight.shape[1]
    if backend == "triton" and width > _WIDEST_ON_TRITON:
        return f"its convolution has {_WIDEST_ON_TRITON} taps at most, and the weight has {width}"
    return None


def _check(inputs: ConvInputs) -> None:
    x, weight, bias, initial_state, cu_seqlens, _ = inputs
    dispatch.check_tensors(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (batch, length, channels), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape (channels, width), got {tuple(weight.shape)}")
    batch, _, channels = x.shape
    width = weight.shape[1]
    dispatch.check_shape("weight", weight, (channels, width), "(channels, width)")
    dispatch.check_shape("bias", bias, (channels,), "(channels,)")
    check_packing(batch, cu_seqlens)
    states = (sequence_count(batch, cu_seqlens), width - 1, channels)
    dispatch.check_shape("initial_state", initial_state, states, "(sequences, width - 1, channels)")


def _with_common_dtypes(inputs: ConvInputs, backend: str) -> ConvInputs:
    """weight and bias in the dtype of sums, the state in that of x. The GPU's kernels widen what they read themselves:
    a cast there is a launch, and its gradient another."""
    x, weight, bias, initial_state, cu_seqlens, silu = inputs
    wide = dispatch.accumulation_dtype(*inputs[:4])
    narrow = wide if wide == torch.float64 else x.dtype
    cast = dispatch.cast
    if backend != "triton" or wide == torch.float64:
        weight, bias = cast(weight, wide), cast(bias, wide)
    return ConvInputs(cast(x, narrow), weight, bias, cast(initial_state, narrow), cu_seqlens, silu)


def _outputs(inputs: ConvInputs, keep: bool, backend: str) -> tuple[Tensor, ...]:
    x = inputs.x
    sequences = sequence_count(x.shape[0], inputs.cu_seqlens)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(sequences, inputs.weight.shape[1] - 1, x.shape[2])


_run = operator.register("causal_conv1d", ConvInputs, _outputs, _KERNELS)
