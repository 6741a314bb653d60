"""The settings of a forecaster: what the model is made of and how the series is cut, checked when they are made."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from mambakit.errors import DataError
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

TrainingMode = Literal["sequence", "windows"]

# Windows that overlap by all but a day are learnt by heart within a few epochs, so learning is slower and weights are
# pulled back harder than the training loop does by itself. Chosen on the validation parts of the built-in symbols.
WINDOW_TRAINING = TrainingConfig.model_validate(
    {"epochs": 50, "batch_size": 32, "patience": 5, "learning_rate": 2e-4, "weight_decay": 0.1}
)

# A pass over whole sequences is few steps, so these are larger, and more passes are waited for. Chosen likewise.
SEQUENCE_TRAINING = TrainingConfig.model_validate(
    {"epochs": 50, "batch_size": 2, "patience": 8, "learning_rate": 5e-4, "weight_decay": 0.1}
)

# Which of the sizes each mixer has; those that it lacks must be left at their defaults.
_SIZES_OF = {
    "mamba": ("d_state", "d_conv", "expand"),
    "mamba2": ("d_state", "d_conv", "expand"),
    "mamba3": ("d_state", "expand"),
    "s4d": ("d_state",),
    "attention": (),
}

PRESETS: dict[str, dict[str, int]] = {
    "default": {"d_model": 64, "d_state": 16, "num_layers": 4},
    "small": {"d_model": 32, "d_state": 8, "num_layers": 2},
    "large": {"d_model": 128, "d_state": 32, "num_layers": 6},
    "high-variance": {"d_model": 96, "d_state": 24, "num_layers": 5},
}

# Epochs, windows in a batch, and the learning rate over that of the default.
_TRAINING_OF = {
    "default": (50, 32, 1.0),
    "small": (20, 16, 2.0),
    "large": (100, 64, 0.5),
    "high-variance": (75, 32, 1.0),
}


class MambaConfig(BaseModel):
    """Sizes of the network and of its window; everything needed to build the model again, apart from its weights.

    Raises pydantic.ValidationError for a size that is not positive, horizons that are not increasing, or a size that
    the mixer does not have.

    Example::

        MambaConfig(d_model=32, num_layers=2, prediction_horizons=(1, 5))
        MambaConfig.preset("large", mixer="mamba2")
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_model: PositiveInt = 64  # width of the residual stream
    d_state: PositiveInt = 16  # states of each channel
    d_conv: PositiveInt = Field(default=4, ge=2, le=4)  # taps of the causal convolution
    expand: PositiveInt = 2  # inner width = expand * d_model
    num_layers: PositiveInt = 4  # blocks
    mixer: Literal["mamba", "mamba2", "mamba3", "s4d", "attention"] = "mamba"  # what mixes the days in each block
    dropout: float = Field(default=0.2, ge=0.0, lt=1.0)  # on the embedding, while training
    training_mode: TrainingMode = "sequence"  # a loss at every day of the whole series, or at the end of every window
    prediction_horizons: tuple[PositiveInt, ...] = Field(default=(1, 5, 10, 30), min_length=1)  # trading days ahead
    sequence_length: int = Field(default=60, ge=2)  # days in a window
    windows: tuple[int, ...] = Field(default=(5, 10, 20, 60), min_length=1)  # days of the rolling features
    include_volume: bool = False  # adds turnover relative to its own averages
    covariates: tuple[str, ...] = ()  # names of further columns, read beside the features

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "MambaConfig":
        """The sizes of a preset (see PRESETS), with changes; raises DataError for a name that is none."""
        sizes = _preset(name)
        kept = {"d_model", "num_layers", *_SIZES_OF.get(changes.get("mixer", "mamba"), ())}
        return cls.model_validate({size: value for size, value in sizes.items() if size in kept} | changes)

    @staticmethod
    def sizes_of(mixer: str) -> tuple[str, ...]:
        """Which of d_state, d_conv and expand a mixer has."""
        return _SIZES_OF.get(mixer, ())

    @field_validator("windows")
    @classmethod
    def _windows_span_two_days(cls, windows: tuple[int, ...]) -> tuple[int, ...]:
        if min(windows) < 2:
            raise ValueError("every rolling window needs at least 2 days")
        return windows

    @field_validator("covariates")
    @classmethod
    def _covariates_have_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names) or "" in names:
            raise ValueError("every covariate needs a name of its own")
        return names

    @model_validator(mode="after")
    def _horizons_increase(self) -> Self:
        if list(self.prediction_horizons) != sorted(set(self.prediction_horizons)):
            raise ValueError("prediction_horizons must increase")
        return self

    @model_validator(mode="after")
    def _sizes_suit_the_mixer(self) -> Self:
        for size in ("d_state", "d_conv", "expand"):
            default = type(self).model_fields[size].default
            if size not in _SIZES_OF[self.mixer] and getattr(self, size) != default:
                raise ValueError(f"the mixer {self.mixer} has no {size}: leave it at {default}")
        step = {"s4d": 2, "mamba3": 4}.get(self.mixer, 1)
        if self.d_state % step:
            raise ValueError(f"d_state must be a multiple of {step} for the mixer {self.mixer}")
        if self.mixer == "attention" and self.d_model % 2:
            raise ValueError("d_model must be even for the mixer attention")
        return self

    @property
    def longest_horizon(self) -> int:
        """Trading days from the forecast's origin to its furthest target; also the purge between the parts."""
        return self.prediction_horizons[-1]

    @property
    def mixer_options(self) -> dict[str, int]:
        """The mixer's arguments beside d_model."""
        options = {size: getattr(self, size) for size in _SIZES_OF[self.mixer]}
        if self.mixer in ("mamba2", "mamba3"):
            options["headdim"] = _largest_divisor(self.d_model * self.expand, 32)
        if self.mixer == "attention":
            head = max(size for size in range(2, 17, 2) if self.d_model % size == 0)
            options["n_heads"] = self.d_model // head
        return options


def default_training(mode: TrainingMode, preset: str = "default") -> TrainingConfig:
    """The settings of a training that suit the mode, with what the preset changes of them.

    The seed's table changes epochs, batch size and learning rate with the size of the model. Epochs are taken as they
    are. Batch sizes are, for windows; a batch of sequences is a few whole series. Learning rates keep their ratios to
    that of the default preset, 1e-3 for windows; that rate itself is several times too high for overlapping windows,
    which it has learnt by heart in an epoch or two. Raises DataError for a preset that is none.
    """
    _preset(preset)
    base = WINDOW_TRAINING if mode == "windows" else SEQUENCE_TRAINING
    epochs, batch_size, pace = _TRAINING_OF[preset]
    changes: dict[str, float] = {"epochs": epochs, "learning_rate": base.learning_rate * pace}
    if mode == "windows":
        changes["batch_size"] = batch_size
    return base.model_copy(update=changes)


def pooled_training(mode: TrainingMode, preset: str = "default") -> TrainingConfig:
    """The settings of the training of a pooled model, whose epochs have many more samples and so larger batches."""
    base = default_training(mode, preset)
    return base.model_copy(update={"batch_size": 8 * base.batch_size})


def _preset(name: str) -> dict[str, int]:
    if name not in PRESETS:
        raise DataError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def _largest_divisor(number: int, most: int) -> int:
    return max(size for size in range(1, most + 1) if number % size == 0)
