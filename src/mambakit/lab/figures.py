"""One style for the figures of the lab and the guide, and how they are written.

Drawn through Figure objects, so that they need no display and leave pyplot's global state alone. Lines are in Okabe and
Ito's colours, told apart with any kind of colour vision; maps are cividis, or go from blue over white to orange where
values have a sign. A function that draws stands under `@in_style`. SVGs keep their text as text and are the same bytes
at every run.
"""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mambakit.errors import DataError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
INK, QUIET, GRID = "#222222", "#666666", "#DDDDDD"
SEQUENTIAL = "cividis"
DIVERGING = LinearSegmentedColormap.from_list(
    "blue white orange", ["#004A75", "#0072B2", "#FFFFFF", "#D55E00", "#8A3C00"]
)

STYLE: Any = {  # the names of settings that matplotlib's types know are of one version
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=COLOURS),
    "lines.linewidth": 1.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
}
_WIDTH, _HEIGHT = 6.4, 3.6  # inches


P = ParamSpec("P")
R = TypeVar("R")


def in_style(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in the lab's style: matplotlib reads some of its settings when a text or a line is made."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    return drawn


def panels(
    rows: int = 1, columns: int = 1, *, width: float = _WIDTH, height: float = _HEIGHT, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure in the lab's style and its panels, row by row.

    Args:
        rows, columns: of panels.
        width, height: of the whole figure, in inches.
        options: of matplotlib's `Figure.subplots`, `sharex` for one.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def heat_map(axes: Axes, values: Any, *, signed: bool, limit: float | None = None, label: str | None = None) -> None:
    """A matrix as a picture with its colour bar, row 0 on top.

    Args:
        axes: a panel.
        values: (rows, columns); what is masked of a masked array shows the panel's ground.
        signed: zero is white, and both signs reach equally far.
        limit: the value of the strongest colour; None for the largest there is.
        label: of the colour bar; None for no bar.
    """
    values = values if isinstance(values, np.ma.MaskedArray) else as_array(values)
    largest = float(abs(values).max()) if limit is None and values.size else float(limit or 0.0)
    low = -largest if signed else min(0.0, float(values.min()) if values.size else 0.0)
    drawn = axes.imshow(
        values,
        cmap=DIVERGING if signed else SEQUENTIAL,
        vmin=low,
        vmax=largest or 1.0,
        interpolation="nearest",
        aspect="auto",
    )
    axes.grid(False)
    axes.spines[["top", "right"]].set_visible(True)
    if label is not None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        bar = figure.colorbar(drawn, ax=axes, pad=0.02)
        bar.set_label(label)
        bar.outline.set_linewidth(0.5)


def token_ticks(axes: Axes, tokens: Sequence[str] | None, length: int, *, along: str) -> None:
    """Positions, or the tokens that stand there, along "x", "y" or "xy"."""
    if tokens is None:
        for name in along:
            getattr(axes, f"{name}axis").get_major_locator().set_params(integer=True)
        return
    if len(tokens) != length:
        raise DataError(f"tokens must be one for each of {length} positions, got {len(tokens)}")
    size = 8 if length <= 24 else 6
    if "x" in along:
        axes.set_xticks(range(length), tokens, rotation=0 if max(map(len, tokens)) <= 3 else 90, fontsize=size)
    if "y" in along:
        axes.set_yticks(range(length), tokens, fontsize=size)


def as_array(values: Any) -> Any:
    """A tensor or anything like an array as a numpy array of float64."""
    values = values.detach().double().cpu().numpy() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float64)


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure whole or not at all, as SVG or PNG by the path's suffix.

    Raises DataError for another suffix.
    """
    from mambakit.training.artefacts import write_file

    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise DataError(f"path must end in .svg or .png, got {path}")
    drawn = io.BytesIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(drawn, format=path.suffix[1:], dpi=200, metadata=metadata)
    write_file(path, drawn.getvalue())
