"""What the chapters of the guide share: figures in one style, captions, tables, checks and timings.

A chapter does `import style`. Run by itself (`python docs/guide/01_spring.py`, or opened as a notebook) everything is
printed as text; while the documentation is built, `page` receives it and puts it on the chapter's page.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from mambakit.lab.figures import COLOURS, GRID, INK, QUIET, SEQUENTIAL, STYLE

__all__ = [
    "COLOURS",
    "GRID",
    "INK",
    "QUIET",
    "SEQUENTIAL",
    "caption",
    "check",
    "figure",
    "html",
    "measure",
    "number",
    "table",
]

WIDTH = 6.4  # inches; a page shows a figure as wide as its text
mpl.rcParams.update(STYLE)
mpl.rcParams.update({"font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"], "figure.max_open_warning": 0})

_captions: "WeakKeyDictionary[Figure, str]" = WeakKeyDictionary()


class Page(Protocol):
    """What receives a chapter's tables, checks and markup while its page is made."""

    def table(self, headings: list[str], rows: list[list[str]], numeric: list[bool]) -> None: ...
    def check(self, says: str, difference: str) -> None: ...
    def html(self, markup: str) -> None: ...


page: Page | None = None


def figure(rows: int = 1, columns: int = 1, height: float = 3.2, **options: Any) -> tuple[Figure, Any]:
    """A figure as wide as the page.

    Args:
        rows, columns: of panels.
        height: of the whole figure, in inches; it is 6.4 wide.
        options: of matplotlib's `plt.subplots`, `sharex=True` for one.

    Returns the figure and its axes: one Axes, or an array of them, as `plt.subplots` returns.
    """
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def caption(fig: Figure, text: str) -> None:
    """Say what a figure shows: its caption on the page, and what a screen reader says instead of it."""
    _captions[fig] = text
    if page is None:
        print(f"Figure: {text}")


def caption_of(fig: Figure) -> str | None:
    """The caption that `caption` gave to a figure."""
    return _captions.get(fig)


def number(value: Any) -> str:
    """A value as text: integers in full, other numbers with 4 significant digits."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10_000 else f"{value:,}".replace(",", " ")  # a thin space
    if isinstance(value, float):
        if 1000 <= abs(value) < 1e6:
            return number(round(value))
        return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3e}"
    return str(value)


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Show a table.

    Args:
        headings: one a column.
        rows: of cells: text, or numbers, which are shown with 4 significant digits and aligned right.

    Raises ValueError for a row that has another number of cells than the headings.
    """
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"a row must have {len(headings)} cells as the headings do, got {len(row)}: {list(row)}")
    cells = [[number(cell) for cell in row] for row in rows]
    numeric = [bool(rows) and all(not isinstance(row[at], str) for row in rows) for at in range(len(headings))]
    if page is not None:
        page.table(list(headings), cells, numeric)
        return
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for row in [list(headings), ["-" * width for width in widths], *cells]:
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(aligned).rstrip())


def check(says: str, got: Any, want: Any, tolerance: float) -> float:
    """Hold two ways of computing the same thing against each other, and say how far apart they are.

    Args:
        says: which two ways, in a few words.
        got, want: tensors, arrays or numbers of one shape.
        tolerance: the largest relative difference, ||got - want|| / ||want|| (where want is zero: ||got - want||).

    Returns the difference. Raises AssertionError where it is larger than the tolerance or not a number, or where the
    shapes differ.
    """
    got, want = _array(got), _array(want)
    if got.shape != want.shape:
        raise AssertionError(f"{says}: the shapes {got.shape} and {want.shape} differ")
    difference = float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))
    if not difference <= tolerance:  # a NaN fails too
        raise AssertionError(f"{says}: the relative difference is {difference:.1e}, more than {tolerance:.1e}")
    shown = f"{difference:.0e}" if difference else "0"
    if page is not None:
        page.check(says, shown)
    else:
        print(f"agrees: {says}: relative difference {shown}")
    return difference


def _array(values: Any) -> Any:
    """A tensor or anything like an array in numpy's double precision, real or complex."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().resolve_conj().resolve_neg()
    values = np.asarray(values)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def measure(call: Callable[[], object], repeats: int = 5) -> float:
    """The median of the seconds that a call takes, after one call to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def html(markup: str) -> None:
    """Put HTML on the page as it stands, scripts included: an interactive figure.

    Everything that it needs is inside: nothing is fetched. For other languages the words between its tags, and the
    values of aria-label, title and placeholder, are looked up in the translation's labels, so that a script finds the
    words it needs in elements or data- attributes. Colours come from the page, in the light and the dark scheme:
    var(--md-default-fg-color), var(--md-default-bg-color), var(--md-primary-fg-color), var(--figure-grid) and
    var(--figure-1) to var(--figure-6), which are COLOURS. An element of class "interactive" gets the page's frame.
    """
    if page is not None:
        page.html(markup)
        return
    print("(an interactive figure: see it on the page of this chapter in the built documentation)")
