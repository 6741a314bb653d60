"""`mambakit lab` as a user types it."""

import json
from pathlib import Path

from tests.cli.command_line import assert_one_line_error, mambakit

from mambakit.lab.claims import load_claims

TINY = [
    *("--set", "steps=4", "--set", "evaluate_every=2", "--set", "batch_size=8", "--set", "evaluation_samples=8"),
    *("--set", "samples_per_pair=4", "--set", "d_model=8", "--set", "d_state=4", "--device", "cpu"),
]


def test_a_run_trains_every_seed_and_says_where_it_is_recorded(tmp_path: Path) -> None:
    done = mambakit("lab", "run", "composite", *TINY, "--seeds", "3,4", "--out", tmp_path / "out", fresh=True)
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


def test_a_sweep_and_its_report_by_hand(tmp_path: Path) -> None:
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    settings = ", ".join(f"{pair.replace('=', ' = ')}" for pair in TINY[1:-2:2])
    file.write_text(f'[[experiments]]\ntask = "composite"\nsettings = {{{settings}}}\ngrid = {{gamma = [0.5, 1.0]}}\n')
    done = mambakit("lab", "sweep", file, "--out", out, "--seeds", "5", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "2 points: 0 done, 2 to go in 2 runs" in done.stderr
    assert "[2/2] composite-standard-mamba2-" in done.stderr
    assert f"2 runs made in {out}" in done.stdout

    again = mambakit("lab", "sweep", file, "--out", out, "--seeds", "5", "--device", "cpu", "--quiet")
    assert again.returncode == 0
    assert again.stderr == ""
    assert f"0 runs made in {out}" in again.stdout

    shown = mambakit("lab", "report", out, "--claims")
    assert shown.returncode == 0, shown.stderr
    assert "gamma 0.5" in shown.stdout
    assert "not yet run" in shown.stdout
    assert (out / "report" / "composite-curves.svg").is_file()
    assert "Published numbers" in (out / "report" / "index.md").read_text()


def test_claims_are_printed_without_any_run_and_cell_by_cell_where_asked() -> None:
    folded, every = mambakit("lab", "report", "--claims"), mambakit("lab", "report", "--claims", "--every")
    assert folded.returncode == every.returncode == 0
    claims = load_claims()
    left = sum(claims.measured_of(claim) is None for claim in claims.claims if claim.id == "composite-phase")
    assert f"{left} cells" in folded.stdout
    assert "cells" not in every.stdout
    assert "n_layers 7, gamma 0.1" in " ".join(every.stdout.split())


def test_wrong_sweeps_and_reports_are_one_line(tmp_path: Path) -> None:
    assert_one_line_error(mambakit("lab", "sweep", tmp_path / "none.toml", "--out", tmp_path / "o"), "is not there")
    assert_one_line_error(mambakit("lab", "report", tmp_path, "--every"), "--every is of --claims")
