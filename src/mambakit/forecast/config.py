"""The settings of a forecaster: what the model is made of and how the series is cut, checked when they are made."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from mambakit.training import TrainingConfig

# The bounds of the 95, 80 and 50% intervals, the median, and enough between them for the CRPS to be told from them.
# fmt: off
QUANTILES = (
    0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
    0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975,
)
# fmt: on

# Shares of the windows, in the order of time: training, validation, test.
SPLIT = (0.6, 0.2, 0.2)

# Windows that overlap by all but a day are learnt by heart within a few epochs, so learning is slower and weights are
# pulled back harder than the training loop does by itself. Chosen on the validation parts of the built-in symbols.
FORECAST_TRAINING = TrainingConfig.model_validate(
    {"epochs": 50, "batch_size": 32, "patience": 5, "learning_rate": 2e-4, "weight_decay": 0.1}
)


class MambaConfig(BaseModel):
    """Sizes of the network and of its window; everything needed to build the model again, apart from its weights.

    Raises pydantic.ValidationError for a size that is not positive or horizons that are not increasing.

    Example::

        MambaConfig(d_model=32, num_layers=2, prediction_horizons=(1, 5))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_model: PositiveInt = 64  # width of the residual stream
    d_state: PositiveInt = 16  # states of each channel
    d_conv: PositiveInt = Field(default=4, ge=2, le=4)  # taps of the causal convolution
    expand: PositiveInt = 2  # inner width = expand * d_model
    num_layers: PositiveInt = 4  # Mamba blocks
    dropout: float = Field(default=0.2, ge=0.0, lt=1.0)  # on the embedding, while training
    prediction_horizons: tuple[PositiveInt, ...] = Field(default=(1, 5, 10, 30), min_length=1)  # trading days ahead
    sequence_length: int = Field(default=60, ge=2)  # days in a window
    windows: tuple[int, ...] = Field(default=(5, 10, 20, 60), min_length=1)  # days of the rolling features
    include_volume: bool = False  # adds turnover relative to its own averages

    @field_validator("windows")
    @classmethod
    def _windows_span_two_days(cls, windows: tuple[int, ...]) -> tuple[int, ...]:
        if min(windows) < 2:
            raise ValueError("every rolling window needs at least 2 days")
        return windows

    @model_validator(mode="after")
    def _horizons_increase(self) -> Self:
        if list(self.prediction_horizons) != sorted(set(self.prediction_horizons)):
            raise ValueError("prediction_horizons must increase")
        return self

    @property
    def longest_horizon(self) -> int:
        """Trading days from the forecast's origin to its furthest target; also the purge between the parts."""
        return self.prediction_horizons[-1]
