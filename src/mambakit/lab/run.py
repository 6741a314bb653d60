"""A run: members of one experiment trained together, evaluated as they learn, recorded, resumable.

`lab/record.py` says what it leaves on disk.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit import __version__
from mambakit.errors import ArtefactError, DataError
from mambakit.lab.data import TrainingBatches, held_out
from mambakit.lab.evaluation import accuracy_at_length, evaluate, finite
from mambakit.lab.experiment import Experiment, device_named
from mambakit.lab.grouped import GroupedAdamW, GroupedModels, seeded
from mambakit.lab.progress import RunProgress
from mambakit.lab.record import (
    CHANGES,
    FORMAT,
    Line,
    Member,
    best_and_last,
    clear_checkpoints,
    latest_checkpoint,
    save_checkpoint,
    save_weights,
    write_lines,
)
from mambakit.lab.steps import TrainingSteps, products_in_tf32
from mambakit.lab.tasks import Batch
from mambakit.lab.watch import OutOfTime, Watch
from mambakit.training.artefacts import exclusive, read_json, remove_leftovers, write_json

_SECONDS_BETWEEN_CHECKPOINTS = 20.0
GROUPING = ("auto", "vmap", "loop")


@dataclass(frozen=True)
class Outcome:
    """What became of one member: the lines of its record."""

    member: Member
    lines: list[Line]

    @property
    def end(self) -> Line:
        """Its last line, with `best` and `last`."""
        return self.lines[-1]


def run(
    experiment: Experiment,
    members: Sequence[Member | int],
    out: str | Path,
    *,
    preset: str | None = None,
    device: str | None = None,
    grouping: str = "auto",
    capture: bool = False,
    tf32: bool = False,
    resume: bool = False,
    deadline: float | None = None,
    quiet: bool = False,
) -> list[Outcome]:
    """Train an experiment for every member, all of them together, and record it in the folder `out`.

    Args:
        members: seeds, or `Member`s that differ in settings of `CHANGES` too.
        preset: what the settings began as, for the record.
        device: None for the GPU where there is one.
        grouping: "vmap" trains members as one model with an axis of models; "loop" one after the other at every step,
            which is as fast on a CPU and serves what vmap can't; "auto" is vmap on a GPU.
        capture: replay the steps of a GPU as a CUDA graph, which spares small models the time of Python.
        tf32: take float32 matrix products of a GPU in TF32, whose factors have 11 bits; the record says so.
        resume: go on with a run of these settings that was killed.
        deadline: of `time.monotonic`: a run that would not end by then is put aside as if it had been killed.

    Returns the outcome of each member. A killed run that is resumed ends as it would have.

    Raises ArtefactError where `out` holds another run, or this one unasked; DataError for settings that don't fit;
    OutOfTime for a run that was put aside.
    """
    everyone = [Member(member) if isinstance(member, int) else member for member in members]
    _check(everyone, grouping)
    folder = Path(out)
    of_device = device_named(device)
    for name, asked in (("capture", capture), ("tf32", tf32)):
        if asked and of_device.type != "cuda":
            raise DataError(f"{name} needs a CUDA device, got {of_device}; leave it out")
    current = torch.cuda.device(of_device) if of_device.type == "cuda" else contextlib.nullcontext()
    with exclusive(folder), current:  # kernels, streams and graphs go to the current device
        remove_leftovers(folder)
        loop = grouping == "loop" or (grouping == "auto" and of_device.type == "cpu")
        started = _Run(experiment, everyone, folder, preset, of_device, loop, capture, tf32, deadline)
        _claim(folder, experiment, everyone, preset, resume)  # last: what can't be made leaves no run behind
        with products_in_tf32() if tf32 else contextlib.nullcontext():
            return started.finish(quiet)


class _Run:
    """A run between two steps."""

    def __init__(
        self,
        experiment: Experiment,
        members: list[Member],
        folder: Path,
        preset: str | None,
        device: torch.device,
        loop: bool,
        capture: bool,
        tf32: bool,
        deadline: float | None,
    ) -> None:
        self._deadline = deadline
        self._experiment, self._members, self._folder, self._device = experiment, members, folder, device
        self._task = experiment.task
        own = [own_experiment(experiment, member) for member in members]
        self._own = [one.training for one in own]
        longest = experiment.longest_sequence
        models = [
            seeded(partial(one.model.make, self._task.vocabulary, longest), member.seed).to(device)
            for one, member in zip(own, members, strict=True)
        ]
        self._grouped = GroupedModels(models, loop=loop)
        self._training = training = experiment.training
        betas = training.beta1, training.beta2
        self._optimizer = optimizer = GroupedAdamW(self._grouped, betas, training.eps)
        self._steps, self._every = training.steps_for(self._task)
        self._batches = TrainingBatches(self._task, [m.seed for m in members], training.batch_size, device)
        rates = [[own.rate(step, self._steps) for own in self._own] for step in range(self._steps)]
        paces = optimizer.paces(rates, [own.weight_decay for own in self._own])
        self._taking = TrainingSteps(self._grouped, optimizer, self._batches, paces, training.clip, capture)
        self._held_out = self._evaluation_batches()
        self._step, self._seconds = 0, 0.0
        size = sum(parameter.numel() for parameter in models[0].parameters())
        self._lines = [
            [_first_line(one, member, preset, size, self._steps, device, "tf32" if tf32 else "float32")]
            for one, member in zip(own, members, strict=True)
        ]

    def finish(self, quiet: bool) -> list[Outcome]:
        """Take the steps that are left, and what follows them."""
        self._restore()
        name = f"{self._task.name} {self._experiment.model.model}"
        with RunProgress(name, self._steps, self._step, quiet) as progress:
            self._train(progress)
        self._end()
        return [Outcome(member, lines) for member, lines in zip(self._members, self._lines, strict=True)]

    def _train(self, progress: RunProgress) -> None:
        watch = Watch(self._device, self._step, self._steps, self._deadline)
        saved = time.monotonic()
        if self._step == 0 and len(self._lines[0]) == 1:
            self._evaluate(None)
        self._taking.go_on_from(self._step)
        while self._step < self._steps:
            self._taking.take(self._step)
            self._step += 1
            progress.advanced(self._step)
            if self._step % self._every == 0 or self._step == self._steps:
                losses = self._taking.mean_losses()
                seconds, in_time = watch.lap(self._step)
                self._seconds += seconds
                self._evaluate(losses)
                progress.evaluated(self._step, self._summary())
                if time.monotonic() - saved >= _SECONDS_BETWEEN_CHECKPOINTS or self._step == self._steps or not in_time:
                    self._save()
                    saved = time.monotonic()
                if not in_time and self._step < self._steps:
                    raise OutOfTime(f"put aside at step {self._step} of {self._steps}: it would not end in time")
            watch.passed(self._step)

    def _evaluate(self, losses: list[float] | None) -> None:
        """Add a line of evaluation to every member's record; `losses` are the mean ones since the last."""
        results = {
            split: evaluate(self._grouped, batch, self._training.evaluation_batch, tuple(self._task.groups))
            for split, batch in self._held_out.items()
        }
        samples = self._task.samples(self._task.splits[0])
        seen = self._step * self._training.batch_size
        for index, lines in enumerate(self._lines):
            own = self._own[index]
            lines.append(
                {
                    "kind": "evaluation",
                    "step": self._step,
                    "epoch": None if samples is None else seen / (samples // own.batch_size * own.batch_size),
                    "seconds": round(self._seconds, 3),
                    "learning_rate": own.rate(max(0, self._step - 1), self._steps),
                    "loss": None if losses is None else finite(losses[index]),
                    "splits": {split: found[index] for split, found in results.items()},
                }
            )

    def _end(self) -> None:
        """Judge the lengths that were never trained, write what is kept of the run, and let its checkpoints go."""
        for index, (member, lines) in enumerate(zip(self._members, self._lines, strict=True)):
            if self._task.lengths:
                lines.append({"kind": "lengths", "step": self._step, "lengths": self._at_lengths(index)})
            evaluations = [line for line in lines if line["kind"] == "evaluation"]
            seconds = round(self._seconds, 3)
            lines.append({"kind": "end", "step": self._step, "seconds": seconds, **best_and_last(evaluations)})
            save_weights(self._folder, member, self._grouped.weights(index))
            write_lines(self._folder, member, lines)
        write_json(self._folder / "run.json", {**read_json(self._folder / "run.json"), "done": True})
        clear_checkpoints(self._folder)

    def _at_lengths(self, index: int) -> dict[str, Any]:
        model: Any = self._grouped.model(index)
        training = self._training
        return {
            str(length): accuracy_at_length(
                model, self._task, length, training.length_samples, training.length_chunk, self._device
            )
            for length in self._task.lengths
        }

    def _evaluation_batches(self) -> dict[str, Batch]:
        """What every split is judged on, (members, samples, ...) each; the first split's is what is trained on."""
        most, members = self._training.evaluation_samples, len(self._members)

        def count(split: str) -> int:
            there = self._task.samples(split)
            # All of the training samples would cost more than the training.
            there = min(there or 1 << 30, self._task.samples(self._task.splits[1]) or 1024)
            return min(there, most or there)

        first, *others = self._task.splits
        found = {first: self._batches.first(count(first))}
        for split in others:
            batch = held_out(self._task, split, count(split), self._device)
            found[split] = Batch(*(part.expand(members, *part.shape) for part in batch))
        return found

    def _summary(self) -> str:
        """The shares of whole sequences, averaged over members."""
        last = [lines[-1] for lines in self._lines]
        means = {
            split: sum(line["splits"][split]["sequence"] for line in last) / len(last) for split in last[0]["splits"]
        }
        return "right: " + ", ".join(f"{split} {share:.3f}" for split, share in means.items())

    def _save(self) -> None:
        state = {"step": self._step, "seconds": self._seconds, "lines": self._lines}
        save_checkpoint(self._folder, self._step, self._trained(), state)
        for member, lines in zip(self._members, self._lines, strict=True):
            write_lines(self._folder, member, lines)

    def _trained(self) -> dict[str, Tensor]:
        """What steps change."""
        return {"weights": self._grouped.flat, "means": self._optimizer.means, "squares": self._optimizer.squares}

    @torch.no_grad()
    def _restore(self) -> None:
        kept = latest_checkpoint(self._folder)
        if kept is None:
            return
        tensors, state = kept
        for name, tensor in self._trained().items():
            tensor.copy_(tensors[name])
        self._step, self._seconds, self._lines = state["step"], state["seconds"], state["lines"]


def own_experiment(experiment: Experiment, member: Member) -> Experiment:
    """The experiment as one member sees it."""
    of_model = {name: value for name, value in member.changes.items() if hasattr(experiment.model, name)}
    of_training = {name: value for name, value in member.changes.items() if hasattr(experiment.training, name)}
    return Experiment(
        experiment.task, replace(experiment.model, **of_model), replace(experiment.training, **of_training)
    )


def _check(members: list[Member], grouping: str) -> None:
    if grouping not in GROUPING:
        raise DataError(f"grouping must be one of {', '.join(GROUPING)}, got {grouping!r}")
    if not members:
        raise DataError("a run needs a seed at least")
    for member in members:
        if not 0 <= member.seed < 2**32:
            raise DataError(f"seeds must be from 0 to 2^32 - 1, got {member.seed}")
        for name in member.changes:
            if name not in CHANGES:
                raise DataError(f"members of one run may differ in {', '.join(CHANGES)}, not in {name}")
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        raise DataError(f"members must differ, got {', '.join(names)}")


def _claim(folder: Path, experiment: Experiment, members: list[Member], preset: str | None, resume: bool) -> None:
    """Write run.json, or find that what is there is this run, and that it may go on."""
    described = {
        "format": FORMAT,
        "preset": preset,
        "settings": experiment.settings(),
        "members": [{"name": m.name, "seed": m.seed, "changes": dict(m.changes)} for m in members],
    }
    path = folder / "run.json"
    if not path.exists():
        if any(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            raise ArtefactError(f"{folder} holds other files; choose another folder with --out")
        write_json(path, {**described, "done": False})
        return
    there = read_json(path)
    done = there.pop("done", False)
    if done:
        raise ArtefactError(f"{folder} holds a run that is done; remove it, or choose another folder with --out")
    if not resume:
        raise ArtefactError(
            f"{folder} holds a run that is not done; go on with it by --resume, or choose another --out"
        )
    for name, value in described.items():
        if value != there.get(name):
            raise ArtefactError(f"{folder} holds a run with other {name}; resume it with the settings it had")


def _first_line(
    experiment: Experiment,
    member: Member,
    preset: str | None,
    parameters: int,
    steps: int,
    device: torch.device,
    products: str,
) -> Line:
    return {
        "kind": "run",
        "format": FORMAT,
        "member": member.name,
        "seed": member.seed,
        "changes": dict(member.changes),
        "preset": preset,
        "settings": experiment.settings(),
        "parameters": parameters,
        "steps": steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "products": products,
        "versions": {"mambakit": __version__, "torch": torch.__version__},
    }
