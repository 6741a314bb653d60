"""Reports: what is written for runs, from their JSON lines alone."""

import csv
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mambakit.errors import ArtefactError
from mambakit.lab import report_figures
from mambakit.lab.claims import Found, load_claims
from mambakit.lab.presets import preset
from mambakit.lab.record import Member, write_lines
from mambakit.lab.report import read_runs, report, run_table
from mambakit.training.artefacts import write_json


def write_run(
    folder: Path, task: str, model: dict[str, str], *, seed: int = 0, shares: tuple[float, ...] = (0.1, 0.9, 0.6)
) -> None:
    """A run's record with the same shares for all of its splits."""
    experiment = preset(task).changed(model)
    splits = experiment.task.splits
    lines: list[dict[str, Any]] = [
        {"kind": "run", "format": 1, "seed": seed, "preset": "mini", "settings": experiment.settings(), "steps": 20}
    ]
    for number, share in enumerate(shares):
        result: dict[str, Any] = {"loss": 1.0, "token": share, "sequence": share}
        if experiment.task.groups:
            result["groups"] = {"34": share}
        lines.append({"kind": "evaluation", "step": 10 * number, "splits": dict.fromkeys(splits, result)})
    if experiment.task.lengths:
        at = {str(n): {"token": 1.0, "sequence": 1.0 / i} for i, n in enumerate(experiment.task.lengths, start=1)}
        lines.append({"kind": "lengths", "step": 20, "lengths": at})
    lines.append({"kind": "end"})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", {})
    write_lines(folder, Member(seed), lines)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for gamma in ("0.5", "1.0"):
        for seed in (0, 1):
            shares = (0.1, float(gamma) - 0.1 * seed, 0.2)
            write_run(tmp_path / f"composite-{gamma}", "composite", {"gamma": gamma}, seed=seed, shares=shares)
    write_run(tmp_path / "parity", "parity", {})
    return tmp_path


def drawn(figure: Figure) -> list[str]:
    """The numbers written on a figure's panels."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_report_has_every_seed_best_and_last(runs: Path) -> None:
    page, table, *figures = report(runs)
    text = page.read_text()
    assert "standard mamba2, gamma 0.5 | 1 | composite | 0.200 | 0.400 | 10 |" in text
    assert "standard mamba2, gamma 1.0 | 0 | composite | 0.200 | 1.000 | 10 |" in text
    assert {path.name for path in figures} == {
        *("composite-curves.svg", "composite-pairs.svg", "composite-phase-1.svg"),
        *("parity-curves.svg", "parity-lengths.svg"),
    }
    assert all(f"({path.name})" in text and path.read_text().startswith("<?xml") for path in figures)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 4 * 4 + 3
    (row,) = [r for r in rows if (r["split"], r["gamma"], r["seed"]) == ("symmetric", "1.0", "1")]
    assert (row["sequence_last"], row["sequence_best"], row["best_step"], row["done"]) == ("0.2", "0.9", "10", "True")


def test_the_phase_diagram_has_the_mean_and_each_seed(runs: Path) -> None:
    records = [record for record in read_runs(runs) if record.task == "composite"]
    assert drawn(report_figures.phase_diagram(records)) == ["0.45\n.50 .40", "0.95\n1.00 .90"] * 2


def test_curves_have_a_line_for_each_seed_in_the_colour_of_its_model(runs: Path) -> None:
    records = [record for record in read_runs(runs) if record.task == "composite"]
    figure = report_figures.learning_curves(records)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["train", "test", "composite", "symmetric"]
    for axes in figure.axes:
        assert len(axes.lines) == 4
        assert len({line.get_color() for line in axes.lines}) == 2
        assert list(axes.lines[0].get_ydata()) == [0.1, 0.5, 0.2]


def test_withheld_pairs_are_shown_by_the_answer_they_get(runs: Path) -> None:
    records = [record for record in read_runs(runs) if record.task == "composite"]
    (axes,) = report_figures.accuracy_by_group(records).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["34", "34 composite", "34 symmetric"]


def test_extrapolation_marks_the_length_that_was_trained(runs: Path) -> None:
    records = [record for record in read_runs(runs) if record.task == "parity"]
    (axes,) = report_figures.accuracy_at_lengths(records).axes
    curve, trained = axes.lines
    longest = preset("parity").task.longest
    assert list(curve.get_xdata()) == [longest, 2 * longest, 4 * longest, 8 * longest]
    assert list(trained.get_xdata()) == [longest, longest]


def test_runs_that_are_not_done_say_how_far_they_are(runs: Path) -> None:
    path = runs / "parity" / "seed-0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    (record,) = [record for record in read_runs(runs) if record.task == "parity"]
    assert run_table([record])[1][-1] == "at step 10 of 20"
    assert report(runs)


def test_a_single_run_is_a_folder_of_runs_too(runs: Path) -> None:
    assert [record.folder for record in read_runs(runs / "parity")] == ["."]


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no evaluation of a lab run yet"):
        read_runs(tmp_path)
    with pytest.raises(ArtefactError, match="not a folder"):
        read_runs(tmp_path / "none")


def test_published_cells_stand_beside_every_seed_of_ours() -> None:
    cells = [
        claim
        for claim in load_claims().claims
        if claim.id == "composite-phase" and claim.settings["gamma"] in (0.5, 1.0)
    ]
    found = [
        (cell, Found([0, 1], [0.25, 0.75], [0.2, 0.7], "epochs 60" if cell.settings["n_layers"] == 7 else ""))
        for cell in cells
    ]
    figure = report_figures.beside_published(found)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gamma 0.5", "gamma 1"]
    lines = figure.axes[1].lines
    assert list(lines[0].get_ydata()) == [0.61, 0.94, 0.92, 0.72, 0.9, 0.98]
    assert list(lines[1].get_ydata()) == [0.5] * 6
    assert [line.get_markerfacecolor() == "white" for line in lines[2:]] == [False] * 5 + [True]
