"""Runs: what they record, that a killed one ends as it would have, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mambakit.errors import ArtefactError, DataError
from mambakit.lab import run as run_module
from mambakit.lab import steps as steps_module
from mambakit.lab.data import held_out
from mambakit.lab.evaluation import accuracy_at_length
from mambakit.lab.experiment import Experiment, experiment_from
from mambakit.lab.models import MambaForComposite
from mambakit.lab.presets import PRESETS, preset
from mambakit.lab.record import Member, load_member, read_lines
from mambakit.lab.run import run
from mambakit.lab.tasks import TASKS, InductionHeads, accuracy

TINY = {
    "samples_per_pair": "8",
    "tests_per_pair": "8",
    "d_model": "8",
    "d_state": "4",
    "batch_size": "10",
    "steps": "12",
    "evaluate_every": "4",
    "evaluation_samples": "30",
}


def tiny(**changes: str) -> Experiment:
    return preset("composite").changed({**TINY, **changes})


def record(folder: Path, member: str = "seed-0") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{member}.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_record_has_the_settings_every_evaluation_and_the_end(tmp_path: Path) -> None:
    experiment = tiny()
    outcome = run(experiment, [0], tmp_path / "out", preset="mini", device="cpu", quiet=True)[0]
    lines = record(tmp_path / "out")
    assert [line["kind"] for line in lines] == ["run", *["evaluation"] * 4, "end"]
    assert [line["step"] for line in lines[1:-1]] == [0, 4, 8, 12]
    assert experiment_from(lines[0]["settings"]) == experiment
    assert set(lines[1]["splits"]) == {"train", "test", "composite", "symmetric"}
    assert lines[1]["loss"] is None
    assert lines[2]["loss"] > 0
    assert outcome.lines == lines
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["done"] is True


def test_best_and_last_follow_from_the_evaluations(tmp_path: Path) -> None:
    end = run(tiny(), [0], tmp_path / "out", device="cpu", quiet=True)[0]
    tests = [line["splits"]["test"] for line in end.lines if line["kind"] == "evaluation"]
    best, last = end.end["best"]["test"], end.end["last"]["test"]
    assert last == {name: tests[-1][name] for name in ("token", "sequence", "loss")}
    assert best["loss"]["value"] == min(found["loss"] for found in tests)
    assert best["sequence"]["value"] == max(found["sequence"] for found in tests)


def test_accuracies_by_pair_add_up_to_the_splits(tmp_path: Path) -> None:
    lines = run(tiny(), [0], tmp_path / "out", device="cpu", quiet=True)[0].lines
    found = lines[-2]["splits"]["test"]
    assert set(held_out(tiny().task, "test", 30, torch.device("cpu")).group.bincount().tolist()) == {2}
    assert len(found["groups"]) == 15
    assert sum(found["groups"].values()) / 15 == pytest.approx(found["sequence"])


def test_members_trained_together_have_the_records_of_runs_alone(tmp_path: Path) -> None:
    run(tiny(), [0, Member(1, {"gamma": 0.5, "learning_rate": 0.01})], tmp_path / "both", device="cpu", quiet=True)
    run(tiny(), [0], tmp_path / "first", device="cpu", quiet=True)
    run(tiny(gamma="0.5", learning_rate="0.01"), [1], tmp_path / "second", device="cpu", quiet=True)
    name = "gamma-0.5-learning_rate-0.01-seed-1"
    for ours, theirs in (("seed-0", "first/seed-0"), (name, "second/seed-1")):
        together, alone = record(tmp_path / "both", ours), record(tmp_path, theirs)
        assert together[0]["settings"] == alone[0]["settings"]
        for one, other in zip(together[1:-1], alone[1:-1], strict=True):
            assert one["splits"]["test"]["loss"] == pytest.approx(other["splits"]["test"]["loss"], rel=1e-3)
            assert one["learning_rate"] == other["learning_rate"]


def test_a_killed_run_ends_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny()
    run(experiment, [0, 1], tmp_path / "whole", device="cpu", quiet=True)
    monkeypatch.setattr(run_module, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    taken, real = 0, steps_module.train_step

    def killed_at_the_tenth(*args: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 10:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(steps_module, "train_step", killed_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, [0, 1], tmp_path / "killed", device="cpu", quiet=True)
    assert [line["kind"] for line in record(tmp_path / "killed")] == ["run", *["evaluation"] * 3]
    with pytest.raises(ArtefactError, match="not done; go on with it by --resume"):
        run(experiment, [0, 1], tmp_path / "killed", device="cpu", quiet=True)
    with pytest.raises(ArtefactError, match="with other settings"):
        run(tiny(gamma="0.7"), [0, 1], tmp_path / "killed", device="cpu", resume=True, quiet=True)

    monkeypatch.setattr(steps_module, "train_step", real)
    run(experiment, [0, 1], tmp_path / "killed", device="cpu", resume=True, quiet=True)
    for member in ("seed-0", "seed-1"):
        assert without_times(record(tmp_path / "killed", member)) == without_times(record(tmp_path / "whole", member))
        ours, _ = load_member(tmp_path / "killed", member)
        theirs, _ = load_member(tmp_path / "whole", member)
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name


def test_a_run_that_is_done_and_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    run(tiny(), [0], tmp_path / "out", device="cpu", quiet=True)
    with pytest.raises(ArtefactError, match="holds a run that is done"):
        run(tiny(), [0], tmp_path / "out", device="cpu", resume=True, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ArtefactError, match="holds other files"):
        run(tiny(), [0], tmp_path / "mine", device="cpu", quiet=True)


def test_a_loaded_member_answers_as_it_did_when_trained(tmp_path: Path) -> None:
    last = run(tiny(), [0], tmp_path / "out", device="cpu", quiet=True)[0].end["last"]["test"]
    model, experiment = load_member(tmp_path / "out")
    batch = held_out(experiment.task, "test", 30, torch.device("cpu"))
    assert accuracy(model(batch.tokens, 1), batch.targets).token == pytest.approx(last["token"])


def test_tied_embeddings_are_trained_and_loaded_as_one(tmp_path: Path) -> None:
    last = run(tiny(tie_embeddings="true"), [0, 1], tmp_path / "out", device="cpu", grouping="vmap", quiet=True)
    model, experiment = load_member(tmp_path / "out", "seed-1")
    batch = held_out(experiment.task, "test", 30, torch.device("cpu"))
    assert model.head.weight is model.embedding.weight
    expected = torch.nn.functional.cross_entropy(model(batch.tokens), batch.targets[:, 0])
    assert float(expected.detach()) == pytest.approx(last[1].end["last"]["test"]["loss"], rel=1e-4)


def test_settings_that_can_not_be_made_leave_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="headdim must divide"):
        run(tiny(headdim="5"), [0], tmp_path / "out", device="cpu", quiet=True)
    assert not (tmp_path / "out" / "run.json").exists()
    run(tiny(), [0], tmp_path / "out", device="cpu", quiet=True)


def test_grouping_by_vmap_and_by_loop_record_the_same(tmp_path: Path) -> None:
    for grouping in ("vmap", "loop"):
        run(tiny(), [0, 1], tmp_path / grouping, device="cpu", grouping=grouping, quiet=True)
    for one, other in zip(record(tmp_path / "vmap")[2:-1], record(tmp_path / "loop")[2:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_and_is_judged(task: str, tmp_path: Path) -> None:
    small = {"d_model": "8", "d_state": "4", "batch_size": "4", "steps": "2", "evaluate_every": "2"}
    small |= {"evaluation_samples": "8", "length_samples": "2"} | ({"longest": "256"} if task == "induction" else {})
    outcome = run(preset(task).changed(small), [0], tmp_path / "out", device="cpu", quiet=True)[0]
    assert outcome.end["step"] == 2
    assert set(outcome.end["last"]) == set(TASKS[task]().splits)


def test_lengths_are_read_in_chunks_that_change_nothing() -> None:
    torch.manual_seed(0)
    model, task = MambaForComposite(2, None, 16, 16, 4, mixer="mamba"), InductionHeads()
    device = torch.device("cpu")
    batch = held_out(task, "test", 8, device, 512, part=0)
    whole = accuracy(model(batch.tokens, 1), batch.targets)
    for chunk in (512, 100, 7):
        assert accuracy_at_length(model, task, 512, 8, chunk, device)["token"] == pytest.approx(whole.token)


def test_settings_change_by_name_and_are_checked() -> None:
    changed = preset("inverse").changed({"n_layers": "3", "training.clip": "none", "mixer": "mamba", "epochs": "2"})
    assert (changed.model.n_layers, changed.model.mixer, changed.training.clip) == (3, "mamba", None)
    assert changed.task.layers == 3
    assert (changed.training.epochs, changed.training.steps) == (2, 0)


def test_learned_positions_are_as_many_as_the_longest_sequence_has() -> None:
    assert preset("composite").longest_sequence == 8
    assert preset("inverse").changed({"n_layers": "4"}).longest_sequence == 35
    assert preset("modular-arithmetic").changed({"unseen": "21"}).longest_sequence == 22


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gama": "1"}, "there is no setting 'gama'"),
        ({"d_state": "many"}, "d_state can't be 'many'"),
        ({"model": "rnn"}, "model must be one of standard"),
        ({"n_heads": "2"}, "n_heads is not a setting of the model standard"),
        ({"model": "transformer", "mixer": "mamba"}, "mixer is not a setting of the model transformer"),
        ({"steps": "0"}, "give epochs or steps"),
        ({"warmup": "2"}, "warmup must be in"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        preset("composite").changed(settings)


def test_epochs_need_samples_that_come_again() -> None:
    experiment = preset("induction").changed({"epochs": "3"})
    with pytest.raises(DataError, match="has no epochs: set steps"):
        experiment.training.steps_for(experiment.task)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "needs a seed at least"),
        ([0, 0], "members must differ"),
        ([-1], "seeds must be from 0"),
        ([Member(0, {"d_model": 4})], "may differ in gamma"),
    ],
)
def test_members_that_can_not_be_grouped_are_refused(members: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        run(tiny(), members, tmp_path / "out", device="cpu", quiet=True)


def test_the_rate_rises_to_its_peak_and_falls_to_its_end() -> None:
    training = preset("composite", "paper").training
    steps, every = training.steps_for(preset("composite", "paper").task)
    assert (steps, every) == (200 * 123, 123)
    assert training.rate(0, steps) == pytest.approx(1e-5)
    assert training.rate(10 * 123, steps) == pytest.approx(2.5e-4)
    assert training.rate(steps - 1, steps) == pytest.approx(1e-5)


def test_every_preset_fits_its_task() -> None:
    for experiments in PRESETS.values():
        assert set(experiments) == set(TASKS)
        for experiment in experiments.values():
            steps, every = experiment.training.steps_for(experiment.task)
            assert steps >= every > 0
            assert experiment_from(json.loads(json.dumps(experiment.settings()))) == experiment


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"kind": "note"}\n')
    with pytest.raises(ArtefactError, match="is not the record of a lab run"):
        read_lines(tmp_path / "other.jsonl")
