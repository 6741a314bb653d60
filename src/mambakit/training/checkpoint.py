"""Checkpoints: all that a killed run needs to go on as if nothing had happened.

    <run_dir>/checkpoints/000012/
        model.safetensors      weights and buffers after epoch 12
        optimizer.safetensors  AdamW's moments, by position of the parameter
        best.safetensors       weights and buffers of the best epoch so far
        average.safetensors    the average of the weights, by position of the parameter; empty where none is kept
        state.json             history, what the run was started with, the gradient scaler of fp16
        checksums.json

No state of a random generator is kept: each epoch draws from generators seeded by (seed, epoch). Step, schedule,
best epoch and patience follow from the history.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mambakit.errors import ArtefactError
from mambakit.training.artefacts import remove_folder, verify_folder, write_folder
from mambakit.training.batches import TrainingData, named_tensors
from mambakit.training.config import TrainingConfig
from mambakit.training.record import EpochEntry

# The newest, and one to fall back on should the disk have damaged it.
_KEPT = 2
_SAMPLES_IN_FINGERPRINT = 64

Fingerprint = dict[str, str | int | float | None]


class CheckpointState(BaseModel):
    """What a checkpoint holds beside tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    format: Literal[1] = 1
    fingerprint: Fingerprint
    history: list[EpochEntry]
    gradient_scaler: dict[str, int | float] | None


@dataclass(frozen=True)
class Checkpoint:
    """A run between two epochs; tensors on the CPU."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]
    average: dict[str, Tensor]
    state: CheckpointState


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of the last epoch in its history, then remove the ones that it makes needless."""

    def fill(folder: Path) -> None:
        save_file(checkpoint.weights, folder / "model.safetensors")
        save_file(checkpoint.optimizer, folder / "optimizer.safetensors")
        save_file(checkpoint.best, folder / "best.safetensors")
        save_file(checkpoint.average, folder / "average.safetensors")
        (folder / "state.json").write_text(checkpoint.state.model_dump_json(indent=2), encoding="utf-8")

    write_folder(checkpoints_folder(run_dir) / f"{checkpoint.state.history[-1]['epoch']:06d}", fill)
    for outdated in _numbered(run_dir)[:-_KEPT]:
        remove_folder(outdated)


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is no checkpoint; newer, damaged ones are removed.

    Raises:
        ArtefactError: there are checkpoints, and none is whole.
    """
    folders = _numbered(run_dir)
    problems = []
    for folder in reversed(folders):
        try:
            checkpoint = _load(folder)
        except ArtefactError as error:
            problems.append(error)
            continue
        for damaged in folders[len(folders) - len(problems) :]:
            remove_folder(damaged)
        return checkpoint
    if problems:
        raise ArtefactError(f"cannot resume: {problems[0]}; start again without --resume")
    return None


def clear_checkpoints(run_dir: Path) -> None:
    """Remove every checkpoint of a run."""
    for folder in _numbered(run_dir):
        remove_folder(folder)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of `model` by name, copied to the CPU; tied ones once, as safetensors wants it."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in _state(model).items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put what `copy_weights` returned into `model`, on whatever device it is.

    Raises:
        ArtefactError: a tensor is missing, is one too many, or has another shape; the message names it.
    """
    state = _state(model)
    for name in [*state, *weights]:
        ours, theirs = state.get(name), weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise ArtefactError(
                f"the weights do not fit the model: {name} is {_shape(theirs)} there and {_shape(ours)} in the model"
            )
    for name, tensor in state.items():
        tensor.copy_(weights[name])


def copy_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments as "<position of the parameter>.<name>", copied to the CPU; at first there are none."""
    return {
        f"{position}.{name}": tensor.to("cpu", copy=True).contiguous()
        for position, moments in optimizer.state_dict()["state"].items()
        for name, tensor in moments.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put what `copy_optimizer` returned into an optimiser of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        position, name = key.split(".")
        state.setdefault(int(position), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def make_fingerprint(
    model: nn.Module, config: TrainingConfig, training_data: TrainingData, validation_data: TrainingData
) -> Fingerprint:
    """What has to be the same for a run to be resumed: settings, shapes of the model, data (by a sample of it)."""
    shapes = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()}
    return {
        **config.model_dump(),
        "model": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "training data": _data_digest(training_data),
        "validation data": _data_digest(validation_data),
    }


def check_fingerprint(run_dir: Path, saved: Fingerprint, current: Fingerprint) -> None:
    """Raise ArtefactError, naming what differs, unless a run saved with one may be resumed with the other."""
    changes = [
        f"the {name} is another" if name not in TrainingConfig.model_fields else f"{name} was {was} and is now {now}"
        for name, now in current.items()
        if (was := saved.get(name)) != now
    ]
    if changes:
        raise ArtefactError(
            f"cannot resume the run in {run_dir}: {'; '.join(changes)}. "
            "Give what it was started with, or start again without --resume"
        )


def _numbered(run_dir: Path) -> list[Path]:
    """The folders of checkpoints, oldest first."""
    folders = checkpoints_folder(run_dir).glob("[0-9]*")
    return sorted((folder for folder in folders if folder.name.isdecimal()), key=lambda folder: int(folder.name))


def _load(folder: Path) -> Checkpoint:
    verify_folder(folder)
    try:
        return Checkpoint(
            weights=load_file(folder / "model.safetensors"),
            optimizer=load_file(folder / "optimizer.safetensors"),
            best=load_file(folder / "best.safetensors"),
            average=load_file(folder / "average.safetensors"),
            state=CheckpointState.model_validate_json((folder / "state.json").read_bytes()),
        )
    except (OSError, SafetensorError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{folder} is not a checkpoint that this version can read ({reason})") from error


def _state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict`, with tensors that share all their memory under the first of their names only."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = tensor
    return state


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def _data_digest(data: TrainingData) -> str:
    """SHA-256 of the number of samples and of up to 64 samples, spread evenly."""
    samples = len(data)
    indices = torch.linspace(0, samples - 1, min(samples, _SAMPLES_IN_FINGERPRINT), dtype=torch.float64).long()
    digest = hashlib.sha256(str(samples).encode())
    for name, tensor in named_tensors(data.batch(indices)):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
