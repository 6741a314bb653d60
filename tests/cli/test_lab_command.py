"""`mambakit lab` as a user types it."""

import json
from pathlib import Path

from tests.cli.command_line import assert_one_line_error, mambakit

TINY = [
    *("--set", "steps=4", "--set", "evaluate_every=2", "--set", "batch_size=8", "--set", "evaluation_samples=8"),
    *("--set", "samples_per_pair=4", "--set", "d_model=8", "--set", "d_state=4", "--device", "cpu"),
]


def test_a_run_trains_every_seed_and_says_where_it_is_recorded(tmp_path: Path) -> None:
    done = mambakit("lab", "run", "composite", *TINY, "--seeds", "3,4", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"recorded in {tmp_path / 'out'}" in done.stdout
    assert "composite standard: step 4/4" in done.stderr
    for seed in (3, 4):
        assert f"seed-{seed}" in done.stdout
        lines = [json.loads(line) for line in (tmp_path / "out" / f"seed-{seed}.jsonl").read_text().splitlines()]
        assert lines[0]["preset"] == "mini"
        assert lines[-1]["kind"] == "end"


def test_quiet_runs_say_what_they_found_alone(tmp_path: Path) -> None:
    done = mambakit("lab", "run", "composite", *TINY, "--quiet", "--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == ""


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert_one_line_error(mambakit("lab", "run", "sorting", *out), "composite", "induction", "sorting")
    assert_one_line_error(mambakit("lab", "run", "composite", "--set", "width=3", *out), "width", "d_model")
    assert_one_line_error(mambakit("lab", "run", "composite", "--device", "tpu", *out), "device", "tpu")


def test_the_list_shows_tasks_presets_settings_and_models() -> None:
    done = mambakit("lab", "list")
    assert done.returncode == 0
    for word in ("selective-copying", "mini", "paper", "samples_per_pair", "learning_rate", "sinusoidal"):
        assert word in done.stdout
