"""What a run is told: a task, a model and a training, three frozen dataclasses of plain values, changed by name."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch

from mambakit.errors import DataError
from mambakit.lab.initialisation import READINGS
from mambakit.lab.models import MODELS, MambaForComposite
from mambakit.lab.tasks import TASKS, Task

_OF_MAMBA = ("mixer", "d_state", "expand", "headdim")
_OF_TRANSFORMER = ("n_heads", "d_intermediate")


@dataclass(frozen=True)
class ModelSettings:
    """A model of `lab.models.MODELS` and its shape.

    Attributes:
        model: its name there.
        mixer, n_layers, d_model, d_state, d_conv, expand, headdim, gamma, reading, tie_embeddings, mixer_options: as in
            `lab.models.MambaForComposite`; mixer, d_state, expand and headdim are not a Transformer's.
        n_heads, d_intermediate: a Transformer's only.
    """

    model: str = "standard"
    mixer: str = "mamba2"
    n_layers: int = 2
    d_model: int = 32
    d_state: int = 128
    d_conv: int | None = None
    expand: int = 2
    headdim: int | None = None
    gamma: float | None = None
    reading: str = "paper"
    tie_embeddings: bool = False
    n_heads: int = 1
    d_intermediate: int | None = None
    mixer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise DataError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.reading not in READINGS:
            raise DataError(f"reading must be one of {', '.join(READINGS)}, got {self.reading!r}")
        for name in ("n_layers", "d_model", "d_state", "expand", "n_heads"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings that this kind of model has no use for."""
        return _OF_MAMBA if self.model.startswith("transformer") else _OF_TRANSFORMER

    def make(self, vocabulary: int, length: int) -> MambaForComposite:
        """The model for tokens 0 ... vocabulary - 1 in sequences of up to `length`, by torch's generator."""
        names = ("n_layers", "d_model", "gamma", "reading", "tie_embeddings", "mixer_options")
        of_kind = _OF_TRANSFORMER if self.model.startswith("transformer") else _OF_MAMBA
        options = {name: getattr(self, name) for name in (*names, *of_kind)}
        if self.d_conv is not None:
            options["d_conv"] = self.d_conv
        if self.model in ("learned", "sinusoidal", "residual", "gated"):
            options["max_seq_len"] = length
        try:
            return MODELS[self.model](vocab_size=vocabulary, **options)
        except (ValueError, TypeError) as error:  # of a mixer, which names its argument
            raise DataError(f"the model {self.model} can't be made: {error}") from error


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW with a linear warm-up and a cosine.

    Attributes:
        epochs, steps: how long; of the two one is 0. Epochs are of tasks with a fixed number of training samples.
        batch_size: samples of a step.
        learning_rate: highest; start_rate and final_rate are the first and the last.
        warmup: share of the steps in which the rate rises.
        weight_decay, beta1, beta2, eps: AdamW's; matrices and kernels decay, not rates, biases and norms.
        clip: greatest norm of the gradient; none for any.
        evaluate_every: steps between evaluations; 0 for every epoch.
        evaluation_samples: of each split, at most; 0 for all.
        evaluation_batch: samples evaluated together.
        length_samples: sequences that each length of an extrapolation is judged on.
        length_chunk: tokens read at a time there, the state carried on.
    """

    epochs: int = 0
    steps: int = 0
    batch_size: int = 256
    learning_rate: float = 1e-3
    start_rate: float = 1e-5
    final_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0
    evaluate_every: int = 0
    evaluation_samples: int = 0
    evaluation_batch: int = 1024
    length_samples: int = 64
    length_chunk: int = 4096

    def __post_init__(self) -> None:
        if (self.epochs > 0) == (self.steps > 0) or min(self.epochs, self.steps) < 0:
            raise DataError(f"give epochs or steps, the other 0; got {self.epochs} epochs and {self.steps} steps")
        if self.steps and not self.evaluate_every:
            raise DataError("evaluate_every must be given with steps: how many between evaluations")
        for name in ("batch_size", "evaluation_batch", "length_samples", "length_chunk"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "start_rate", "final_rate", "weight_decay", "eps", "evaluate_every"):
            if not getattr(self, name) >= 0:
                raise DataError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise DataError(f"clip must be positive or none, got {self.clip}")

    def steps_for(self, task: Task) -> tuple[int, int]:
        """How many steps the run has, and how many lie between evaluations."""
        samples = task.samples(task.splits[0])
        if not self.epochs:
            return self.steps, self.evaluate_every
        if samples is None:
            raise DataError(f"the task {task.name} draws every batch afresh and has no epochs: set steps")
        in_epoch = samples // self.batch_size
        if in_epoch == 0:
            raise DataError(f"batch_size must be at most the {samples} training samples, got {self.batch_size}")
        return self.epochs * in_epoch, self.evaluate_every or in_epoch

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (0, 1, ...) of `steps`."""
        peak = self.learning_rate
        rising = round(self.warmup * steps)
        if step < rising:
            return self.start_rate + (peak - self.start_rate) * step / rising
        progress = (step - rising) / max(1, steps - 1 - rising)
        return self.final_rate + (peak - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Experiment:
    """A task, a model and how it is trained.

    >>> from mambakit.lab.presets import preset
    >>> preset("composite", "mini").changed({"gamma": "0.5", "model": "ones"}).model.gamma
    0.5
    """

    task: Any
    model: ModelSettings
    training: TrainingSettings

    def changed(self, settings: Mapping[str, str]) -> "Experiment":
        """The experiment with settings of its three parts changed, by name, their values as text.

        A name may have its part in front: `model.d_state`. Where layers of the task are those of the model, they
        follow it unless they are set.

        Raises DataError for a name that there is none of, a value of another type, or a setting that the model has no
        use for.
        """
        parts: dict[str, dict[str, Any]] = {"task": {}, "model": {}, "training": {}}
        for name, text in settings.items():
            part, field_name = self._place(name)
            parts[part][field_name] = _parsed(name, text, get_type_hints(type(getattr(self, part)))[field_name])
        # epochs and steps replace each other
        training = parts["training"]
        if training.get("steps") and "epochs" not in training:
            training["epochs"] = 0
        if training.get("epochs") and "steps" not in training:
            training["steps"] = 0
        model = dataclasses.replace(self.model, **parts["model"])
        for name in parts["model"]:
            if name in model.unused:
                raise DataError(f"{name} is not a setting of the model {model.model}; leave it out")
        if hasattr(self.task, "layers") and "layers" not in parts["task"]:
            parts["task"]["layers"] = model.n_layers
        task = dataclasses.replace(self.task, **parts["task"])
        return Experiment(task, model, dataclasses.replace(self.training, **training))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that is trained on or evaluated, extrapolation apart."""
        _, *others = self.task.splits
        generator = torch.Generator().manual_seed(0)
        # Lengths may leave out a sign that ends a sequence; the last step has the longest training.
        lengths = [(split, self.task.length_at(1 << 30, split)) for split in others]
        return max(self.task.batch(split, 1, length, generator).tokens.shape[1] for split, length in lengths)

    def settings(self) -> dict[str, Any]:
        """All of it as plain JSON: {"task": {"name": ..., ...}, "model": {...}, "training": {...}}."""
        return {
            "task": {"name": self.task.name, **dataclasses.asdict(self.task)},
            "model": dataclasses.asdict(self.model),
            "training": dataclasses.asdict(self.training),
        }

    def _place(self, name: str) -> tuple[str, str]:
        names = {
            part: [f.name for f in dataclasses.fields(getattr(self, part))] for part in ("task", "model", "training")
        }
        given, _, field_name = name.rpartition(".")
        for part, fields in names.items():
            if given in ("", part) and field_name in fields:
                return part, field_name
        every = "; ".join(f"{part}: {', '.join(fields)}" for part, fields in names.items())
        raise DataError(f"there is no setting {name!r}; there are, of the {every}")


def experiment_from(settings: Mapping[str, Any]) -> Experiment:
    """The experiment of what `Experiment.settings` gave."""
    task = {name: value for name, value in settings["task"].items() if name != "name"}
    name = settings["task"]["name"]
    if name not in TASKS:
        raise DataError(f"the task must be one of {', '.join(TASKS)}, got {name!r}")
    try:
        return Experiment(
            TASKS[name](**task), ModelSettings(**settings["model"]), TrainingSettings(**settings["training"])
        )
    except TypeError as error:
        raise DataError(f"the settings don't fit this version of the lab: {error}") from error


def device_named(name: str | None) -> torch.device:
    """The device of that name; None for the GPU where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device must name a device that is here, such as cpu, got {name!r}") from error
    return device


def _parsed(name: str, text: str, hint: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        value = None if text.lower() in ("none", "null") else json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, (int, float)) and hint is str:
        value = text
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise DataError(f"{name} can't be {text!r}: {error.errors()[0]['msg'].lower()}") from error
