"""The settings of a streaming model, checked when they are made: what it reads, what it is made of."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from mambakit.nn import MIXERS
from mambakit.stream.contest import Metric
from mambakit.training import TrainingConfig

RIVALS = ("gru", "lstm")
KINDS = (*MIXERS, *RIVALS)
# A whole past has no fixed size, so these can't be carried from tick to tick in constant time.
_UNSUITABLE = ("attention",)

# Chosen on the validation part of the synthetic market: see docs/how-to/predict-a-stream.md.
STREAM_TRAINING = TrainingConfig.model_validate(
    {
        "epochs": 15,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.05,
        "patience": 5,
        "average_decay": 0.99,
    }
)


class StreamConfig(BaseModel):
    """Everything needed to build the networks again, apart from their weights.

    Raises pydantic.ValidationError for a choice that does not exist or sizes that don't fit.

    >>> StreamConfig(kind="mamba2", d_model=64).mixer_options()
    {'d_state': 64, 'headdim': 32}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = "mamba"  # a mixer of mambakit.nn, or a rival: gru, lstm
    d_model: PositiveInt = 128  # of a rival: that of the Mamba whose number of parameters it gets
    n_layers: PositiveInt = 4
    d_state: PositiveInt | None = None  # none: a good choice for the kind
    dropout: float = Field(0.0, ge=0.0, lt=1.0)  # on what leaves the stack, while training
    features: Literal["raw", "engineered"] = "raw"  # engineered: 13 numbers for each input
    normalise: bool = False  # running standardisation within the sequence
    residual: bool = False  # predict what ridge leaves over
    ridge_lags: PositiveInt = 3  # states that ridge sees
    context_length: PositiveInt | None = None  # gradients flow back so many steps at most; none: to the first
    targets: tuple[str, ...] = ()  # columns to predict on the row itself; none: the next state
    metric: Metric = "r2"

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if self.kind not in KINDS or self.kind in _UNSUITABLE:
            raise ValueError(f"kind must be one of {', '.join(k for k in KINDS if k not in _UNSUITABLE)}")
        if self.kind in ("mamba2", "mamba3") and 2 * self.d_model % self._headdim() != 0:
            raise ValueError(f"d_model must be a multiple of {self._headdim() // 2} for {self.kind}")
        if self.kind in RIVALS and self.d_state is not None:
            raise ValueError(f"d_state is no setting of {self.kind}")
        return self

    def mixer_options(self) -> dict[str, int]:
        """Arguments of the mixer beside d_model."""
        default = {"mamba": 16, "mamba2": 64, "mamba3": 64, "s4d": 64}
        options = {"d_state": self.d_state or default[self.kind]}
        if self.kind in ("mamba2", "mamba3"):
            options["headdim"] = self._headdim()
        return options

    def _headdim(self) -> int:
        return min(32, 2 * self.d_model)
