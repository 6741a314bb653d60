"""Tables and figures of the runs in a folder, made from their JSON lines alone.

`report` writes DIR/report: `index.md`, a page with everything on it, `runs.csv`, a row for every seed and split, and
the figures as SVG. Every seed is shown, and best and last evaluation beside each other.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.errors import ArtefactError
from mambakit.lab import report_figures
from mambakit.lab.claims import Claim, Claims, Effect, Found, compare
from mambakit.lab.record import Line, read_lines
from mambakit.training.artefacts import write_file

_UNTOLD = ("evaluate_every", "evaluation_samples", "evaluation_batch", "length_samples", "length_chunk")


@dataclass(frozen=True)
class Record:
    """One member of a run.

    Attributes:
        folder: of its run, from the folder that was asked for.
        lines: its JSONL.
        settings: those that tell it from the other runs of its task in this report, besides model and mixer.
    """

    folder: str
    lines: list[Line]
    settings: dict[str, Any]

    @property
    def task(self) -> str:
        return str(self.lines[0]["settings"]["task"]["name"])

    @property
    def seed(self) -> int:
        return int(self.lines[0]["seed"])

    @property
    def model(self) -> str:
        """`ones mamba2`; a Transformer has no mixer."""
        model = self.lines[0]["settings"]["model"]
        return str(model["model"]) if model["model"].startswith("transformer") else f"{model['model']} {model['mixer']}"

    @property
    def label(self) -> str:
        """Model and settings, the seed apart."""
        return ", ".join([self.model, *(f"{name} {value}" for name, value in self.settings.items())])

    @property
    def evaluations(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "evaluation"]

    @property
    def lengths(self) -> dict[int, float]:
        """Share of right sequences at each length judged at the end."""
        found = [line["lengths"] for line in self.lines if line["kind"] == "lengths"]
        return {int(length): result["sequence"] for length, result in found[-1].items()} if found else {}

    @property
    def done(self) -> bool:
        return bool(self.lines[-1]["kind"] == "end")

    def best(self, split: str) -> tuple[float, int]:
        """Highest share of right sequences, and the step it was first had at."""
        return max((line["splits"][split]["sequence"], -line["step"]) for line in self.evaluations)

    def last(self, split: str) -> float:
        return float(self.evaluations[-1]["splits"][split]["sequence"])


def read_runs(folder: str | Path) -> list[Record]:
    """Every member of every run in a folder, or in the folders in it; runs that are not done are among them.

    Raises ArtefactError where there is none, or a record is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is not a folder of lab runs; make some by mambakit lab run or lab sweep")
    runs = sorted(path.parent for path in [*folder.glob("run.json"), *folder.glob("*/run.json")])
    found = [(run, read_lines(path)) for run in runs for path in sorted(run.glob("*.jsonl"))]
    found = [(run, lines) for run, lines in found if any(line["kind"] == "evaluation" for line in lines)]
    if not found:
        raise ArtefactError(f"{folder} has no evaluation of a lab run yet; make some by mambakit lab run or lab sweep")
    told_apart = _told_apart([lines[0] for _, lines in found])
    records = [
        Record(str(run.relative_to(folder)), lines, settings)
        for (run, lines), settings in zip(found, told_apart, strict=True)
    ]
    return sorted(records, key=lambda r: (r.task, r.model, [str(v) for v in r.settings.values()], r.seed))


def report(folder: str | Path, claims: Claims | None = None) -> list[Path]:
    """Write DIR/report for the runs in a folder; the paths of its files, the page first.

    Args:
        claims: to put beside the runs.
    """
    folder = Path(folder)
    records = read_runs(folder)
    to = folder / "report"
    write_file(to / "runs.csv", _csv(records).encode())
    figures: list[tuple[Path, str]] = []
    tasks = list(dict.fromkeys(record.task for record in records))
    for task in tasks:
        for name, title, figure in report_figures.of_task([r for r in records if r.task == task]):
            path = to / f"{task}-{name}.svg"
            report_figures.save(figure, path)
            figures.append((path, title))
    if claims is not None:
        found = [(claim, _found(claim, claims, records)) for claim in claims.claims if claim.id == "composite-phase"]
        cells = [(claim, ours) for claim, ours in found if ours is not None]
        if cells:
            path = to / "composite-published.svg"
            report_figures.save(report_figures.beside_published(cells), path)
            figures.append((path, "The published phase diagram's columns beside ours; open points: trained otherwise."))
    page = to / "index.md"
    write_file(page, _page(records, tasks, figures, claims).encode())
    return [page, to / "runs.csv", *(path for path, _ in figures)]


def run_table(records: Sequence[Record]) -> list[list[str]]:
    """A heading and a row for every member and split: share of sequences with every answer right."""
    rows = [["model", "seed", "split", "last", "best", "at step", ""]]
    for record in records:
        for split in record.evaluations[-1]["splits"]:
            best, step = record.best(split)
            state = "" if record.done else f"at step {record.evaluations[-1]['step']} of {record.lines[0]['steps']}"
            rows.append(
                [record.label, str(record.seed), split, f"{record.last(split):.3f}", f"{best:.3f}", str(-step), state]
            )
    return rows


def effect_table(claims: Claims, records: Sequence[Record] | None) -> list[list[str]]:
    """A heading and a row for every effect of the mini presets."""
    rows = [["mini preset", "what it is to show", "bound", "ours: best (last), each seed", "verdict"]]
    for effect in claims.effects:
        found = _found(effect, claims, records)
        sign = ">=" if effect.relation == "at least" else "<="
        verdict = effect.verdict(found.best if found else [])
        rows.append([effect.task, effect.says, f"{sign} {effect.bound:g}", _ours(effect, found), verdict])
    return rows


def claim_table(claims: Claims, records: Sequence[Record] | None, every: bool = False) -> list[list[str]]:
    """A heading and a row for every published number; cells of a table that nobody ran share one, unless `every`."""
    rows = [["claim", "settings", "published", "ours: best (last), each seed", "verdict"]]
    together: dict[str, list[Claim]] = {}
    for claim in claims.claims:
        found = _found(claim, claims, records)
        if found is None and claim.cell and not every:
            together.setdefault(claim.id, []).append(claim)
            continue
        differing = found.differing if found else ""
        verdict = f"settings differ: {differing}" if differing else claim.verdict(found.best if found else [])
        rows.append(
            [
                f"{claim.task}: {claim.says}",
                claim.cell or ", ".join(f"{name} {value}" for name, value in claim.settings.items()),
                _published([claim]),
                _ours(claim, found),
                verdict if claim.comparable else f"{verdict}: {claim.note}",
            ]
        )
    for cells in together.values():
        first = cells[0]
        number = f"{len(cells)} cells" if len(cells) > 1 else first.cell
        verdict = claim_verdict = first.verdict([])
        if not first.comparable:
            verdict = f"{claim_verdict}: {first.note}"
        task = "states" if len({cell.task for cell in cells}) > 1 else first.task
        rows.append([f"{task}: {first.says}", number, _published(cells), "", verdict])
    return rows


def _found(one: Claim | Effect, claims: Claims, records: Sequence[Record] | None) -> Found | None:
    """Of the runs, where runs are given, else as claims.toml has it."""
    if records is not None:
        return compare(one, [record.lines for record in records])
    entry = claims.measured_of(one)
    return Found(entry.seeds, entry.best, entry.last, entry.differing, entry.device) if entry else None


def _published(cells: Sequence[Claim]) -> str:
    numbers = [cell.published for cell in cells if cell.published is not None]
    if not numbers:
        return "a figure"
    sign = {"about": "", "at least": ">= ", "at most": "<= "}[cells[0].relation]
    low, high = min(numbers), max(numbers)
    text = f"{sign}{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"{text} ± {cells[0].tolerance:g}"


def _ours(one: Claim | Effect, found: Found | None) -> str:
    if found is None:
        return ""
    values = zip(found.best, found.last, strict=True)
    if one.length is not None:  # judged once
        return "  ".join(f"{best:.3f}" for best, _ in values)
    return "  ".join(f"{best:.3f} ({last:.3f})" for best, last in values)


def _told_apart(firsts: Sequence[Line]) -> list[dict[str, Any]]:
    """For every record the settings in which records of its task differ, model and mixer apart."""
    flat = [
        {f"{part}.{name}": v for part in ("task", "model", "training") for name, v in first["settings"][part].items()}
        for first in firsts
    ]
    shapes = [one["task.name"] for one in flat]
    found = []
    for one, first in zip(flat, firsts, strict=True):
        alike = [other for other, task in zip(flat, shapes, strict=True) if task == one["task.name"]]
        names = [
            name
            for name in one
            if name not in ("model.model", "model.mixer", "task.name")
            and name.rpartition(".")[2] not in _UNTOLD
            and any(other.get(name) != one[name] for other in alike)
        ]
        settings = {name.rpartition(".")[2]: one[name] for name in names}
        presets = {other["preset"] for other in firsts if other["settings"]["task"]["name"] == one["task.name"]}
        if len(presets) > 1:
            settings = {"preset": first["preset"], **settings}
        found.append(settings)
    return found


def _csv(records: Sequence[Record]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["task", "model", "mixer", "preset", *names, "seed", "split", "token_last", "sequence_last"]
    writer.writerow([*head, "sequence_best", "best_step", "done", "folder"])
    for record in records:
        first = record.lines[0]
        model = first["settings"]["model"]
        mixer = "" if model["model"].startswith("transformer") else model["mixer"]
        for split, last in record.evaluations[-1]["splits"].items():
            best, step = record.best(split)
            of_run = [record.task, model["model"], mixer, first["preset"]]
            own = [record.settings.get(name, "") for name in names]
            found = [last["token"], last["sequence"], best, -step, record.done, record.folder]
            writer.writerow([*of_run, *own, record.seed, split, *found])
    return text.getvalue()


def _page(
    records: Sequence[Record], tasks: Sequence[str], figures: Sequence[tuple[Path, str]], claims: Claims | None
) -> str:
    parts = ["# Runs of the lab", "Shares of sequences with every answer right; every seed, best and last evaluation."]
    for task in tasks:
        own = [record for record in records if record.task == task]
        parts += [f"## {task}", _markdown(run_table(own))]
        parts += [f"{title}\n\n![{title}]({path.name})" for path, title in figures if path.name.startswith(f"{task}-")]
    if claims is not None:
        parts += ["## What the mini presets show", _markdown(effect_table(claims, records))]
        parts += ["## Published numbers", _markdown(claim_table(claims, records))]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
