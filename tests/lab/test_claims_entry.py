"""Entering measurements: what a claims file says afterwards."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from mambakit.lab.claims import Claim, experiment_of, load_claims
from mambakit.lab.claims_entry import enter

TODAY = datetime.date(2026, 1, 2)
FILE = """# A claim without a [[measured]] entry is not yet run.
[[tables]]
id = "phase"
says = "composed"
source = "a paper"
task = "composite"
split = "composite"
relation = "about"
tolerance = 0.1
rows = [{settings = {model = "ones"}, columns = {gamma = [0.5, 1.0]}, published = [0.2, 0.8]}]

[[claims]]
id = "far"
says = "exact far away"
source = "a paper"
task = "induction"
length = 128
relation = "at least"
tolerance = 0.01
published = 1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "claims.toml"
    path.write_text(FILE)
    return path


def run_of(one: Claim, value: float, seed: int = 0, products: str = "float32", **training: Any) -> list[Any]:
    settings = experiment_of(one).settings()
    settings["training"] |= training
    first = {"kind": "run", "seed": seed, "preset": "paper", "settings": settings, "device": "a GPU"}
    judged = {"token": value, "sequence": value}
    return [
        {**first, "products": products},
        {"kind": "evaluation", "step": 0, "splits": {one.split: judged}},
        {"kind": "lengths", "lengths": {"128": judged}},
        {"kind": "end"},
    ]


def test_a_cell_and_a_length_are_found_again(file: Path) -> None:
    far, half, _ = load_claims(file).claims
    entered = enter(
        file, [run_of(half, 0.25, seed=1), run_of(half, 0.123456), run_of(far, 1.0)], "mambakit lab x", TODAY
    )
    assert len(entered) == 2
    claims = load_claims(file)
    found = claims.measured_of(half)
    assert found is not None
    assert (found.seeds, found.best, found.settings) == ([0, 1], [0.1235, 0.25], {"model": "ones", "gamma": 0.5})
    assert (found.command, found.date, found.device) == ("mambakit lab x", TODAY, "a GPU")
    assert claims.measured_of(far) is not None
    assert file.read_text().startswith(FILE)


def test_a_new_measurement_takes_the_place_of_the_old_and_leaves_the_others(file: Path) -> None:
    far, half, _ = load_claims(file).claims
    enter(file, [run_of(half, 0.1), run_of(far, 0.9)], "first", TODAY)
    enter(file, [run_of(half, 0.2)], "second", TODAY)
    found = {entry.of: (entry.best, entry.command) for entry in load_claims(file).measured}
    assert found == {"phase": ([0.2], "second"), "far": ([0.9], "first")}


def test_runs_that_were_trained_otherwise_say_so_and_never_replace_those_that_were_not(file: Path) -> None:
    _, half, _ = load_claims(file).claims
    shorter = run_of(half, 0.3, products="tf32", epochs=20)
    enter(file, [shorter], "shorter", TODAY)
    found = load_claims(file).measured_of(half)
    assert found is not None
    assert (found.differing, found.device) == ("epochs 20", "a GPU, tf32 products")
    enter(file, [run_of(half, 0.2)], "as published", TODAY)
    assert enter(file, [shorter], "shorter", TODAY) == []
    assert [entry.command for entry in load_claims(file).measured] == ["as published"]
