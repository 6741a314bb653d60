"""Operations on tensors: one file an operation, each with its equation, its shapes and its one-step form.

Layout is (batch, length, ...channels): channels last everywhere. Every operation runs on several backends with one
result; `mambakit.ops.dispatch` says which serves which device.
"""

from mambakit.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from mambakit.ops.cross_entropy import cross_entropy
from mambakit.ops.linear import linear
from mambakit.ops.mamba3_inputs import Mamba3State
from mambakit.ops.mamba3_scan import mamba3_scan, mamba3_step
from mambakit.ops.quantised_linear import quantised_linear
from mambakit.ops.rms_norm import gated_rms_norm, rms_norm
from mambakit.ops.selective_scan import selective_scan, selective_scan_step
from mambakit.ops.ssd import ssd, ssd_step

__all__ = [
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "mamba3_scan",
    "mamba3_step",
    "Mamba3State",
    "causal_conv1d",
    "causal_conv1d_step",
    "cross_entropy",
    "linear",
    "quantised_linear",
    "rms_norm",
    "gated_rms_norm",
]
