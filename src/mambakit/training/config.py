"""What a training run is told: epochs, optimiser, schedule, stopping, seed, precision."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainingConfig(BaseModel):
    """Every setting of `mambakit.training.fit`; a value out of bounds raises pydantic.ValidationError naming it.

    Example:
        >>> TrainingConfig(epochs=10, learning_rate=3e-4, patience=None).batch_size
        32
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(50, ge=1, description="passes over the training data, at most")
    batch_size: int = Field(32, ge=1, description="samples behind one step of the optimiser, over all processes")
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate of the schedule")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay of the weight matrices")
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient; none: not clipped")
    schedule: Literal["cosine", "restarts", "constant", "plateau"] = Field(
        "cosine", description="learning rate after the warm-up; restarts: cosine with warm restarts"
    )
    restart_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs of the first cycle under the schedule restarts; each later one has twice as many",
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="share of all steps in which the rate rises linearly")
    min_learning_rate_ratio: Fraction = Field(0.01, description="lowest learning rate, as a share of the highest")
    patience: int | None = Field(5, ge=1, description="epochs without a better validation loss; none: no early stop")
    min_delta: float = Field(0.0, ge=0, description="how much lower a validation loss must be to count as better")
    average_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep an exponential average of the weights, of this decay a step; none: no average",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="fixes the order of the samples, dropout and other randomness")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="precision inside the model's forward")
    gradient_accumulation: int = Field(1, ge=1, description="parts a batch is cut into, one in memory at a time")

    @model_validator(mode="after")
    def _restarts_have_a_length(self) -> Self:
        if (self.restart_epochs is not None) != (self.schedule == "restarts"):
            raise ValueError("restart_epochs belongs to schedule='restarts': give both or neither")
        return self
