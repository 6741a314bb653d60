"""How wide the first steps of a selective state space are: the initial bias under the softplus that makes dt."""

import math

import torch
from torch import Tensor


def initial_dt_bias(
    count: int,
    dt_min: float,
    dt_max: float,
    floor: float,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(count,) values whose softplus is log-uniform between dt_min and dt_max, and at least `floor`."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(count, device=device, dtype=dtype) * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
