"""The inputs of each operation as its backends receive them: checked, and with the dtypes that they expect."""

from typing import NamedTuple

from torch import Tensor

CHUNK = 32  # steps between kept states: a chunk's states fit the second-level cache, the kept ones cost state/32 rows
TRITON_INTERVAL = 8  # the same of the GPU's kernels, which hold that many steps of a state in registers
TRITON_MOST_STATES = 256
TRITON_STATES_TOGETHER = 64  # of one call of its kernels: each is an accumulator, and more would leave the registers


class ScanInputs(NamedTuple):
    """Inputs of the selective scan; activations share one dtype, the rest is float32 (float64 for float64)."""

    u: Tensor  # (batch, length, dim)
    delta: Tensor  # (batch, length, dim)
    A: Tensor  # (dim, state)
    B: Tensor  # (batch, length, groups, state); for the GPU's kernels one group may go without its axis
    C: Tensor  # (batch, length, groups, state), likewise
    D: Tensor | None  # (dim,)
    z: Tensor | None  # (batch, length, dim)
    delta_bias: Tensor | None  # (dim,)
    initial_state: Tensor | None  # (sequences, dim, state)
    cu_seqlens: Tensor | None  # (sequences + 1,)
    delta_softplus: bool


class ConvInputs(NamedTuple):
    """Inputs of the causal convolution; weight and bias are float32 (float64 for float64), or, for the GPU's kernels,
    narrower."""

    x: Tensor  # (batch, length, channels)
    weight: Tensor  # (channels, width)
    bias: Tensor | None  # (channels,)
    initial_state: Tensor | None  # (sequences, width - 1, channels), in the dtype of x
    cu_seqlens: Tensor | None  # (sequences + 1,)
    silu: bool


class NormInputs(NamedTuple):
    """Inputs of the fused root-mean-square norm, each in the dtype that it has."""

    x: Tensor  # (..., dim)
    weight: Tensor  # (dim,)
    z: Tensor | None  # (..., dim)
    eps: float
    groups: int
    norm_before_gate: bool


class SsdInputs(NamedTuple):
    """Inputs of the scan of Mamba-2; activations share one dtype, the rest is float32 (float64 for float64)."""

    x: Tensor  # (batch, length, heads, headdim)
    dt: Tensor  # (batch, length, heads)
    A: Tensor  # (heads,)
    B: Tensor  # (batch, length, groups, state)
    C: Tensor  # (batch, length, groups, state)
    D: Tensor | None  # (heads, headdim)
    z: Tensor | None  # (batch, length, heads, headdim)
    dt_bias: Tensor | None  # (heads,)
    initial_state: Tensor | None  # (sequences, heads, headdim, state)
    cu_seqlens: Tensor | None  # (sequences + 1,)
    dt_softplus: bool
    dt_min: float
    dt_max: float
    chunk_size: int
