"""Many steps ahead for several channels at once: a linear map of the window, and what a Mamba adds to it.

    level = mean of the window,   scale = its standard deviation       for each channel
    y     = level + R (x - level) + k scale W backbone(patches((x - level) / scale))_last

R (horizon, lookback) is shared by the channels and solved in closed form, a ridge regression whose penalty the
validation part chooses. W starts at zero, so training starts from the ridge's forecast. k, 1 while training, is then
how much of the Mamba's correction the validation part bears out: a part of four months holds three forecasts of 720
hours that do not overlap, and in so few a chance correction looks good half of the time.

Subtracting the level is what RevIN does (Kim et al., 2022), patches are PatchTST's (arXiv 2211.14730); that a linear
map is hard to beat on such data was shown by DLinear (arXiv 2205.13504).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mambakit.errors import DataError
from mambakit.nn import MIXERS, Backbone
from mambakit.training import TrainingConfig, TrainingRecord, fit

PENALTIES = (1e1, 1e2, 1e3, 1e4, 3e4, 1e5)  # of the ridge, in units of squared standardised values
_SMALLEST_SCALE = 1e-3  # of a window that stands still, in units of the standardised values
_WINDOWS_AT_ONCE = 256
_ONE_SIGMA = 0.8413  # of a normal distribution lies below one standard deviation

LONG_HORIZON_TRAINING = TrainingConfig.model_validate(
    {"epochs": 5, "batch_size": 128, "patience": 2, "learning_rate": 2e-4, "weight_decay": 0.05}
)


class LongHorizonConfig(BaseModel):
    """Sizes of the window and of the network.

    Raises pydantic.ValidationError for sizes that don't fit each other, or an unknown mixer.

    Example::

        LongHorizonConfig(lookback=512, horizon=96)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lookback: PositiveInt = 512  # steps that the forecast is made from
    horizon: PositiveInt = 96  # steps that it covers
    patch: PositiveInt = 32  # neighbouring steps that the network reads as one
    stride: PositiveInt = 16  # from one patch to the next
    d_model: PositiveInt = 32
    num_layers: PositiveInt = 2
    mixer: str = "mamba2"
    mixer_options: dict[str, Any] = Field(default_factory=lambda: {"headdim": 16, "d_state": 16})
    dropout: float = Field(default=0.5, ge=0.0, lt=1.0)  # on patches and on what the head reads
    linear: bool = True  # False: no ridge, the Mamba alone

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {self.mixer!r}")
        if self.patch > self.lookback:
            raise ValueError(f"a patch of {self.patch} steps does not fit into a lookback of {self.lookback}")
        return self


class LongHorizonModel(nn.Module):
    """Forecasts every channel from its own past, with weights that the channels share.

    >>> model = LongHorizonModel(LongHorizonConfig(lookback=64, horizon=24))
    >>> model(torch.randn(8, 64, 7)).shape
    torch.Size([8, 24, 7])
    """

    linear: Tensor
    shrinkage: Tensor

    def __init__(self, config: LongHorizonConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.lookback - config.patch) // config.stride + 1
        self.embedding = nn.Linear(config.patch, config.d_model)
        self.position = nn.Parameter(torch.zeros(patches, config.d_model))
        self.backbone = Backbone(config.d_model, config.num_layers, config.mixer, config.mixer_options)
        self.head = nn.Linear(config.d_model, config.horizon)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("linear", torch.zeros(config.horizon, config.lookback))  # R, solved and not trained
        self.register_buffer("shrinkage", torch.ones(()))  # k

    def forward(self, x: Tensor) -> Tensor:
        """Windows (batch, lookback, channels) to forecasts (batch, horizon, channels), in the unit of the windows."""
        x = x.transpose(1, 2)  # (batch, channels, lookback)
        level = x.mean(-1, keepdim=True)
        centred = x - level
        scale = centred.std(-1, keepdim=True) + _SMALLEST_SCALE
        # The last steps are always read: patches are cut from the end.
        unread = (self.config.lookback - self.config.patch) % self.config.stride
        patches = (centred / scale)[..., unread:].unfold(-1, self.config.patch, self.config.stride)
        embedded = self.dropout(self.embedding(patches) + self.position)  # (batch, channels, patches, d_model)
        hidden, _ = self.backbone(embedded.flatten(0, 1))
        last = hidden[:, -1].unflatten(0, x.shape[:2])  # (batch, channels, d_model)
        y = level + F.linear(centred, self.linear) + self.shrinkage * scale * self.head(self.dropout(last))
        return y.transpose(1, 2)


class SeriesWindows:
    """Every window of a series and the steps that follow it, as the training loop asks for them.

    Args:
        values: (steps, channels).
        lookback, horizon: steps of a window and of its target.
        first_target, end: the targets lie within the steps [first_target, end); the windows reach back before.

    Raises DataError where the steps hold no window.
    """

    def __init__(self, values: np.ndarray, lookback: int, horizon: int, first_target: int, end: int) -> None:
        first = max(0, first_target - lookback)
        self._starts = torch.arange(first, end - lookback - horizon + 1)
        if not len(self._starts):
            raise DataError(
                f"steps {first} to {end} are too few for a window of {lookback} steps and a horizon of {horizon}"
            )
        self._values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        self._steps, self._lookback = torch.arange(lookback + horizon), lookback

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Windows (batch, lookback, channels) and their targets (batch, horizon, channels)."""
        rows = self._values[self._starts[indices][:, None] + self._steps]
        return rows[:, : self._lookback], rows[:, self._lookback :]

    def batches(self) -> Sequence[Tensor]:
        """The indices of all windows, cut into pieces that fit into memory."""
        return torch.arange(len(self)).split(_WINDOWS_AT_ONCE)


@dataclass(frozen=True)
class LongHorizonResult:
    """A trained model, and the record of its training, whose epoch 0 is the ridge alone (or, without it, the level).

    The record's losses are those of the whole correction, before it is shrunk.
    """

    model: LongHorizonModel
    record: TrainingRecord
    penalty: float | None  # of the ridge


def train_long_horizon(
    values: np.ndarray,
    training_end: int,
    validation_end: int,
    config: LongHorizonConfig,
    training: TrainingConfig = LONG_HORIZON_TRAINING,
    *,
    run_dir: Path | None = None,
    quiet: bool = False,
) -> LongHorizonResult:
    """Solve the ridge and train the network on steps [0, training_end); choose by [training_end, validation_end).

    Args:
        values: (steps, channels), standardised by the training part; nothing after validation_end is read.

    Raises DataError where a part is too short or holds values that are not finite.
    """
    if values.ndim != 2 or not np.isfinite(values[:validation_end]).all():
        raise DataError(f"values must be finite numbers (steps, channels), got shape {values.shape}")
    sizes = config.lookback, config.horizon
    known = SeriesWindows(values, *sizes, 0, training_end)
    unseen = SeriesWindows(values, *sizes, training_end, validation_end)
    torch.manual_seed(training.seed)
    model = LongHorizonModel(config)
    penalty = solve_ridge(model, known, unseen) if config.linear else None
    record = fit(model, _squared_error, known, unseen, training, run_dir=run_dir, quiet=quiet)
    if config.linear:
        _shrink(model, unseen)
    return LongHorizonResult(model, record, penalty)


@torch.no_grad()
def solve_ridge(model: LongHorizonModel, known: SeriesWindows, unseen: SeriesWindows) -> float:
    """Fill R with the ridge of the training part whose penalty does best on the validation part; returns that."""
    lookback, horizon = model.config.lookback, model.config.horizon
    squares = torch.zeros(lookback, lookback, dtype=torch.float64)
    products = torch.zeros(lookback, horizon, dtype=torch.float64)
    for indices in known.batches():
        x, y = (part.transpose(1, 2).double() for part in known.batch(indices))  # (batch, channels, steps)
        level = x.mean(-1, keepdim=True)
        x, y = (x - level).flatten(0, 1), (y - level).flatten(0, 1)
        squares += x.T @ x
        products += x.T @ y
    identity = torch.eye(lookback, dtype=torch.float64)
    maps = torch.stack([torch.linalg.solve(squares + penalty * identity, products).T for penalty in PENALTIES])
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for indices in unseen.batches():
        x, y = (part.transpose(1, 2).double() for part in unseen.batch(indices))
        level = x.mean(-1, keepdim=True)
        for number, each in enumerate(maps):
            errors[number] += (F.linear(x - level, each) + level - y).square().sum()
    best = int(errors.argmin())
    model.linear.copy_(maps[best])
    return PENALTIES[best]


@torch.no_grad()
def mean_errors(model: nn.Module, windows: SeriesWindows) -> tuple[float, float]:
    """Mean squared and mean absolute error over all windows, steps and channels."""
    model.eval()
    device = next(model.parameters()).device
    squared = absolute = count = 0.0
    for indices in windows.batches():
        x, y = (part.to(device) for part in windows.batch(indices))
        error = (model(x) - y).double()
        squared += error.square().sum().item()
        absolute += error.abs().sum().item()
        count += error.numel()
    return squared / count, absolute / count


def _squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x, y = batch
    return F.mse_loss(model(x), y), {}


@torch.no_grad()
def _shrink(model: LongHorizonModel, unseen: SeriesWindows) -> None:
    """Set k to the share of the correction that serves the validation part best, less its standard error."""
    device = model.linear.device
    met, power = [], []  # of each window: correction * residual of the ridge, and correction^2
    for indices in unseen.batches():
        x, y = (part.to(device) for part in unseen.batch(indices))
        model.shrinkage.fill_(0.0)
        ridge = model(x)
        model.shrinkage.fill_(1.0)
        correction = model(x) - ridge
        met.append((correction * (y - ridge)).mean((1, 2)).double().cpu())
        power.append(correction.square().mean((1, 2)).double().cpu())
    products, squares = torch.cat(met).numpy(), torch.cat(power).numpy()
    model.shrinkage.fill_(believable_share(products, squares, model.config.horizon))


def believable_share(products: np.ndarray, squares: np.ndarray, horizon: int) -> float:
    """How much of a correction to believe, from 0 to 1: the best share of it, less its standard error.

    The best share k minimises the sum of (residual - k correction)^2 over the windows. Its error comes from the means
    of blocks of `horizon` windows, which hardly overlap; for few blocks it is widened as Student's t asks.

    Args:
        products: (windows,) means over a window of correction * residual, in the order of time.
        squares: (windows,) means of correction^2.
    """
    from scipy.stats import t

    blocks, power = len(squares) // horizon, float(squares.mean())
    if blocks < 2 or power == 0.0:
        return 0.0
    best = float(products.mean()) / power
    left = (products - best * squares)[-blocks * horizon :].reshape(blocks, horizon).mean(axis=1)
    error = float(left.std(ddof=1)) / np.sqrt(blocks) / power
    return float(np.clip(best - t.ppf(_ONE_SIGMA, blocks - 1) * error, 0.0, 1.0))
