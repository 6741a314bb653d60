"""The network: a stack of blocks over days of features, and for each horizon a distribution of the log return.

    hidden_t = backbone(dropout(W [x, v]_1..t))_t     N blocks, normalised; v are the terms of today's volatility
    10 m, s  = head_h(hidden_t)                       one linear head for each horizon h
    scale_h  = sigma_t sqrt(h) exp(v_t . w_h)         today's volatility, carried to the horizon (see volatility.py)
    centre_h = drift_h + k_h scale_h m                the mean
    q_h(p)   = centre_h + scale_h (exp(b_h s) z_h(p) + c_h(p))     the quantiles, z_h(p) learnt and the same every day

z_h is its median and, up and down from there, sums of softplus, so quantiles can't cross. The heads start at zero, z_h
at the quantiles of the training part, and w_h at what that part's volatility did. So the untrained network is a
respectable forecaster, the drift with empirical quantiles scaled by a volatility that returns to its mean, and training
departs from it only as far as the validation part rewards.

The two departures are of different kinds. s, how much wider or narrower than usual, has something to learn: what the
weather of the market says of its volatility. m, where to, has next to nothing to learn, and fits noise long before s is
done. So m is learnt at a tenth of the pace of s, which does a real signal no harm. Afterwards the validation part says
how much of either to believe: k_h and b_h are 1 while training and then within [0, 1], see `shrinkage.py`. c_h(p) is
the place of a later calibration, in units of the scale; it starts at zero and is not trained.

The same weights are read in two ways: over a window, whose last day alone is forecast from, or over a whole sequence,
with a forecast at every day and a state that is carried on (`advance`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.forecast.config import QUANTILES, MambaConfig
from mambakit.forecast.features import TimeSeriesFeatureEngineer
from mambakit.forecast.volatility import TERMS, prior_weights
from mambakit.nn import Backbone

_MEDIAN = QUANTILES.index(0.5)
_SMALLEST_SPREAD = 1e-3  # between neighbouring quantiles at the start, in units of the scale
_WIDEST = math.log(10.0)  # |s| stays below: no day's intervals are ten times as wide as usual, or a tenth
_PACE = 0.1  # of m against s
_WEIGHT_OF_MEAN = 0.1  # of its squared error in the loss; the pinball loss has 1
_SMALLEST_SIZE = 1e-6  # of a return in units of its volatility, where a price stands still
_PULL_TO_PRIOR = 0.1  # on the squared distance of w_h from its prior, where a day's misfit counts 1


class Distribution(NamedTuple):
    """A forecast of log returns."""

    mean: Tensor  # (batch, [length,] horizons)
    quantiles: Tensor  # (batch, [length,] horizons, len(QUANTILES)), increasing
    scale: Tensor  # (batch, [length,] horizons), the volatility carried to each horizon, before s


class MambaModel(nn.Module):
    """The pure network, in the units of log returns.

    Args:
        config: sizes, horizons and window.
        n_features: columns of the features, covariates included; those that the configuration asks for by default.
        n_symbols: how many symbols a pooled model knows; 0 for the model of a single one.
        backbone: what takes the place of the Mamba blocks, called as `mambakit.nn.Backbone` is; for comparisons.
    """

    drift: Tensor
    blend: Tensor
    shrinkage: Tensor
    width_shrinkage: Tensor
    calibration: Tensor

    def __init__(
        self,
        config: MambaConfig,
        n_features: int | None = None,
        n_symbols: int = 0,
        *,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if n_features is None:
            engineer = TimeSeriesFeatureEngineer(config.windows, config.include_volume)
            n_features = len(engineer.names) + len(config.covariates)
        self.config = config
        self.n_symbols = n_symbols
        self.embedding = nn.Linear(n_features + len(TERMS), config.d_model)
        # Number 0 is a symbol that the model has not met.
        self.symbols = nn.Embedding(n_symbols + 1, config.d_model) if n_symbols else None
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = backbone or Backbone(
            config.d_model, config.num_layers, mixer=config.mixer, mixer_options=config.mixer_options
        )
        n_horizons = len(config.prediction_horizons)
        self.heads = nn.Linear(config.d_model, 2 * n_horizons)  # 10 m of every horizon, then s of every horizon
        for weight in (self.heads.weight, self.heads.bias, *([self.symbols.weight] if self.symbols else [])):
            nn.init.zeros_(weight)
        self.shape = nn.Parameter(torch.zeros(n_horizons, len(QUANTILES)))  # median, inverse softplus of the spreads
        self.register_buffer("drift", torch.zeros(n_symbols + 1, n_horizons))
        self.register_buffer("blend", torch.zeros(n_horizons, len(TERMS)))  # w
        self.register_buffer("shrinkage", torch.ones(n_horizons))  # k
        self.register_buffer("width_shrinkage", torch.ones(n_horizons))  # b
        self.register_buffer("calibration", torch.zeros(n_horizons, len(QUANTILES)))  # c

    @torch.no_grad()
    def start_from(self, returns: Tensor, volatility: Tensor, terms: Tensor, symbol: Tensor | None = None) -> None:
        """Become the forecaster that needs no network, from the training part.

        Args:
            returns: (samples, horizons).
            volatility: (samples,), terms: (samples, len(TERMS)), both known at each sample's origin.
            symbol: (samples,) numbers of the symbols, from 1, for a pooled model. A symbol that it has not met gets
                the mean drift of all.
        """
        if symbol is None:
            self.drift[0] = returns.mean(dim=0)
            centre = self.drift[:1]
        else:
            for number in range(1, self.n_symbols + 1):
                self.drift[number] = returns[symbol == number].mean(dim=0)
            self.drift[0] = self.drift[1:].mean(dim=0)
            centre = self.drift[symbol]
        residual = (returns - centre) / volatility_at_horizons(volatility, self.config.prediction_horizons)
        for column, horizon in enumerate(self.config.prediction_horizons):
            prior = torch.from_numpy(prior_weights(horizon))
            self.blend[column] = fit_blend(residual[:, column].abs().double(), terms.double(), prior)
        residual = residual / (terms @ self.blend.T).exp()
        # Not torch.quantile, which takes no more than 16 million numbers.
        levels = torch.tensor(QUANTILES, dtype=returns.dtype)
        ordered = residual.sort(dim=0).values
        place = levels * (len(ordered) - 1)
        below, above = ordered[place.floor().long()], ordered[place.ceil().long()]
        quantiles = torch.lerp(below, above, (place - place.floor())[:, None]).T  # (horizons, quantiles)
        self.shape[:, 0] = quantiles[:, _MEDIAN]
        self.shape[:, 1:] = torch.log(torch.expm1(quantiles.diff().clamp(min=_SMALLEST_SPREAD)))

    def forward(
        self, features: Tensor, volatility: Tensor, terms: Tensor, symbol: Tensor | None = None
    ) -> Distribution:
        """Forecast from standardised features, at the last day of windows or at every day of sequences.

        Args:
            features: (batch, length, n_features).
            volatility: (batch,) for windows, of their last day; (batch, length) for sequences.
            terms: (batch, length, len(TERMS)), of every day.
            symbol: (batch,) numbers of the symbols of a pooled model; 0, or none at all, is one that it has not met.
        """
        hidden, _ = self._read(features, terms, symbol, None)
        if volatility.ndim == 1:
            hidden, terms = hidden[:, -1], terms[:, -1]
        return self._forecast(hidden, volatility, terms, symbol)

    def advance(
        self,
        features: Tensor,
        volatility: Tensor,
        terms: Tensor,
        state: tuple[Any, ...] | None = None,
        symbol: Tensor | None = None,
    ) -> tuple[Distribution, tuple[Any, ...]]:
        """Forecast at every day of the sequences' next days, and return the state after them.

        Shapes as in `forward` for sequences; days may come all at once, in pieces, or one by one.
        """
        hidden, state = self._read(features, terms, symbol, state)
        return self._forecast(hidden, volatility, terms, symbol), state

    def _read(
        self, features: Tensor, terms: Tensor, symbol: Tensor | None, state: tuple[Any, ...] | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        embedded = self.embedding(torch.cat([features, terms], dim=-1))  # (batch, length, d_model)
        if self.symbols is not None:
            numbers = features.new_zeros(len(features), dtype=torch.long) if symbol is None else symbol
            embedded = embedded + self.symbols(numbers)[:, None]
        return self.backbone(self.dropout(embedded), state)

    def _forecast(self, hidden: Tensor, volatility: Tensor, terms: Tensor, symbol: Tensor | None) -> Distribution:
        """From hidden (batch, [length,] d_model)."""
        departure, width = self.heads(hidden).float().chunk(2, dim=-1)  # (batch, [length,] horizons) each
        scale = volatility_at_horizons(volatility, self.config.prediction_horizons) * (terms @ self.blend.T).exp()
        drift = self.drift[0] if symbol is None else self.drift[symbol]  # (horizons,) or (batch, horizons)
        if symbol is not None and volatility.ndim == 2:
            drift = drift[:, None]
        centre = drift + self.shrinkage * scale * _PACE * departure
        log_width = self.width_shrinkage * _WIDEST * torch.tanh(width / _WIDEST)
        spread = log_width.exp()[..., None] * _increasing(self.shape) + self.calibration
        if not self.training:
            # Offsets fitted on other days may cross narrower quantiles; in order they never score worse.
            spread = spread.sort(dim=-1).values
        return Distribution(centre, centre[..., None] + scale[..., None] * spread, scale)


def volatility_at_horizons(volatility: Tensor, horizons: Sequence[int]) -> Tensor:
    """Volatility (batch, ...) a day, carried to each horizon by the square root of time: (batch, ..., horizons)."""
    return volatility[..., None] * torch.tensor(horizons, dtype=volatility.dtype, device=volatility.device).sqrt()


def fit_blend(size: Tensor, terms: Tensor, prior: Tensor) -> Tensor:
    """The weights w (terms,) with which terms (samples, terms) best tell the size of returns (samples,), all float64.

    The smallest mean of log s + size / s over log s = constant + terms . w, the likelihood of Laplace's distribution,
    which no single crash decides; plus a pull towards the prior, for one symbol alone says little about w.
    """
    size = size.clamp(min=_SMALLEST_SIZE)
    weights = torch.cat([prior, torch.zeros(1, dtype=prior.dtype)]).requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def misfit() -> Tensor:
        optimizer.zero_grad()
        log_scale = terms @ weights[:-1] + weights[-1]
        pull = _PULL_TO_PRIOR * ((weights[:-1] - prior) ** 2).sum()
        loss = (log_scale + size * (-log_scale).exp()).mean() + pull
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(misfit)
    return weights.detach()[:-1]


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


def forecast_loss(
    forecast: Distribution, returns: Tensor, counted: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its two terms, in units of the forecast's scale: a calm day weighs as much as a stormy one.

    Twice the pinball loss, which over many levels is the CRPS, and a tenth of half the squared error of the mean: the
    quantiles decide which epoch is kept, unless the mean has much to say.

    Args:
        returns: (batch, [length,] horizons).
        counted: (batch, length) 1 for the days of sequences that count, 0 for the others; all by default.
    """
    crps = 2.0 * pinball_loss(forecast.quantiles, returns).mean(dim=-1) / forecast.scale
    squared = 0.5 * ((returns - forecast.mean) / forecast.scale) ** 2
    absolute = (returns - forecast.mean).abs()
    pinball, squared, absolute = (_mean_over_days(cost, counted) for cost in (crps, squared, absolute))
    metrics = {"pinball": pinball.detach(), "squared": squared.detach(), "mae": absolute.detach()}
    return pinball + _WEIGHT_OF_MEAN * squared, metrics


def _mean_over_days(cost: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of (batch, [length,] horizons) over the days that count; 0 where none does."""
    if counted is None:
        return cost.mean()
    return (cost.mean(dim=-1) * counted).sum() / counted.sum().clamp(min=1)
