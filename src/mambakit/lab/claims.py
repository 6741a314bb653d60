"""What was published, what was measured here, and what to say of the two: `lab/claims.toml`, checked as it is loaded.

A *claim* is one published number with its source, the settings that it was found at (changes of the preset `paper`) and
a tolerance. An *effect* is what a mini preset is to show: a bound of ours, never a published number. `[[measured]]`
entries hold what was found for either, with the command and the date.

| verdict          | of a claim                                                                  |
|------------------|-----------------------------------------------------------------------------|
| reproduced       | the mean over seeds, at the published settings, is within the tolerance     |
| not reproduced   | it is not                                                                   |
| settings differ  | runs of its task and model were trained otherwise; their number is shown    |
| not yet run      | nothing was measured                                                        |

An effect is "shown at mini", "not shown at mini" or "not yet run". Verdicts follow from the numbers and are stored
nowhere. Best and last evaluation are kept apart; the best is compared, as the papers seem to do, but at lengths never
trained, which are judged once, at the end.
"""

import datetime
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mambakit.errors import DataError
from mambakit.lab.experiment import Experiment
from mambakit.lab.presets import preset as preset_of
from mambakit.lab.record import Line

Relation = Literal["about", "at least", "at most"]
Metric = Literal["sequence", "token", "above chance"]
NOT_RUN = "not yet run"
_CURRICULUM = ("shortest", "first_longest", "length_step", "stages", "stage_steps")  # of a task, and yet of training
_OTHER_EVALUATION = ("evaluate_every", "evaluation_samples", "evaluation_batch", "length_samples", "length_chunk")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Quantity(_Strict):
    """What is measured of a run.

    Attributes:
        task, settings: of the run; the settings are changes of the preset.
        split, group: the samples that are asked; a group is a kind among them, such as a pair of anchors.
        length: in place of a split, that of an extrapolation.
        metric: share of sequences with every answer right, of tokens, or of sequences with `chance` taken as 0.
    """

    task: str
    settings: dict[str, Any] = {}
    split: str = "test"
    group: str | None = None
    length: int | None = None
    metric: Metric = "sequence"
    chance: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> "Quantity":
        if (self.metric == "above chance") != (self.chance is not None) and getattr(self, "comparable", True):
            raise ValueError("chance goes with the metric 'above chance'")
        return self


class Measured(_Strict):
    """What was found for the claim or the effect `of`: a value for each seed.

    `differing` says how the runs were trained otherwise than the claim has it; they get no verdict then.
    """

    of: str
    settings: dict[str, Any] = {}
    seeds: list[int] = Field(min_length=1)
    best: list[float] = Field(min_length=1)
    last: list[float] = Field(min_length=1)
    differing: str = ""
    command: str = Field(min_length=1)
    date: datetime.date
    device: str

    @model_validator(mode="after")
    def _one_for_each_seed(self) -> "Measured":
        if not len(self.seeds) == len(self.best) == len(self.last):
            raise ValueError("best and last must have a value for each seed")
        return self


class Claim(Quantity):
    """One published number.

    Attributes:
        id: of the table or the claim; cells of a table share it and are told apart by `cell`.
        cell: the settings and whatever else stands for the column.
        says, source, note: in words.
        published: the number; None where a figure alone was published.
        relation, tolerance: what counts as agreement.
        comparable: whether a run of the lab can measure it.
    """

    id: str
    cell: str = ""
    says: str
    source: str
    published: float | None = None
    relation: Relation
    tolerance: float = Field(ge=0)
    comparable: bool = True
    note: str = ""

    def verdict(self, values: Sequence[float]) -> str:
        """Of our values, one for each seed."""
        if not values:
            return NOT_RUN
        if self.published is None:
            return "no number to compare"
        holds = _holds(self.relation, statistics.fmean(values), self.published, self.tolerance)
        return "reproduced" if holds else "not reproduced"


class Effect(Quantity):
    """What a mini preset is to show; `bound` is ours."""

    id: str
    says: str
    relation: Literal["at least", "at most"]
    bound: float

    def verdict(self, values: Sequence[float]) -> str:
        """Of our values, one for each seed."""
        if not values:
            return NOT_RUN
        holds = _holds(self.relation, statistics.fmean(values), self.bound, 0.0)
        return "shown at mini" if holds else "not shown at mini"


class _Row(_Strict):
    task: str | None = None
    settings: dict[str, Any] = {}
    chance: float | None = None
    columns: dict[str, list[Any]] | None = Field(default=None, min_length=1, max_length=1)
    published: list[float] | None = None


class _Table(_Strict):
    """Claims that differ in few things: rows of settings, and columns of one setting, of `length` or of `of`."""

    id: str
    says: str
    source: str
    task: str | None = None
    split: str = "test"
    group: str | None = None
    metric: Metric = "sequence"
    relation: Relation
    tolerance: float
    comparable: bool = True
    note: str = ""
    columns: dict[str, list[Any]] = Field(default={}, max_length=1)
    rows: list[_Row]

    def claims(self) -> list[Claim]:
        shared = self.model_dump(exclude={"columns", "rows", "task"})
        found = []
        for row in self.rows:
            (column, values), *_ = [*(row.columns or self.columns).items(), ("of", [None])]
            published: Sequence[float | None] = row.published or [None] * len(values)
            if len(published) != len(values):
                raise DataError(f"claims: {self.id}: {len(published)} published numbers for {len(values)} columns")
            for value, number in zip(values, published, strict=True):
                settings = {**row.settings, **({column: value} if column not in ("of", "length") else {})}
                parts = [row.task] if row.task else []
                parts += [f"{name} {v}" for name, v in settings.items()]
                if column in ("of", "length") and value is not None:
                    parts.append(f"length {value}" if column == "length" else str(value))
                found.append(
                    Claim(
                        **shared,
                        task=row.task or self.task or "",
                        chance=row.chance,
                        settings=settings,
                        length=value if column == "length" else None,
                        cell=", ".join(parts),
                        published=number,
                    )
                )
        return found


class _File(_Strict):
    claims: list[Claim] = []
    tables: list[_Table] = []
    effects: list[Effect] = []
    measured: list[Measured] = []


@dataclass(frozen=True)
class Claims:
    """All of claims.toml, tables taken apart."""

    claims: list[Claim]
    effects: list[Effect]
    measured: list[Measured]

    def measured_of(self, one: Claim | Effect) -> Measured | None:
        """The latest entry for a claim or an effect."""
        entries = [m for m in self.measured if m.of == one.id and m.settings == entry_settings(one)]
        return max(entries, key=lambda entry: entry.date, default=None)


@dataclass(frozen=True)
class Found:
    """What runs in a folder say of a claim or an effect.

    Attributes:
        seeds, best, last: one of each for every run.
        differing: settings in which the runs are not the claim's, with their values; empty where they are.
        device: that they were made on, and how its matrix products were taken where that is not in float32.
    """

    seeds: list[int]
    best: list[float]
    last: list[float]
    differing: str = ""
    device: str = ""


def load_claims(path: str | Path | None = None) -> Claims:
    """The claims in a file; None for the lab's own.

    Raises DataError for a file that is not there, is not TOML, or says what does not hold together.
    """
    where = Path(path) if path is not None else "claims.toml"
    try:
        text = (Path(path) if path is not None else resources.files("mambakit.lab") / "claims.toml").read_text("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {where}: {error.strerror}") from error
    return claims_from(text, str(where))


def claims_from(text: str, where: str) -> Claims:
    """The claims of a file's text; `where` names it in errors, which are those of `load_claims`."""
    try:
        file = _File.model_validate(_dates(tomllib.loads(text)))
        claims = [*file.claims, *(claim for table in file.tables for claim in table.claims())]
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise DataError(f"{where} is not TOML: {error}") from error
    found = Claims(claims, file.effects, file.measured)
    _check(found, where)
    return found


def compare(one: Claim | Effect, records: Sequence[Sequence[Line]]) -> Found | None:
    """What finished runs, by their lines, say of a claim (those of the preset paper) or an effect (of mini).

    Runs at its settings come first. Where there are none, runs of its task and model at other settings of training are
    taken, and how they differ is said. None where there is neither.
    """
    if isinstance(one, Claim) and not one.comparable:
        return None
    name = "mini" if isinstance(one, Effect) else "paper"
    wanted = experiment_of(one).settings()
    alike: dict[str, list[tuple[int, float, float, str]]] = {}
    for lines in records:
        if lines[-1]["kind"] != "end" or lines[0]["preset"] != name:
            continue
        differing = _differing(wanted, lines[0]["settings"])
        values = None if differing is None else values_of(one, lines)
        if differing is not None and values is not None:
            alike.setdefault(differing, []).append((lines[0]["seed"], *values, _device(lines[0])))
    if not alike or ("" not in alike and isinstance(one, Effect)):
        return None
    differing = min(alike, key=len)
    seeds, best, last, devices = (list(column) for column in zip(*sorted(alike[differing]), strict=True))
    return Found(seeds, best, last, differing, ", ".join(dict.fromkeys(devices)))


def experiment_of(one: Claim | Effect) -> Experiment:
    """The experiment that measures a claim or an effect; DataError where its settings are none of the lab's."""
    import json

    of_preset = preset_of(one.task, "mini" if isinstance(one, Effect) else "paper")
    return of_preset.changed({k: v if isinstance(v, str) else json.dumps(v) for k, v in one.settings.items()})


def values_of(quantity: Quantity, lines: Sequence[Line]) -> tuple[float, float] | None:
    """Best and last value of a quantity over the evaluations of a run; None where the run has not got it."""
    if quantity.length is not None:
        at_lengths = [line["lengths"] for line in lines if line["kind"] == "lengths"]
        if not at_lengths or str(quantity.length) not in at_lengths[-1]:
            return None
        values = [at_lengths[-1][str(quantity.length)]["token" if quantity.metric == "token" else "sequence"]]
    else:
        splits = [line["splits"].get(quantity.split) for line in lines if line["kind"] == "evaluation"]
        if quantity.group is None:
            values = [split["token" if quantity.metric == "token" else "sequence"] for split in splits if split]
        else:
            groups = [split.get("groups", {}) for split in splits if split]
            values = [group[quantity.group] for group in groups if quantity.group in group]
    if quantity.chance is not None:
        values = [(value - quantity.chance) / (1 - quantity.chance) for value in values]
    return (max(values), values[-1]) if values else None


def _differing(wanted: dict[str, Any], there: dict[str, Any]) -> str | None:
    """Settings of training that are not those wanted; None for another task or model."""
    if wanted["model"] != there["model"]:
        return None
    trained = {name: value for name, value in there["task"].items() if name in _CURRICULUM}
    if there["task"] != wanted["task"] | trained:
        return None
    alike = {**wanted["training"], **wanted["task"]}
    return ", ".join(
        f"{name} {value}"
        for name, value in {**there["training"], **trained}.items()
        if name not in _OTHER_EVALUATION and value != alike.get(name)
    )


def _device(first: Line) -> str:
    products = first.get("products", "float32")
    return first["device"] if products == "float32" else f"{first['device']}, {products} products"


def _holds(relation: Relation, value: float, wanted: float, tolerance: float) -> bool:
    slack = tolerance + 1e-9
    if relation == "at least":
        return value >= wanted - slack
    if relation == "at most":
        return value <= wanted + slack
    return abs(value - wanted) <= slack


def entry_settings(one: Claim | Effect) -> dict[str, Any]:
    """The settings that name a claim or an effect in [[measured]]: those of a cell of a table."""
    if isinstance(one, Effect):
        return {}
    return {**one.settings, **({} if one.length is None else {"at_length": one.length})} if one.cell else {}


def _dates(content: dict[str, Any]) -> dict[str, Any]:
    """The content; a date with a time of day is refused by the strict model, one in quotes is read."""
    for entry in content.get("measured", []):
        if isinstance(entry, dict) and isinstance(entry.get("date"), str):
            entry["date"] = datetime.date.fromisoformat(entry["date"])
    return content


def _check(found: Claims, where: str) -> None:
    everything: list[Claim | Effect] = [*found.claims, *found.effects]
    names = [(one.id, getattr(one, "cell", "")) for one in everything]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: {' '.join(name).strip()} is claimed twice")
    for one in everything:
        if getattr(one, "comparable", True):
            try:
                task = experiment_of(one).task
            except DataError as error:
                raise DataError(f"{where}: {one.id}: {error}") from error
            if one.length is None and one.split not in task.splits:
                raise DataError(f"{where}: {one.id}: split must be one of {', '.join(task.splits)}, got {one.split!r}")
    for entry in found.measured:
        if not any(one.id == entry.of and entry_settings(one) == entry.settings for one in everything):
            raise DataError(f"{where}: measured {entry.of!r} with settings {entry.settings} is no claim and no effect")
