"""Figures of runs: learning curves, phase diagram, accuracy by pair of anchors and at lengths never trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mambakit.lab.figures import COLOURS, INK, QUIET, SEQUENTIAL, in_style, panels, save

if TYPE_CHECKING:
    from mambakit.lab.claims import Claim, Found
    from mambakit.lab.report import Record

__all__ = [
    "of_task",
    "learning_curves",
    "phase_diagram",
    "accuracy_by_group",
    "accuracy_at_lengths",
    "beside_published",
    "save",
]

_SHOWN = 8  # models of one figure: as many as there are colours


def of_task(records: Sequence[Record]) -> Iterator[tuple[str, str, Figure]]:
    """The figures that the runs of one task have in them: name, title, figure."""
    labels = list(dict.fromkeys(record.label for record in records))
    for part in range(0, len(labels), _SHOWN):
        own = [record for record in records if record.label in labels[part : part + _SHOWN]]
        number = "" if len(labels) <= _SHOWN else f"-{part // _SHOWN + 1}"
        yield f"curves{number}", "Share right as training goes on; a line for each seed.", learning_curves(own)
        if any(record.lengths for record in own):
            title = "Share right at lengths; a line for each seed, dotted where the length was trained."
            yield f"lengths{number}", title, accuracy_at_lengths(own)
        if any(_groups(record) for record in own):
            yield (
                f"pairs{number}",
                "Share right by pair of anchors, last evaluation, mean of seeds.",
                accuracy_by_group(own),
            )
    if records[0].task == "composite":
        alike = list(dict.fromkeys(_apart_from_place(record) for record in records))
        for place, label in enumerate(alike, start=1):
            own = [record for record in records if _apart_from_place(record) == label]
            if len({_place(record) for record in own}) >= 2:
                title = f"Withheld pair, {label}: best evaluation, mean of seeds, each seed below it."
                yield f"phase-{place}", title, phase_diagram(own)


@in_style
def learning_curves(records: Sequence[Record]) -> Figure:
    """Share of right sequences by step, a panel for each split, a colour for each model, a line for each seed."""
    splits = list(records[0].evaluations[-1]["splits"])
    columns = min(2, len(splits))
    rows = -(-len(splits) // columns)
    colours = _colours(records)
    figure, axes = panels(rows, columns, width=7.2, height=0.8 + 2.0 * rows + 0.2 * len(colours), sharey=True)
    for panel in axes[len(splits) :]:
        panel.remove()
    for panel, split in zip(axes, splits, strict=False):
        for record in records:
            points = [(line["step"], line["splits"][split]["sequence"]) for line in record.evaluations]
            panel.plot(*zip(*points, strict=True), color=colours[record.label], linewidth=1.3, alpha=0.85)
        panel.set_title(split)
        panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel("step")
    for panel in axes[:: max(1, columns)][:rows]:
        panel.set_ylabel("share right")
    _legend(figure, colours)
    return figure


@in_style
def accuracy_at_lengths(records: Sequence[Record]) -> Figure:
    """Share of right sequences by their length, on a scale of powers of two."""
    colours = _colours(records)
    figure, (panel,) = panels(width=6.4, height=2.9 + 0.2 * len(colours))
    for record in records:
        if record.lengths:
            panel.plot(
                *zip(*record.lengths.items(), strict=True), color=colours[record.label], marker="o", markersize=3
            )
    panel.set_xscale("log", base=2)
    lengths = sorted({length for record in records for length in record.lengths})
    panel.set_xticks(lengths, [_short(length) for length in lengths])
    panel.xaxis.set_minor_locator(NullLocator())
    task = records[0].lines[0]["settings"]["task"]
    panel.axvline(task.get("longest") if records[0].task != "induction" else task["length"], color=QUIET, ls=":", lw=1)
    panel.set_ylim(-0.03, 1.03)
    panel.set_xlabel("length, tokens")
    panel.set_ylabel("share right")
    _legend(figure, colours)
    return figure


@in_style
def accuracy_by_group(records: Sequence[Record]) -> Figure:
    """A row for each model, a column for each pair of anchors; withheld pairs by the splits that ask for them."""
    labels = list(dict.fromkeys(record.label for record in records))
    found = {label: [_groups(record) for record in records if record.label == label] for label in labels}
    names = list(dict.fromkeys(name for groups in found.values() for group in groups for name in group))
    values = np.array(
        [
            [
                statistics.fmean(g[name] for g in found[label] if name in g)
                if any(name in g for g in found[label])
                else np.nan
                for name in names
            ]
            for label in labels
        ]
    )
    figure, (panel,) = panels(width=2.6 + 0.36 * len(names), height=1.5 + 0.34 * len(labels))
    _numbers(panel, values, size=7)
    panel.set_xticks(range(len(names)), names, rotation=90)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_xlabel("pair of anchors")
    return figure


@in_style
def phase_diagram(records: Sequence[Record]) -> Figure:
    """Layers by gamma: the withheld pair answered as composed, and as the mirrored pair is."""
    layers = sorted({_place(record)[0] for record in records}, reverse=True)
    gammas = sorted({_place(record)[1] for record in records})
    figure, axes = panels(1, 2, width=2.4 + 1.1 * len(gammas), height=1.3 + 0.52 * len(layers), sharey=True)
    for panel, split in zip(axes, ("composite", "symmetric"), strict=True):
        cells: dict[tuple[int, int], list[float]] = {}
        for record in records:
            row, column = layers.index(_place(record)[0]), gammas.index(_place(record)[1])
            cells.setdefault((row, column), []).append(record.best(split)[0])
        values = np.full((len(layers), len(gammas)), np.nan)
        for (row, column), seeds in cells.items():
            values[row, column] = statistics.fmean(seeds)
        _numbers(panel, values, size=8, below={place: seeds for place, seeds in cells.items() if len(seeds) > 1})
        panel.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
        panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        panel.set_xlabel("gamma")
        panel.set_title({"composite": "answered as composed", "symmetric": "answered as mirrored"}[split])
    axes[0].set_ylabel("layers")
    return figure


@in_style
def beside_published(cells: Sequence[tuple[Claim, Found]]) -> Figure:
    """Cells of a table of claims by layers, a panel for each gamma: what was published, and every seed of ours.

    Open points are of runs that were trained otherwise than the published ones.
    """
    gammas = sorted({claim.settings["gamma"] for claim, _ in cells})
    figure, axes = panels(1, len(gammas), width=1.2 + 2.9 * len(gammas), height=3.2, sharey=True)
    for panel, gamma in zip(axes, gammas, strict=True):
        own = sorted(
            ((c.settings["n_layers"], float(c.published or 0), f) for c, f in cells if c.settings["gamma"] == gamma),
            key=lambda cell: cell[0],
        )
        layers = [place for place, _, _ in own]
        panel.plot(layers, [published for _, published, _ in own], color=COLOURS[1], marker="s", label="published")
        panel.plot(layers, [statistics.fmean(f.best) for _, _, f in own], color=COLOURS[0], label="ours, mean")
        for place, _, found in own:
            face = "white" if found.differing else COLOURS[0]
            panel.plot([place] * len(found.best), found.best, "o", color=COLOURS[0], markerfacecolor=face, markersize=4)
        panel.set_title(f"gamma {gamma:g}")
        panel.set_xticks(layers)
        panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel("layers")
    axes[0].set_ylabel("withheld pair composed")
    axes[0].legend(loc="best")
    return figure


def _numbers(panel: Axes, values: Any, size: float, below: dict[tuple[int, int], list[float]] | None = None) -> None:
    """Shares as a map with the number in each cell; cells without one are left white."""
    panel.imshow(np.ma.masked_invalid(values), cmap=SEQUENTIAL, vmin=0.0, vmax=1.0, aspect="auto")
    panel.grid(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        ink = "white" if float(value) < 0.55 else INK
        seeds = (below or {}).get((row, column))
        text = f"{value:.2f}" + ("" if seeds is None else "\n" + " ".join(f"{v:.2f}".lstrip("0") for v in seeds))
        panel.text(
            column, row, text, ha="center", va="center", color=ink, fontsize=size if seeds is None else size - 1.5
        )


def _groups(record: Record) -> dict[str, float]:
    """Shares of the last evaluation by pair; a withheld pair once for each of the answers it may get."""
    splits = record.evaluations[-1]["splits"]
    found = dict(splits.get("test", {}).get("groups", {}))
    for split in ("composite", "symmetric"):
        found |= {f"{name} {split}": v for name, v in splits.get(split, {}).get("groups", {}).items()}
    return found


def _apart_from_place(record: Record) -> str:
    """Its label without layers and gamma: what one phase diagram has in common."""
    others = {k: v for k, v in record.settings.items() if k not in ("n_layers", "gamma")}
    return ", ".join([record.model, *(f"{name} {value}" for name, value in others.items())])


def _place(record: Record) -> tuple[int, float]:
    model = record.lines[0]["settings"]["model"]
    return model["n_layers"], float("nan") if model["gamma"] is None else model["gamma"]


def _colours(records: Sequence[Record]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(record.label for record in records), COLOURS, strict=False))


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=1)


def _short(length: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)
