"""The report page's figures, as inline SVG that takes its colours from the page, so that it follows light and dark.

matplotlib is given stand-in colours, which become the page's CSS variables; text stays text, in the page's font. The
figures are as wide as a phone, so that their text is readable there, and stand side by side on a wider screen.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import matplotlib.dates as mdates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from mambakit.forecast import metrics
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.evaluation import MODEL, gain
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import interval_columns, pit

# Stand-ins, none of which matplotlib would use by itself, and the variable that each becomes.
INK, QUIET, GRID, ACCENT = "#010203", "#010204", "#010205", "#010206"
_SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--grid", ACCENT: "--accent"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES, start=1)
}
_WIDTH, _HEIGHT = 4.4, 3.1  # inches: 317 points wide, about a phone's screen
_BANDS = ((0.95, 0.16), (0.8, 0.22), (0.5, 0.30))  # central interval and its opacity, the widest first
CURVES = ("random walk", "ewma walk", "garch walk", "gru")
HISTORY_DAYS = 90
_LONGEST_PAUSE = np.timedelta64(60, "D")  # between forecasts that a curve connects


@dataclass(frozen=True)
class Fan:
    """A forecast to be drawn: prices up to its day, its distribution, and what came where that is known."""

    symbol: str
    dates: np.ndarray  # (days,) datetime64[D], the last is the day of the forecast
    prices: np.ndarray  # (days,)
    horizons: tuple[int, ...]
    mean: np.ndarray  # (horizons,) log returns
    quantiles: np.ndarray  # (horizons, levels) log returns
    afterwards: np.ndarray | None = None  # prices of the days that followed


def fan_chart(fan: Fan) -> str:
    """Recent prices, the 50, 80 and 95% intervals fanning out, and the prices that came, where known."""
    figure, axes = _figure()
    recent = fan.prices[-HISTORY_DAYS:]
    ahead = np.arange(fan.horizons[-1] + 1)
    price = recent[-1]
    mean, quantiles = along_the_way(fan.horizons, fan.mean, fan.quantiles, ahead)
    for level, opacity in _BANDS:
        low, high = interval_columns(level, QUANTILES)
        axes.fill_between(
            ahead,
            price * np.exp(quantiles[:, low]),
            price * np.exp(quantiles[:, high]),
            color=ACCENT,
            alpha=opacity,
            linewidth=0,
            label=f"{level:.0%}",
        )
    axes.plot(np.arange(1 - len(recent), 1), recent, color=INK, linewidth=1.2)
    axes.plot(ahead, price * np.exp(mean), color=ACCENT, linewidth=1.6, label="mean")
    if fan.afterwards is not None:
        came = np.concatenate([[price], fan.afterwards[: ahead[-1]]])
        axes.plot(np.arange(len(came)), came, color=INK, linewidth=1.2, linestyle=(0, (3, 1.5)), label="what came")
    axes.axvline(0, color=QUIET, linewidth=0.7, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel("trading days from the forecast")
    _legend(axes, columns=5)
    last = price * np.exp(fan.mean[-1])
    words = f"{fan.symbol}: forecast from {fan.dates[-1]} at {price:,.2f}; mean after {ahead[-1]} days {last:,.2f}"
    return _svg(figure, f"fan-{fan.symbol}", words)


def along_the_way(
    horizons: Sequence[int], mean: np.ndarray, quantiles: np.ndarray, days: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (days,) and quantiles (days, levels) between the horizons, from those (horizons,) and (horizons, levels).

    The mean goes straight from one to the next; the spread around it grows with the square root of time, its factor
    going straight, so the fan is as round between two horizons as a random walk's.
    """
    at = np.array(horizons)
    centre = np.interp(days, (0, *at), (0.0, *mean))
    factors = (quantiles - mean[:, None]) / np.sqrt(at)[:, None]
    spread = np.stack([np.interp(days, at, column) for column in factors.T], axis=1)
    return centre, centre[:, None] + np.sqrt(days)[:, None] * spread


def crps_course(records: Sequence[OutOfSample]) -> str:
    """The share of each baseline's CRPS that the model has saved so far, over all symbols and horizons."""
    figure, axes = _figure()
    names = [name for name in CURVES if all(name in record.predictions for record in records)]
    for place, name in enumerate(names):
        days, saved = _course(records, [_crps_gains(record, name) for record in records])
        axes.plot(days, saved, color=_SERIES[place], linewidth=1.5, label=name)
    _dated(axes)
    _legend(axes, columns=2)
    return _svg(figure, "crps-course", f"CRPS saved over time against {', '.join(names)}")


def squared_course(records: Sequence[OutOfSample]) -> tuple[str | None, list[int]]:
    """The share of the drift's squared error that the model's mean has saved so far, for each horizon.

    Beside the figure come the horizons at which the model's mean is the drift, so that there is nothing to draw; None
    in its place where that is so at all of them.
    """
    horizons = records[0].horizons
    gains = [_squared_gains(record) for record in records]
    moving = [column for column in range(len(horizons)) if any(each[:, column].any() for each in gains)]
    still = [horizon for column, horizon in enumerate(horizons) if column not in moving]
    if not moving:
        return None, still
    figure, axes = _figure()
    for column in moving:
        days, saved = _course(records, [each[:, column] for each in gains])
        colour = _SERIES[column % len(_SERIES)]
        axes.plot(days, saved, color=colour, linewidth=1.5, label=f"{horizons[column]}d")
    _dated(axes)
    _legend(axes, columns=4)
    return _svg(figure, "squared-course", "Squared error saved over time against drift"), still


def _squared_gains(record: OutOfSample) -> np.ndarray:
    """(samples, horizons) squared error saved, in units of the drift's mean."""
    theirs, ours = ((record.actual - record.predictions[name].mean) ** 2 for name in ("drift", MODEL))
    saved = [gain(theirs[:, column], ours[:, column]) for column in range(len(record.horizons))]
    return np.stack(saved, axis=1) / theirs.mean(axis=0)


def _crps_gains(record: OutOfSample, name: str) -> np.ndarray:
    """(samples,) mean over horizons of the CRPS saved, in units of the baseline's mean."""
    theirs, ours = (
        metrics.crps(record.predictions[each].quantiles, record.actual, QUANTILES) for each in (name, MODEL)
    )
    return ((theirs - ours) / theirs.mean(axis=0)).mean(axis=1)


def _course(records: Sequence[OutOfSample], gains: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Days, and the sum of all gains up to each, over the number of all: ends at the mean gain.

    A NaN stands in years without forecasts, so that no line is drawn through them.
    """
    days, place = np.unique(np.concatenate([record.dates for record in records]), return_inverse=True)
    every = np.concatenate(gains)
    total = np.bincount(place, weights=every, minlength=len(days)).cumsum() / len(every)
    gaps = np.flatnonzero(np.diff(days) > _LONGEST_PAUSE) + 1
    return np.insert(mdates.date2num(days), gaps, mdates.date2num(days[gaps])), np.insert(total, gaps, np.nan)


def pit_chart(records: Sequence[OutOfSample]) -> str:
    """A histogram for each horizon of where outcomes fell within the model's distributions: flat is right."""
    horizons = records[0].horizons
    rows = -(-len(horizons) // 2)
    figure = Figure(figsize=(_WIDTH, 1.55 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(horizons) :]:
        axes.set_visible(False)
    for column, (axes, horizon) in enumerate(zip(panels, horizons, strict=False)):
        transforms = np.concatenate(
            [pit(record.predictions[MODEL].quantiles[:, column], record.actual[:, column]) for record in records]
        )
        shares = np.histogram(transforms, bins=10, range=(0.0, 1.0))[0] / len(transforms)
        axes.bar(np.arange(10) / 10 + 0.05, shares, 0.092, color=ACCENT, alpha=0.65, linewidth=0)
        axes.axhline(0.1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_title(f"{horizon}d", loc="left", pad=2)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xticks([0, 0.5, 1])
    return _svg(figure, "pit", "Histograms of the probability integral transform; flat is right")


def reliability_chart(records: Sequence[OutOfSample]) -> str:
    """How much more often than promised outcomes fell below each quantile, for every horizon: 0 is right."""
    figure, axes = _figure()
    axes.axhline(0.0, color=INK, linewidth=0.8)
    for column, horizon in enumerate(records[0].horizons):
        below = np.concatenate(
            [record.actual[:, column, None] <= record.predictions[MODEL].quantiles[:, column] for record in records]
        ).mean(axis=0)
        colour = _SERIES[column % len(_SERIES)]
        axes.plot(QUANTILES, below - QUANTILES, "o-", color=colour, linewidth=1.3, markersize=2.5, label=f"{horizon}d")
    largest = max(abs(bound) for bound in axes.get_ylim())
    axes.set_ylim(-max(largest, 0.05), max(largest, 0.05))
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.0f}" if value else "0"))
    axes.set_xlabel("promised share below the quantile")
    axes.set_ylabel("observed less promised, points")
    _legend(axes, columns=4)
    return _svg(figure, "reliability", "Observed less promised share of outcomes below each quantile")


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    return figure, figure.add_subplot()


def _dated(axes: Axes) -> None:
    axes.axhline(0.0, color=INK, linewidth=0.8)
    locator = mdates.AutoDateLocator(minticks=3, maxticks=7)  # with fewer it finds no step for just under three years
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator, show_offset=False))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _legend(axes: Axes, columns: int) -> None:
    """Above the panel, where it can't lie over a curve."""
    axes.legend(
        frameon=False,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.1,
        columnspacing=1.0,
        handlelength=1.2,
        handletextpad=0.4,
        labelcolor=INK,
    )


def _svg(figure: Figure, name: str, words: str) -> str:
    """The figure as an inline element that is described by these words."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=QUIET, labelcolor=QUIET, labelsize=8, length=2.5)
        axes.grid(True, axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=QUIET, fontsize=8)
        for text in (axes.title, axes._left_title):  # type: ignore[attr-defined]
            text.set(color=INK, fontsize=9)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend else ():
            text.set_fontsize(8)
    figure.patch.set_visible(False)
    drawn = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Groups are numbered alike in every figure; a page may hold an id only once.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None
    opening = f'<svg class="chart" role="img" aria-label="{_escaped(words)}" viewBox="{view.group(1)}">'
    return opening + svg[svg.index(">") + 1 :]


def _escaped(words: str) -> str:
    return words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
