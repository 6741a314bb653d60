"""Claims: that the file holds together, which verdicts follow from numbers, and which runs a claim takes them from."""

from pathlib import Path
from typing import Any

import pytest

from mambakit.errors import DataError
from mambakit.lab.claims import Claim, Claims, Effect, compare, experiment_of, load_claims, values_of
from mambakit.lab.report import claim_table, effect_table

SPLITS = {"test": {"loss": 1.0, "token": 0.9, "sequence": 0.8, "groups": {"34": 0.7}}}


def record(one: Claim | Effect, *values: float, seed: int = 0, preset: str = "paper", **training: Any) -> list[Any]:
    """The lines of a run at a claim's settings, with an evaluation for each value."""
    settings = experiment_of(one).settings()
    settings["training"] |= training
    lines: list[Any] = [{"kind": "run", "seed": seed, "preset": preset, "settings": settings, "device": "cpu"}]
    lines += [
        {"kind": "evaluation", "step": step, "splits": {one.split: {"token": v, "sequence": v}}}
        for step, v in enumerate(values)
    ]
    return [*lines, {"kind": "end"}]


def claim(name: str, **settings: Any) -> Claim:
    (found,) = [c for c in load_claims().claims if c.id == name and settings.items() <= c.settings.items()]
    return found


def test_the_file_has_every_cell_of_the_phase_diagram_and_each_symmetric_one_once() -> None:
    claims = load_claims().claims
    places = [(layers, gamma) for layers in range(2, 8) for gamma in (*(n / 10 for n in range(1, 11)), 1.5, 2.0)]
    composite = [c for c in claims if c.id == "composite-phase"]
    symmetric = [c for c in claims if c.id in ("symmetric-bound", "symmetric-cell")]
    for cells in (composite, symmetric):
        found = sorted((c.settings["n_layers"], c.settings["gamma"]) for c in cells)
        assert found == sorted(places)
    assert claim("composite-phase", n_layers=3, gamma=0.9).published == 0.85
    assert claim("composite-phase", n_layers=7, gamma=2.0).published == 0.72


def test_measured_entries_have_a_command_and_name_what_they_are_of() -> None:
    claims = load_claims()
    everything: list[Claim | Effect] = [*claims.claims, *claims.effects]
    for entry in claims.measured:
        assert entry.command.startswith(("mambakit lab ", "make lab"))
    assert sum(claims.measured_of(one) is not None for one in everything) <= len(claims.measured)


@pytest.mark.parametrize(
    ("relation", "values", "verdict"),
    [
        ("about", [0.7, 0.9], "reproduced"),
        ("about", [0.6, 0.6], "not reproduced"),
        ("at least", [0.95, 1.0], "reproduced"),
        ("at least", [0.65], "not reproduced"),
        ("at most", [0.1], "reproduced"),
        ("at most", [0.95], "not reproduced"),
        ("about", [], "not yet run"),
    ],
)
def test_the_mean_of_seeds_is_held_to_the_tolerance(relation: Any, values: list[float], verdict: str) -> None:
    one = Claim(id="x", says="x", source="x", task="parity", published=0.8, relation=relation, tolerance=0.1)
    assert one.verdict(values) == verdict


def test_a_mini_run_says_nothing_of_a_claim_and_a_paper_run_nothing_of_an_effect() -> None:
    one = claim("ones-symmetric")
    effect = next(e for e in load_claims().effects if e.id == "mini-ones")
    assert compare(one, [record(one, 1.0, preset="mini")]) is None
    assert compare(effect, [record(effect, 1.0, preset="paper")]) is None
    found = compare(effect, [record(effect, 1.0, preset="mini")])
    assert found is not None
    assert effect.verdict(found.best) == "shown at mini"
    assert effect.verdict([effect.bound - 0.01]) == "not shown at mini"


def test_best_and_last_of_every_seed_are_found() -> None:
    one = claim("ones-symmetric")
    found = compare(one, [record(one, 0.2, 0.9, 0.5, seed=1), record(one, 0.8, seed=0)])
    assert found is not None
    assert (found.seeds, found.best, found.last, found.differing) == ([0, 1], [0.8, 0.9], [0.8, 0.5], "")


def test_runs_trained_otherwise_are_shown_and_never_reproduce() -> None:
    one = claim("ones-symmetric")
    shorter = record(one, 1.0, epochs=20)
    rows = claim_table(Claims([one], [], []), [_Lines(shorter)])  # type: ignore[list-item]
    assert rows[1][-2:] == ["1.000 (1.000)", "settings differ: epochs 20"]
    exact = compare(one, [shorter, record(one, 0.7)])
    assert exact is not None
    assert exact.best == [0.7]
    seldom = compare(one, [record(one, 0.7, evaluate_every=7)])  # how often one looks is no matter
    assert seldom is not None
    assert seldom.differing == ""


def test_runs_of_other_models_and_those_not_done_are_left_out() -> None:
    one, other = claim("ones-symmetric"), claim("positions-symmetric")
    assert compare(one, [record(other, 1.0), record(one, 1.0)[:-1]]) is None


def test_values_come_from_groups_lengths_and_above_chance() -> None:
    lines = [
        {"kind": "evaluation", "step": 0, "splits": SPLITS},
        {"kind": "lengths", "lengths": {"512": {"token": 0.4, "sequence": 0.3}}},
        {"kind": "end"},
    ]

    def value(**options: Any) -> Any:
        return values_of(Effect(id="x", says="x", task="parity", relation="at least", bound=0, **options), lines)

    assert value() == (0.8, 0.8)
    assert value(metric="token") == (0.9, 0.9)
    assert value(group="34") == (0.7, 0.7)
    assert value(length=512) == (0.3, 0.3)
    assert value(length=1024) is None
    assert value(split="ood") is None
    assert value(metric="above chance", chance=0.5) == pytest.approx((0.6, 0.6))


def test_tables_fold_what_nobody_ran_and_every_opens_them() -> None:
    claims = load_claims()
    folded, opened = claim_table(claims, []), claim_table(claims, [], every=True)
    assert len(opened) == len(claims.claims) + 1
    assert len(folded) < 40
    assert any("72 cells" in row for row in folded)
    assert all(row[-1].startswith("not yet run") for row in folded[1:])
    assert len(effect_table(claims, [])) == len(claims.effects) + 1


class _Lines:
    """As much of a report's record as a comparison reads."""

    def __init__(self, lines: list[Any]) -> None:
        self.lines = lines


CLAIM = '[[claims]]\nid = "a"\nsays = "b"\nsource = "c"\ntask = "parity"\nrelation = "about"\ntolerance = 0.1\n'
MEASURED = '[[measured]]\nof = "a"\nseeds = [0]\nbest = [1.0]\nlast = [1.0]\ncommand = "x"\ndevice = "cpu"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("claims = [", "is not TOML"),
        (CLAIM.replace('source = "c"\n', ""), r"claims\.0\.source: Field required"),
        (CLAIM + "tolerence = 1\n", r"claims\.0\.tolerence: Extra inputs"),
        (CLAIM + CLAIM, "a is claimed twice"),
        (CLAIM.replace('"parity"', '"sorting"'), "a: the task must be one of"),
        (CLAIM + 'split = "composite"\n', "split must be one of train, test, ood"),
        (CLAIM + "settings = {width = 3}\n", "no setting 'width'"),
        (CLAIM + 'metric = "above chance"\n', "chance goes with the metric"),
        (CLAIM + MEASURED, r"measured\.0\.date: Field required"),
        (CLAIM + MEASURED + 'date = "yesterday"\n', "isoformat"),
        (CLAIM + MEASURED.replace("[1.0]", "[1.0, 1.0]", 1) + "date = 2026-01-01\n", "a value for each seed"),
        (CLAIM + MEASURED.replace('"a"', '"z"') + "date = 2026-01-01\n", "'z' with settings {} is no claim"),
    ],
)
def test_a_file_that_does_not_hold_together_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        load_claims(path)
    assert "\n" not in str(error.value)


def test_what_was_measured_stands_beside_what_was_published(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(CLAIM + "published = 0.95\n" + MEASURED + "date = 2026-01-01\n")
    rows = claim_table(load_claims(path), None)
    assert rows[1][2:] == ["0.95 ± 0.1", "1.000 (1.000)", "reproduced"]


def test_another_curriculum_is_another_training_and_another_length_another_task() -> None:
    one = next(c for c in load_claims().claims if c.id == "mamba3-states" and c.task == "parity")
    gentle, longer = record(one, 0.9), record(one, 0.9)
    gentle[0]["settings"]["task"] |= {"stages": 20, "first_longest": 6}
    longer[0]["settings"]["task"] |= {"longest": 200}
    found = compare(one, [gentle])
    assert found is not None
    assert found.differing == "stages 20, first_longest 6"
    assert compare(one, [longer]) is None
