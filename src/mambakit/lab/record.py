"""What a run leaves on disk: the format that tables, plots and claims are made from.

    DIR/
        run.json               the run as a whole, see below
        <member>.jsonl         one for each member (a seed, or a seed with settings of its own); lines in this order:

            {"kind": "run", "format": 1, "member": "seed-0", "seed": 0, "changes": {"gamma": 0.5}, "preset": "mini",
             "settings": {"task": {"name": "composite", ...}, "model": {...}, "training": {...}},
             "parameters": 31337, "steps": 2000, "device": "cpu", "products": "float32",
             "versions": {"mambakit": ..., "torch": ...}}
            {"kind": "evaluation", "step": 200, "epoch": 0.8, "seconds": 12.1, "learning_rate": 0.003,
             "loss": 1.23,
             "splits": {"train": {"loss": 1.1, "token": 0.8, "sequence": 0.8, "groups": {"11": 0.9, ...}}, ...}}
            ... one for every evaluation, the first at step 0
            {"kind": "lengths", "step": 2000, "lengths": {"64": {"token": 1.0, "sequence": 1.0, "samples": 64}, ...}}
            {"kind": "end", "step": 2000, "seconds": 98.5,
             "best": {"test": {"token": {"value": 0.97, "step": 1800}, "sequence": {...}, "loss": {...}}, ...},
             "last": {"test": {"token": 0.96, "sequence": ..., "loss": ...}, ...}}

        <member>.safetensors   its weights after the last step, by the names of the model's parameters
        checkpoints/           all that a killed run goes on from; gone when the run is done

`settings` are the member's own, its changes made. `products` is tf32 where a GPU took matrix products so. Shares are in
[0, 1], losses in nats an answer, seconds those of this run so far, over all its starts; of several members trained
together the seconds are of all of them. `loss` is the mean over the steps since the evaluation before (null at step 0).
A number that is not finite is null. `sequence` counts sequences with every answer right; for a task of one answer it
equals `token`. `groups` are shares of sequences, there for tasks that tell kinds apart (pairs of anchors). "lengths" is
there for tasks that extrapolate, "end" for runs that are done. Best is over evaluations, first one among equals; the
test splits of a task are the splits but the first.

Each JSONL is written anew, whole or not at all, at every checkpoint: a reader never sees half a line, nor an evaluation
that a resumed run would do again.

run.json: {"format": 1, "preset": ..., "settings": {...} (before members' changes), "members": [{"name", "seed",
"changes"}, ...], "done": false or true}.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from mambakit.errors import ArtefactError
from mambakit.lab.experiment import Experiment, experiment_from
from mambakit.lab.models import MambaForComposite
from mambakit.training.artefacts import read_json, remove_folder, verify_folder, write_file, write_folder, write_json

FORMAT = 1
Line = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One of the models that a run trains together.

    Attributes:
        seed: of its initialisation and of the order of its data.
        changes: settings that it has of its own, among `CHANGES`; the shape of the model and the data are the run's.
    """

    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its files are called: seed-0, or gamma-0.5-seed-0."""
        return "-".join([*(f"{key}-{value}" for key, value in sorted(self.changes.items())), f"seed-{self.seed}"])


CHANGES = ("gamma", "reading", "learning_rate", "weight_decay")
"""Settings in which members of one run may differ."""


def write_lines(folder: Path, member: Member, lines: Sequence[Line]) -> None:
    """Write a member's JSONL, whole or not at all."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_file(folder / f"{member.name}.jsonl", text.encode())


def read_lines(path: str | Path) -> list[Line]:
    """The lines of a member's JSONL; raises ArtefactError for a file that is not one."""
    path = Path(path)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON lines ({error})") from error
    if not lines or lines[0].get("kind") != "run" or lines[0].get("format") != FORMAT:
        raise ArtefactError(f"{path} is not the record of a lab run of format {FORMAT}")
    return lines


def load_member(folder: str | Path, member: str = "seed-0") -> tuple[MambaForComposite, Experiment]:
    """The trained model of a member, in eval mode on the CPU, and its experiment.

    Raises ArtefactError where there is none, or its weights are not there.
    """
    folder = Path(folder)
    experiment = experiment_from(read_lines(folder / f"{member}.jsonl")[0]["settings"])
    path = folder / f"{member}.safetensors"
    if not path.is_file():
        raise ArtefactError(f"{path} is not there: the run is not done; go on with it by --resume")
    model = experiment.model.make(experiment.task.vocabulary, experiment.longest_sequence)
    weights = load_file(path)
    parameters = dict(model.named_parameters())  # a tied matrix once, as it is stored
    if {name: w.shape for name, w in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ArtefactError(f"{path} does not hold the weights of the model that its run describes")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model.eval(), experiment


def best_and_last(evaluations: Sequence[Line]) -> dict[str, Any]:
    """For the line "end": every split's best and last loss and accuracies."""
    best: dict[str, Any] = {}
    for line in evaluations:
        for split, result in line["splits"].items():
            for name in ("token", "sequence", "loss"):
                value, so_far = result[name], best.setdefault(split, {}).get(name)
                sign = -1 if name == "loss" else 1
                if value is not None and (so_far is None or sign * value > sign * so_far["value"]):
                    best[split][name] = {"value": value, "step": line["step"]}
    last = {
        split: {name: result[name] for name in ("token", "sequence", "loss")}
        for split, result in evaluations[-1]["splits"].items()
    }
    return {"best": best, "last": last}


def save_weights(folder: Path, member: Member, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a member's weights, whole or not at all."""
    write_file(folder / f"{member.name}.safetensors", save({name: t.contiguous() for name, t in weights.items()}))


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Keep what a run goes on from after `step` steps, in place of what was kept before."""
    target = folder / "checkpoints" / f"{step:08d}"

    def fill(made: Path) -> None:
        (made / "tensors.safetensors").write_bytes(save({name: t.cpu().contiguous() for name, t in tensors.items()}))
        write_json(made / "state.json", state)

    if not target.exists():
        write_folder(target, fill)
    for older in _checkpoints(folder)[:-1]:
        remove_folder(older)


def latest_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The tensors and the state of the newest checkpoint; None where there is none."""
    kept = _checkpoints(folder)
    if not kept:
        return None
    verify_folder(kept[-1])
    return load_file(kept[-1] / "tensors.safetensors"), read_json(kept[-1] / "state.json")


def clear_checkpoints(folder: Path) -> None:
    """Remove them all."""
    if (folder / "checkpoints").is_dir():
        remove_folder(folder / "checkpoints")


def _checkpoints(folder: Path) -> list[Path]:
    parent = folder / "checkpoints"
    return sorted(path for path in parent.glob("[0-9]*") if path.is_dir()) if parent.is_dir() else []
