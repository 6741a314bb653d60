"""Sweeps: a grid of settings and many seeds, those of one shape trained together, resumable, here or on Ray.

A file says what is run, as TOML or as Python that defines `sweep`, a list of tables or a function that gives one:

    [[experiments]]                     sweep = [{
    task = "composite"                      "task": "composite",
    preset = "mini"                         "preset": "mini",
    seeds = [0, 1, 2]                       "seeds": [0, 1, 2],
    settings = {n_layers = 3}               "settings": {"n_layers": 3},
    grid = {gamma = [0.5, 1.0]}             "grid": {"gamma": [0.5, 1.0]},
                                        }]

A point is one combination of the grid with one seed. Points that are done in the folder, of whatever sweep, are not run
again; runs that were killed go on where they were; what is left is put together by shape, a run each. A longer grid in
the same folder therefore runs what is new alone.
"""

import hashlib
import itertools
import json
import re
import runpy
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mambakit.errors import ArtefactError, DataError, MambakitError
from mambakit.lab.experiment import Experiment, experiment_from
from mambakit.lab.presets import preset as preset_of
from mambakit.lab.record import CHANGES, Member
from mambakit.lab.run import own_experiment
from mambakit.lab.sweep_engines import ENGINES, Job, run_jobs
from mambakit.training.artefacts import exclusive, read_json

Scalar = bool | int | float | str | dict[str, Any] | None
Say = Callable[[str], None]


class Grid(BaseModel):
    """One table of a sweep's file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str
    preset: str = "mini"
    seeds: list[int] = Field(default=[0], min_length=1)
    settings: dict[str, Scalar] = {}
    grid: dict[str, list[Scalar]] = {}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    experiments: list[Grid] = Field(min_length=1)


@dataclass(frozen=True)
class Point:
    """One model of a sweep: all of its settings, and its seed."""

    experiment: Experiment
    preset: str | None
    seed: int

    @property
    def key(self) -> str:
        """Equal for equal points."""
        return json.dumps([self.experiment.settings(), self.preset, self.seed], sort_keys=True)


def sweep(
    path: str | Path,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    engine: str = "local",
    workers: int = 1,
    together: int | None = None,
    address: str | None = None,
    gpus: float = 0.0,
    device: str | None = None,
    capture: bool = False,
    tf32: bool = False,
    minutes: float | None = None,
    quiet: bool = False,
    say: Say = lambda line: None,
) -> list[Path]:
    """Run what a file asks for and is not done in the folder `out` yet, a folder in it for each run.

    Args:
        seeds: in place of those of the file.
        engine: "local", or "ray", whose tasks give their files back, so that nodes need not share a disk.
        workers: runs of the local engine at once: processes that share the cores of the machine, or threads with a
            stream each where they share a GPU.
        together: the most points that one run trains; None for all of one shape on a GPU, and one on a CPU, where they
            would only take turns.
        address, gpus: as of `ray_cluster`, and the share of a GPU that a run gets there.
        device, capture, tf32, quiet: of `lab.run.run`.
        minutes: that all of it may take; what would not end in them is put aside, and the same sweep goes on with it.
        say: gets a line for every run that ends.

    Returns the folders of all runs that were made to their end now.

    Raises DataError for a file that can't be used or settings that don't fit, MambakitError where runs failed; the
    others are made all the same.
    """
    if engine not in ENGINES:
        raise DataError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if workers < 1 or (together is not None and together < 1):
        raise DataError(f"workers and together must be at least 1, got {workers} and {together}")
    if engine == "ray" and workers > 1:
        raise DataError("workers is of the local engine; Ray has its own, leave it out")
    if engine == "local" and (address is not None or gpus):
        raise DataError("address and gpus are of the engine ray; leave them out, or add --engine ray")
    if minutes is not None and (engine == "ray" or not minutes > 0):
        raise DataError(f"minutes must be positive, and is of the local engine; got {minutes}")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    points = read_sweep(path, seeds)
    folder = Path(out)
    with exclusive(folder):
        jobs = [
            replace(job, device=device, capture=capture, tf32=tf32, deadline=deadline)
            for job in plan(points, folder, together or _together(engine, device, gpus))
        ]
        left = sum(len(job.members) for job in jobs)
        say(f"{len(points)} points: {len(points) - left} done, {left} to go in {len(jobs)} runs")
        made: list[Path] = []
        failed: list[str] = []

        def make(some: Sequence[Job]) -> list[Job]:
            """Those that were put aside."""
            aside = []
            for number, ended in enumerate(
                run_jobs(some, engine=engine, workers=workers, address=address, gpus=gpus, quiet=quiet), start=1
            ):
                name = ended.job.folder.name
                if ended.reason is None:
                    made.append(ended.job.folder)
                    what = f"done in {ended.seconds:.0f} s"
                elif ended.aside:
                    aside.append(ended.job)
                    what = ended.reason
                else:
                    failed.append(f"{name}: {ended.reason}")
                    what = f"failed: {ended.reason}"
                say(f"[{number}/{len(some)}] {name} ({_members(ended.job)}): {what}")
            return aside

        aside = make(jobs)
        if aside and deadline is not None and time.monotonic() < deadline:
            say(f"{len(aside)} runs were put aside; with the others done they are tried once more")
            make([job for job in jobs if job in aside])
    if failed:
        raise MambakitError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")
    return made


def read_sweep(path: str | Path, seeds: Sequence[int] | None = None) -> list[Point]:
    """The points of a sweep's file, in its order.

    Raises DataError, one line, for a file that is not there, can't be read, or asks for what there is not.
    """
    path = Path(path)
    try:
        file = _File.model_validate(_content(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        wanted = f"keys are {', '.join(Grid.model_fields)}" if first["type"] == "extra_forbidden" else first["msg"]
        raise DataError(f"{path}: {where}: {wanted}") from error
    points: dict[str, Point] = {}
    for number, grid in enumerate(file.experiments):
        try:
            found = list(_points(grid, seeds))
        except DataError as error:
            raise DataError(f"{path}: experiments.{number}: {error}") from error
        for point in found:
            if point.key in points:
                raise DataError(f"{path}: experiments.{number} asks for a point that stands there already: {grid.task}")
            points[point.key] = point
    return list(points.values())


def plan(points: Sequence[Point], folder: Path, together: int) -> list[Job]:
    """The runs that are left to make: those that were killed as they were, the rest grouped by shape."""
    left = {point.key: point for point in points}
    killed = []
    for run_file in sorted(folder.glob("*/run.json")):
        described = _described(run_file)
        keys = [point.key for point in _points_of(described)]
        if described["done"]:
            for key in keys:
                left.pop(key, None)
        else:
            killed.append((run_file.parent, described, keys))
    jobs = []
    for run_folder, described, keys in killed:
        if all(key in left for key in keys):
            for key in keys:
                del left[key]
            experiment, members = _parts(described)
            jobs.append(Job(run_folder, experiment, members, described["preset"]))
    shapes: dict[str, list[Point]] = {}
    for point in left.values():
        shapes.setdefault(_shape(point), []).append(point)
    for alike in shapes.values():
        jobs += [_job(alike[i : i + together], folder) for i in range(0, len(alike), together)]
    return jobs


def _content(path: Path) -> Any:
    if path.suffix not in (".toml", ".py"):
        raise DataError(f"{path}: a sweep is a .toml or a .py file")
    if not path.is_file():
        raise DataError(f"{path} is not there")
    if path.suffix == ".toml":
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # bytes that are no text among them
            raise DataError(f"{path} is not TOML: {error}") from error
    try:
        made = runpy.run_path(str(path)).get("sweep")
        made = made() if callable(made) else made
    except Exception as error:
        raise DataError(f"{path} raised {type(error).__name__}: {error}") from error
    if made is None:
        raise DataError(f"{path} must define sweep: a list of tables, or a function that gives one")
    return {"experiments": made}


def _points(grid: Grid, seeds: Sequence[int] | None) -> Iterator[Point]:
    preset = preset_of(grid.task, grid.preset)
    twice = sorted(set(grid.settings) & set(grid.grid))
    if twice:
        raise DataError(f"{twice[0]} stands in settings and in grid; keep one")
    for name, values in grid.grid.items():
        if not values:
            raise DataError(f"grid.{name} must have a value at least")
    for seed in seeds if seeds is not None else grid.seeds:
        if not 0 <= seed < 2**32:
            raise DataError(f"seeds must be from 0 to 2^32 - 1, got {seed}")
    for chosen in itertools.product(*grid.grid.values()):
        settings = {**grid.settings, **dict(zip(grid.grid, chosen, strict=True))}
        experiment = preset.changed({name: _text(value) for name, value in settings.items()})
        for seed in seeds if seeds is not None else grid.seeds:
            yield Point(experiment, grid.preset, seed)


def _text(value: Scalar) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shape(point: Point) -> str:
    """Equal for points that one run may train."""
    settings = point.experiment.settings()
    alike = {part: {k: v for k, v in values.items() if k not in CHANGES} for part, values in settings.items()}
    return json.dumps([alike, point.preset], sort_keys=True)


def _job(points: Sequence[Point], folder: Path) -> Job:
    first = points[0]
    values = [{name: _change(point.experiment, name) for name in CHANGES} for point in points]
    varied = [name for name in CHANGES if any(of_point[name] != values[0][name] for of_point in values)]
    members = [
        Member(point.seed, {name: of_point[name] for name in varied})
        for point, of_point in zip(points, values, strict=True)
    ]
    named = hashlib.sha256("".join(sorted(point.key for point in points)).encode()).hexdigest()[:8]
    model = first.experiment.model
    kind = model.model if model.model.startswith("transformer") else f"{model.model}-{model.mixer}"
    name = re.sub(r"[^\w.-]", "-", f"{first.experiment.task.name}-{kind}-{named}")
    return Job(folder / name, first.experiment, members, first.preset)


def _change(experiment: Experiment, name: str) -> Any:
    return getattr(experiment.model if hasattr(experiment.model, name) else experiment.training, name)


def _described(run_file: Path) -> dict[str, Any]:
    described = read_json(run_file)
    if not {"settings", "members", "preset", "done"} <= set(described):
        raise ArtefactError(f"{run_file} does not describe a lab run; remove it, or choose another folder with --out")
    return described


def _parts(described: dict[str, Any]) -> tuple[Experiment, list[Member]]:
    members = [Member(member["seed"], member["changes"]) for member in described["members"]]
    return experiment_from(described["settings"]), members


def _points_of(described: dict[str, Any]) -> list[Point]:
    experiment, members = _parts(described)
    return [Point(own_experiment(experiment, member), described["preset"], member.seed) for member in members]


def _together(engine: str, device: str | None, gpus: float) -> int:
    import torch

    on_gpu = gpus > 0 if engine == "ray" else torch.cuda.is_available() and device != "cpu"
    return 1 << 30 if on_gpu else 1


def _members(job: Job) -> str:
    names = [member.name for member in job.members]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]}, {len(names)} members"
