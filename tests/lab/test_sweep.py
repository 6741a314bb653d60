"""Sweeps: what a file asks for, what is run again and what is not, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mambakit.errors import ArtefactError, DataError, MambakitError
from mambakit.lab import run as run_module
from mambakit.lab import steps as steps_module
from mambakit.lab.record import read_lines
from mambakit.lab.sweep import plan, read_sweep, sweep

TINY = {
    "samples_per_pair": 4,
    "tests_per_pair": 4,
    "d_model": 8,
    "d_state": 4,
    "batch_size": 8,
    "steps": 4,
    "evaluate_every": 2,
    "evaluation_samples": 8,
}


def python_file(folder: Path, *tables: dict[str, Any], name: str = "sweep.py") -> Path:
    path = folder / name
    path.write_text(f"sweep = {[*tables]!r}")
    return path


def grid(**changes: Any) -> dict[str, Any]:
    return {"task": "composite", "settings": TINY, "grid": {"gamma": [0.5, 1.0]}, **changes}


def made(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of every member, by folder and name."""
    return {str(path.relative_to(folder)): read_lines(path) for path in sorted(folder.glob("*/*.jsonl"))}


def test_toml_and_python_ask_for_the_same_points(tmp_path: Path) -> None:
    toml = tmp_path / "sweep.toml"
    settings = ", ".join(f"{name} = {value}" for name, value in TINY.items())
    toml.write_text(
        f'[[experiments]]\ntask = "composite"\nseeds = [3, 4]\nsettings = {{{settings}}}\ngrid = {{gamma = [0.5, 1.0]}}'
    )
    listed = python_file(tmp_path, grid(seeds=[3, 4]))
    function = tmp_path / "function.py"
    function.write_text(f"def sweep():\n    return [{grid(seeds=[3, 4])!r}]")
    points = read_sweep(toml)
    assert points == read_sweep(listed) == read_sweep(function)
    assert [(point.experiment.model.gamma, point.seed) for point in points] == [(0.5, 3), (0.5, 4), (1.0, 3), (1.0, 4)]
    assert all(point.experiment.training.steps == 4 and point.preset == "mini" for point in points)


def test_seeds_given_take_the_place_of_the_files(tmp_path: Path) -> None:
    assert {point.seed for point in read_sweep(python_file(tmp_path, grid(seeds=[3])), [7, 8])} == {7, 8}


def test_points_of_one_shape_are_one_run_and_others_are_not(tmp_path: Path) -> None:
    file = python_file(tmp_path, grid(seeds=[0, 1], grid={"gamma": [0.5, 1.0], "n_layers": [1, 2]}))
    jobs = plan(read_sweep(file), tmp_path, 100)
    assert [(job.experiment.model.n_layers, len(job.members)) for job in jobs] == [(1, 4), (2, 4)]
    assert {member.name for member in jobs[0].members} == {
        f"gamma-{gamma}-seed-{seed}" for gamma in (0.5, 1.0) for seed in (0, 1)
    }
    assert [len(job.members) for job in plan(read_sweep(file), tmp_path, 3)] == [3, 1, 3, 1]


def test_grouped_and_single_members_end_alike(tmp_path: Path) -> None:
    file = python_file(tmp_path, grid())
    for together in (1, 2):
        sweep(file, tmp_path / str(together), together=together, device="cpu", quiet=True)
    ends = [
        sorted(
            ((lines[0]["settings"]["model"]["gamma"], lines[-1]["last"]) for lines in made(tmp_path / n).values()),
            key=lambda found: found[0],
        )
        for n in ("1", "2")
    ]
    assert [gamma for gamma, _ in ends[0]] == [0.5, 1.0]
    for (_, alone), (_, grouped) in zip(*ends, strict=True):
        assert alone["test"]["loss"] == pytest.approx(grouped["test"]["loss"], rel=1e-4)


def test_a_longer_grid_runs_what_is_new_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = sweep(python_file(tmp_path, grid()), out, device="cpu", quiet=True)
    before = made(out)
    longer = python_file(tmp_path, grid(grid={"gamma": [0.5, 1.0, 2.0]}))
    said: list[str] = []
    second = sweep(longer, out, device="cpu", quiet=True, say=said.append)
    assert len(first) == 2
    assert len(second) == 1
    assert said[0] == "3 points: 2 done, 1 to go in 1 runs"
    assert {name: lines for name, lines in made(out).items() if name in before} == before
    assert sweep(longer, out, device="cpu", quiet=True) == []


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = python_file(tmp_path, grid(settings={**TINY, "steps": 8})), tmp_path / "out"
    monkeypatch.setattr(run_module, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    steps = []
    step = steps_module.train_step

    def counted(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 13:  # the second run's fifth
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(steps_module, "train_step", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(file, out, device="cpu", quiet=True)
    assert sorted(json.loads(path.read_text())["done"] for path in out.glob("*/run.json")) == [False, True]
    sweep(file, out, device="cpu", quiet=True)
    assert len(steps) == 13 + 4  # from the checkpoint after its fourth
    assert all(lines[-1]["kind"] == "end" for lines in made(out).values())
    assert len(made(out)) == 2


def test_a_run_that_fails_is_told_at_the_end_and_the_others_are_made(tmp_path: Path) -> None:
    file = python_file(tmp_path, grid(grid={"headdim": [3, 4]}))
    with pytest.raises(MambakitError, match=r"1 of 2 runs failed: .*headdim") as error:
        sweep(file, tmp_path / "out", device="cpu", quiet=True)
    assert "\n" not in str(error.value)
    assert len(made(tmp_path / "out")) == 1


@pytest.mark.slow
def test_processes_and_ray_leave_what_one_process_leaves(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    file = python_file(tmp_path, grid())
    engines = {"one": {}, "two": {"workers": 2}, "ray": {"engine": "ray", "address": "local"}}
    for name, options in engines.items():
        sweep(file, tmp_path / name, device="cpu", quiet=True, **options)  # type: ignore[arg-type]
    one, two, ray = (made(tmp_path / name) for name in ("one", "two", "ray"))
    assert list(one) == list(two) == list(ray)
    for name, lines in one.items():
        for other in (two[name], ray[name]):
            assert other[-1]["last"]["test"]["loss"] == pytest.approx(lines[-1]["last"]["test"]["loss"], rel=1e-4)


def test_ray_that_is_not_there_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MambakitError, match=r"pip install 'mambakit\[ray\]'"):
        sweep(python_file(tmp_path, grid()), tmp_path / "out", engine="ray", device="cpu")


def test_a_cluster_that_does_not_answer_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(MambakitError, match=r"no Ray cluster at 'ray://127\.0\.0\.1:1'"):
        sweep(python_file(tmp_path, grid()), tmp_path / "out", engine="ray", address="ray://127.0.0.1:1", device="cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("experiments = [", "is not TOML"),
        ("", "experiments: Field required"),
        ("[[experiments]]", r"experiments\.0\.task: Field required"),
        ('[[experiments]]\ntask = "sorting"', "task must be one of composite"),
        ('[[experiments]]\ntask = "parity"\npreset = "huge"', "preset must be one of paper, mini"),
        ('[[experiments]]\ntask = "parity"\ngird = {}', r"keys are task, preset, seeds, settings, grid"),
        ('[[experiments]]\ntask = "parity"\nsettings = {width = 3}', "no setting 'width'"),
        ('[[experiments]]\ntask = "parity"\nsettings = {d_model = "wide"}', "d_model can't be 'wide'"),
        ('[[experiments]]\ntask = "parity"\ngrid = {d_model = 3}', r"grid\.d_model: Input should be a valid list"),
        ('[[experiments]]\ntask = "parity"\ngrid = {d_model = []}', r"grid\.d_model must have a value at least"),
        (
            '[[experiments]]\ntask = "parity"\nsettings = {d_model = 8}\ngrid = {d_model = [8]}',
            "d_model stands in settings and in grid",
        ),
        ('[[experiments]]\ntask = "parity"\nseeds = []', "seeds: List should have at least 1 item"),
        ('[[experiments]]\ntask = "parity"\nseeds = [-1]', "seeds must be from 0"),
        ('[[experiments]]\ntask = "parity"\n[[experiments]]\ntask = "parity"', "stands there already: parity"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as error:
        read_sweep(path)
    assert "\n" not in str(error.value)
    assert "bad.toml" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [("x = 1", "must define sweep"), ("1 / 0", "ZeroDivisionError"), ("sweep = 3", "valid list")],
)
def test_bad_python_is_refused_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        read_sweep(path)


def test_files_of_other_kinds_options_and_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        read_sweep(tmp_path / "none.toml")
    with pytest.raises(DataError, match=r"\.toml or a \.py"):
        read_sweep(tmp_path / "sweep.yaml")
    file = python_file(tmp_path, grid())
    with pytest.raises(DataError, match="engine must be one of local, ray"):
        sweep(file, tmp_path / "out", engine="slurm")
    with pytest.raises(DataError, match="workers is of the local engine"):
        sweep(file, tmp_path / "out", engine="ray", workers=2)
    with pytest.raises(DataError, match="address and gpus are of the engine ray"):
        sweep(file, tmp_path / "out", address="auto")
    (tmp_path / "out" / "other").mkdir(parents=True)
    (tmp_path / "out" / "other" / "run.json").write_text("{}")
    with pytest.raises(ArtefactError, match="does not describe a lab run"):
        sweep(file, tmp_path / "out")


def test_what_would_not_end_in_its_minutes_is_put_aside_and_gone_on_with(tmp_path: Path) -> None:
    long = grid(settings={**TINY, "steps": 100_000}, grid={})
    said: list[str] = []
    file = python_file(tmp_path, long, grid())
    ended = sweep(file, tmp_path / "out", device="cpu", minutes=0.5, quiet=True, say=said.append)
    assert len(ended) == 2  # of both gammas
    # The one that is left is tried again when the others are done, and goes on where it was.
    asides = [line.rpartition("put aside at ")[2] for line in said if "put aside at" in line]
    assert [aside.split(":")[0] for aside in asides] == ["step 4 of 100000", "step 8 of 100000"]
    assert sweep(file, tmp_path / "out", device="cpu", minutes=0.5, quiet=True, say=said.append) == []
    assert any("put aside at step 12 of 100000" in line for line in said)


def test_a_sweep_without_time_starts_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    assert sweep(python_file(tmp_path, grid()), tmp_path / "out", device="cpu", minutes=1e-9, say=said.append) == []
    assert "there is no time left" in said[-1]
    assert not list((tmp_path / "out").glob("*/run.json"))


@pytest.mark.gpu
def test_streams_of_one_process_leave_what_one_run_at_a_time_leaves(tmp_path: Path) -> None:
    file = python_file(tmp_path, grid(grid={"gamma": [0.5, 1.0], "n_layers": [1, 2]}))
    for workers in (1, 2):
        sweep(file, tmp_path / str(workers), workers=workers, capture=True, quiet=True)
    one, two = made(tmp_path / "1"), made(tmp_path / "2")
    assert list(one) == list(two)
    for name, lines in one.items():
        assert two[name][-1]["last"]["test"]["loss"] == pytest.approx(lines[-1]["last"]["test"]["loss"], rel=1e-3)
