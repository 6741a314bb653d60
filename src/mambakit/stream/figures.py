"""Four figures of an ensemble: R2 of each target, R2 along the sequence, how it learnt, how long a tick takes.

Drawn through Figure objects on the Agg canvas, so they need no display and leave pyplot's global state alone. The
colours are Okabe and Ito's, told apart by readers with any kind of colour vision.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from mambakit.stream.contest import METRIC_NAMES, Metric

COLOURS = {"ensemble": "#0072B2", "ridge": "#D55E00", "attainable": "#009E73"}
_MEMBERS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#7F7F7F", "#D55E00", "#0072B2")
_INK = "#222222"


def draw_targets(scores: Mapping[str, Sequence[float]], names: Sequence[str], metric: Metric, path: Path) -> None:
    """A dot for each forecaster and target, targets in the order of the ensemble's score; scores by forecaster."""
    figure, axes = _figure(max(6.4, 0.28 * len(names) + 1.5), 4.2)
    order = np.argsort(scores["ensemble"])[::-1]
    for forecaster, values in scores.items():
        marker = "o" if forecaster == "ensemble" else "_"
        axes.plot(
            np.asarray(values)[order], marker, color=COLOURS[forecaster], label=_label(forecaster, values), markersize=7
        )
    axes.set_xticks(range(len(names)), [names[position] for position in order], rotation=90 if len(names) > 12 else 0)
    axes.set_xlabel("target")
    axes.set_ylabel(METRIC_NAMES[metric])
    axes.set_title("Score of each target", loc="left")
    axes.legend(loc="best", frameon=False, fontsize=9)
    _save(figure, axes, path)


def draw_steps(scores: Mapping[str, np.ndarray], steps: np.ndarray, metric: Metric, path: Path) -> None:
    """The mean over the targets at each span of steps; scores by forecaster, (spans,) each, steps (spans,) centres."""
    figure, axes = _figure(8.0, 4.2)
    for forecaster, values in scores.items():
        axes.plot(steps, values, color=COLOURS[forecaster], label=forecaster, linewidth=1.6)
    axes.set_xlabel("step in the sequence")
    axes.set_ylabel(METRIC_NAMES[metric])
    axes.set_title("Score along the sequence: what the carried state is worth", loc="left")
    axes.legend(loc="best", frameon=False, fontsize=9)
    _save(figure, axes, path)


def draw_learning(histories: Sequence[Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Training and validation loss of every network, epoch by epoch."""
    figure, axes = _figure(8.0, 4.2)
    for number, history in enumerate(histories):
        colour = _MEMBERS[number % len(_MEMBERS)]
        trained = [entry for entry in history if "train_loss" in entry]
        epochs = [entry["epoch"] for entry in trained]
        axes.plot(epochs, [entry["train_loss"] for entry in trained], color=colour, linestyle=":", linewidth=1.4)
        losses = [entry["validation_loss"] for entry in trained]
        axes.plot(epochs, losses, color=colour, linewidth=1.6, label=f"network {number}, best {min(losses):.4f}")
    axes.plot([], [], color=_INK, linestyle=":", label="training (running mean of the epoch)")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.set_title("Learning curves: validation (solid) and training (dotted)", loc="left")
    axes.legend(loc="best", frameon=False, fontsize=9)
    _save(figure, axes, path)


def draw_latency(seconds: np.ndarray, percentiles: Mapping[str, float], path: Path) -> None:
    """How long ticks took; percentiles in microseconds by name."""
    figure, axes = _figure(8.0, 4.2)
    microseconds = 1e6 * seconds
    edges = np.geomspace(max(microseconds.min(), 1e-2), max(microseconds.max(), 1.0), 80)
    axes.hist(microseconds, bins=edges.tolist(), color="#56B4E9")
    axes.set_xscale("log")
    axes.set_yscale("log")
    top = axes.get_ylim()[1]
    for (name, value), height in zip(percentiles.items(), (0.9, 0.5, 0.25), strict=False):
        axes.axvline(value, color=_INK, linewidth=0.9, linestyle="--")
        axes.annotate(f" {name}: {value:.0f} µs", (value, top * height), fontsize=8, color=_INK, va="top")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("time of a tick, microseconds (log scale)")
    axes.set_ylabel("ticks (log scale)")
    axes.set_title(f"Latency of {len(seconds):,} ticks, one by one", loc="left")
    _save(figure, axes, path)


def _label(forecaster: str, values: Sequence[float] | np.ndarray) -> str:
    return f"{forecaster} (mean {np.mean(values):.4f})"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.savefig(path)
