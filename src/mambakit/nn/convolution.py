"""The causal convolution of the mixers, by the weights of a depthwise `nn.Conv1d`."""

from torch import Tensor, nn

from mambakit import ops


def silu_convolution(
    conv1d: nn.Conv1d, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(conv1d(x)) of x (batch, length, channels), and the state (sequences, width - 1, channels) after it."""
    y, state = ops.causal_conv1d(
        x,
        conv1d.weight.squeeze(1),
        conv1d.bias,
        activation="silu",
        initial_state=state,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return y, state
