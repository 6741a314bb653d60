"""The network: a Mamba over a window of features, and for each horizon a distribution of the log return.

    hidden   = backbone(dropout(W x_1..L))_L          the last day's state of N blocks, normalised
    10 m, s  = head_h(hidden)                         one linear head for each horizon h
    scale_h  = sigma_t sqrt(h)                        today's volatility, carried to the horizon
    centre_h = drift_h + k_h scale_h m                the mean
    q_h(p)   = centre_h + scale_h exp(s) z_h(p)       the quantiles, z_h(p) learnt and the same every day

z_h is its median and, up and down from there, sums of softplus, so quantiles can't cross. The heads start at zero and
z_h at the quantiles of the training part. So the untrained network is a respectable forecaster, the drift with
volatility-scaled empirical quantiles, and training departs from it only as far as the validation part rewards.

The two departures are of different kinds. s, how much wider or narrower than usual, has something to learn: volatility
returns to its mean. m, where to, has next to nothing to learn, and fits noise long before s is done. So m is learnt at
a tenth of the pace of s, which does a real signal no harm, and afterwards the validation part says how much of it to
believe: k_h is 1 while training and then within [0, 1], see `mambakit.forecast.train.measure_shrinkage`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.forecast.config import QUANTILES, MambaConfig
from mambakit.nn import Backbone

_MEDIAN = QUANTILES.index(0.5)
_SMALLEST_SPREAD = 1e-3  # between neighbouring quantiles at the start, in units of the scale
_WIDEST = math.log(10.0)  # |s| stays below: no day's intervals are ten times as wide as usual, or a tenth
_PACE = 0.1  # of m against s
_WEIGHT_OF_MEAN = 0.1  # of its squared error in the loss; the pinball loss has 1


class Distribution(NamedTuple):
    """A forecast of log returns."""

    mean: Tensor  # (batch, horizons)
    quantiles: Tensor  # (batch, horizons, len(QUANTILES)), increasing


class MambaModel(nn.Module):
    """The pure network, in the units of log returns.

    Args:
        config: sizes, horizons and window.
        n_features: columns of the features.
        backbone: what takes the place of the Mamba blocks, called as `mambakit.nn.Backbone` is; for comparisons.
    """

    drift: Tensor
    shrinkage: Tensor

    def __init__(self, config: MambaConfig, n_features: int, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(n_features, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = backbone or Backbone(
            config.d_model,
            config.num_layers,
            mixer="mamba",
            mixer_options={"d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand},
        )
        n_horizons = len(config.prediction_horizons)
        self.heads = nn.Linear(config.d_model, 2 * n_horizons)  # 10 m of every horizon, then s of every horizon
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        self.shape = nn.Parameter(torch.zeros(n_horizons, len(QUANTILES)))  # median, inverse softplus of the spreads
        self.register_buffer("drift", torch.zeros(n_horizons))
        self.register_buffer("shrinkage", torch.ones(n_horizons))  # k

    @torch.no_grad()
    def start_from(self, returns: Tensor, volatility: Tensor) -> None:
        """Become the drift forecaster of the training part: returns (samples, horizons), volatility (samples,)."""
        self.drift.copy_(returns.mean(dim=0))
        scale = volatility_at_horizons(volatility, self.config.prediction_horizons)
        levels = torch.tensor(QUANTILES, dtype=returns.dtype)
        quantiles = torch.quantile((returns - self.drift) / scale, levels, dim=0).T  # (horizons, quantiles)
        self.shape[:, 0] = quantiles[:, _MEDIAN]
        self.shape[:, 1:] = torch.log(torch.expm1(quantiles.diff().clamp(min=_SMALLEST_SPREAD)))

    def forward(self, features: Tensor, volatility: Tensor) -> Distribution:
        """Forecast from standardised features (batch, length, n_features) and volatility (batch,) of the last day."""
        hidden, _ = self.backbone(self.dropout(self.embedding(features)))  # (batch, length, d_model)
        departure, width = self.heads(hidden[:, -1]).float().chunk(2, dim=-1)  # (batch, horizons) each
        scale = volatility_at_horizons(volatility, self.config.prediction_horizons)
        centre = self.drift + self.shrinkage * scale * _PACE * departure
        log_width = _WIDEST * torch.tanh(width / _WIDEST)
        spread = (scale * log_width.exp())[..., None] * _increasing(self.shape)
        return Distribution(centre, centre[..., None] + spread)


def volatility_at_horizons(volatility: Tensor, horizons: Sequence[int]) -> Tensor:
    """Volatility (batch,) a day, carried to each horizon by the square root of time: (batch, horizons)."""
    return volatility[:, None] * torch.tensor(horizons, dtype=volatility.dtype, device=volatility.device).sqrt()


def _increasing(shape: Tensor) -> Tensor:
    """Median and inverse softplus of the spreads, (..., quantiles), to quantiles that increase."""
    median, spreads = shape[..., :1], F.softplus(shape[..., 1:])
    below = median - spreads[..., :_MEDIAN].flip(-1).cumsum(-1).flip(-1)
    above = median + spreads[..., _MEDIAN:].cumsum(-1)
    return torch.cat([below, median, above], dim=-1)


def pinball_loss(quantiles: Tensor, target: Tensor) -> Tensor:
    """Pinball loss (..., quantiles) of quantiles (..., quantiles) at the levels QUANTILES against target (...)."""
    levels = torch.tensor(QUANTILES, dtype=quantiles.dtype, device=quantiles.device)
    error = target[..., None] - quantiles
    return torch.maximum(levels * error, (levels - 1.0) * error)


def forecast_loss(forecast: Distribution, returns: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its two terms, in units of scale (batch, horizons): a calm day weighs as much as a stormy one.

    Twice the pinball loss, which over many levels is the CRPS, and a tenth of half the squared error of the mean: the
    quantiles decide which epoch is kept, unless the mean has much to say.
    """
    pinball = 2.0 * (pinball_loss(forecast.quantiles, returns) / scale[..., None]).mean()
    squared = 0.5 * (((returns - forecast.mean) / scale) ** 2).mean()
    return pinball + _WEIGHT_OF_MEAN * squared, {"pinball": pinball.detach(), "squared": squared.detach()}
