"""A run that was killed and resumed ends as the one that was not."""

import json
import sys

import pytest
import torch
from tests.training.toy import ToyData, squared_error, toy_model, training_data, validation_data

from mambakit.errors import ArtefactError, MambakitError
from mambakit.training import TrainingConfig, copy_weights, fit
from mambakit.training.artefacts import exclusive

CONFIG = TrainingConfig(epochs=4, batch_size=8, learning_rate=0.05)


def run(run_dir, config=CONFIG, model=None, data=None, **options):
    model = model or toy_model(dropout=0.3)
    options = {"quiet": True, "run_dir": run_dir, **options}
    record = fit(model, squared_error, data or training_data(), validation_data(), config, **options)
    return record, copy_weights(model)


def without_seconds(record):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in record.history]


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


class Interrupted(Exception):
    pass


def interrupt_after(epoch):
    def on_epoch(entry):
        if entry["epoch"] == epoch:
            raise Interrupted

    return on_epoch


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork are POSIX")
def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(start_script, tmp_path):
    script = start_script("killed_runs.py", tmp_path)
    output, _ = script.communicate(timeout=120)
    assert script.returncode == 0, output
    report = json.loads(output.splitlines()[-1])
    assert report["whole"]["best_epoch"] == 3, "otherwise the last epochs would not show in the weights"
    assert len(report["equal_when_killed_at_each_moment"]) > 50, "moments within training and within writing"
    assert all(report["equal_when_killed_at_each_moment"])
    assert report["kills"] > 0
    assert report["equal_when_killed_often"]
    assert report["equal_when_killed_at_any_time"]
    assert report["leftovers"] == []


@pytest.mark.parametrize("schedule", ["cosine", "constant", "plateau"])
def test_every_schedule_resumes_to_the_same_bits(tmp_path, schedule):
    config = CONFIG.model_copy(update={"schedule": schedule, "learning_rate": 0.3, "patience": None, "epochs": 8})
    record, weights = run(tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        run(tmp_path / "resumed", config, on_epoch=interrupt_after(5))
    resumed_record, resumed_weights = run(tmp_path / "resumed", config, resume=True)
    assert_same(resumed_weights, weights)
    assert without_seconds(resumed_record) == without_seconds(record)


def test_the_initial_weights_of_the_first_start_count(tmp_path):
    _, weights = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "resumed", on_epoch=interrupt_after(0))
    _, resumed_weights = run(tmp_path / "resumed", resume=True, model=toy_model(dropout=0.3, seed=99))
    assert_same(resumed_weights, weights)


def test_an_interrupted_run_leaves_its_last_checkpoint(tmp_path):
    def stop(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_epoch=stop)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["000001", "000002"]


def test_a_finished_run_returns_its_record_and_weights_without_training(tmp_path):
    record, weights = run(tmp_path)
    calls = []
    again, same_weights = run(tmp_path, resume=True, model=toy_model(dropout=0.3, seed=99), on_epoch=calls.append)
    assert again == record
    assert_same(same_weights, weights)
    assert calls == []


def test_resuming_without_a_checkpoint_starts_afresh(tmp_path):
    _, weights = run(None)
    _, resumed_weights = run(tmp_path / "new", resume=True)
    assert_same(resumed_weights, weights)


def test_a_run_that_is_not_resumed_starts_over(tmp_path):
    run(tmp_path, CONFIG.model_copy(update={"seed": 5}))
    record, weights = run(tmp_path)
    assert record.history[0]["epoch"] == 0
    assert_same(weights, run(None)[1])


def test_a_metric_that_is_nan_survives_a_checkpoint(tmp_path):
    def objective(model, batch):
        return squared_error(model, batch)[0], {"correlation": torch.tensor(float("nan"))}

    options = {"run_dir": tmp_path, "quiet": True}
    fit(toy_model(), objective, training_data(), validation_data(), CONFIG, **options)
    record = fit(toy_model(), objective, training_data(), validation_data(), CONFIG, resume=True, **options)
    assert all(entry["validation_correlation"] != entry["validation_correlation"] for entry in record.history)
    json.loads((tmp_path / "checkpoints" / "000004" / "state.json").read_text(), parse_constant=pytest.fail)


def test_another_setting_is_refused_by_name(tmp_path):
    run(tmp_path)
    with pytest.raises(ArtefactError, match=r"learning_rate was 0\.05 and is now 0\.1\. Give .* without --resume"):
        run(tmp_path, CONFIG.model_copy(update={"learning_rate": 0.1}), resume=True)


def test_other_data_of_the_same_size_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ArtefactError, match="the training data is another"):
        run(tmp_path, data=ToyData(len(training_data()), seed=77), resume=True)


def test_another_model_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ArtefactError, match="the model is another"):
        run(tmp_path, model=torch.nn.Linear(4, 1).double(), resume=True)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path):
    _, weights = run(tmp_path)
    damaged = tmp_path / "checkpoints" / "000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, resumed_weights = run(tmp_path, resume=True)
    assert_same(resumed_weights, weights)


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    run(tmp_path)
    for state in tmp_path.rglob("state.json"):
        state.unlink()
    with pytest.raises(ArtefactError, match=r"cannot resume: .*state.json is missing; start again without --resume"):
        run(tmp_path, resume=True)


def test_two_runs_cannot_share_a_folder(tmp_path):
    with exclusive(tmp_path / "checkpoints"), pytest.raises(ArtefactError, match="in use by another run"):
        run(tmp_path)


def test_resume_needs_a_folder():
    with pytest.raises(MambakitError, match="resume=True needs run_dir"):
        run(None, resume=True)
