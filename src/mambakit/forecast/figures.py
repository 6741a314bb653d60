"""Two figures for each model: where the price may go, and whether to believe it.

Drawn through Figure objects on the Agg canvas, so they need no display and leave pyplot's global state alone. The
colours are Okabe and Ito's, told apart by readers with any kind of colour vision.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.dates as mdates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from mambakit.forecast.charts import along_the_way
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.evaluation import MODEL
from mambakit.forecast.metrics import crps
from mambakit.forecast.predictor import Forecast
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.report import skill_line

if TYPE_CHECKING:
    from mambakit.forecast.train import TrainedForecaster

HISTORY_DAYS = 120
_LEVELS = {0.95: "#D3E6F3", 0.8: "#A6CDE6", 0.5: "#74B0D6"}  # shade of each interval, the widest first
_SIDE_NOTE: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": 8,
    "color": "#222222",
    "annotation_clip": False,
}
RIVAL = "ewma walk"  # whose distributions are hard to beat
_COLOURS = {
    MODEL: "#0072B2",
    "random walk": "#7F7F7F",
    "drift": "#E69F00",
    "momentum": "#CC79A7",
    "ridge": "#009E73",
}
_HORIZON_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_INK = "#222222"


def draw_fan(forecast: Forecast, series: PriceSeries, path: Path) -> None:
    """The last 120 days, and the forecast's 50, 80 and 95% intervals fanning out from the last one, as a PNG."""
    figure = _figure(9.6, 5.6)
    axes = figure.add_subplot()
    recent = series.last(HISTORY_DAYS)
    ahead = np.arange(forecast.horizons[-1] + 1)
    mean, quantiles = along_the_way(forecast.horizons, forecast.mean, forecast.quantiles, ahead)
    price = forecast.current_price

    for level, shade in _LEVELS.items():
        low, high = (price * np.exp(_at_level(quantiles, (1 + sign * level) / 2)) for sign in (-1, 1))
        axes.fill_between(ahead, low, high, color=shade, linewidth=0, label=f"{level:.0%} interval")
        axes.annotate(f"{high[-1]:,.2f}", (ahead[-1], high[-1]), (5, 0), va="center", **_SIDE_NOTE)
        axes.annotate(f"{low[-1]:,.2f}", (ahead[-1], low[-1]), (5, 0), va="center", **_SIDE_NOTE)
    axes.plot(np.arange(1 - len(recent), 1), recent.prices, color=_INK, linewidth=1.4, label="adjusted close")
    axes.plot(ahead, price * np.exp(mean), color=_COLOURS[MODEL], linewidth=2.0, label="forecast")
    drift = np.interp(ahead, (0, *forecast.horizons), (0.0, *forecast.drift))
    axes.plot(ahead, price * np.exp(drift), color=_COLOURS["drift"], linewidth=1.4, linestyle="--", label="drift alone")
    marks = list(forecast.horizons)
    axes.plot(marks, price * np.exp(mean[marks]), "o", color=_COLOURS[MODEL], markersize=4)
    end = price * np.exp(mean[-1])
    axes.annotate(f"{end:,.2f}", (ahead[-1], end), (5, 0), va="center", fontweight="bold", **_SIDE_NOTE)
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")

    _month_ticks(axes, recent.dates, forecast.horizons[-1])
    axes.set_ylabel("price, adjusted (log scale)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.set_title(
        f"{forecast.symbol}: {price:,.2f} at the close of {forecast.as_of}, "
        f"and the next {forecast.horizons[-1]} trading days",
        loc="left",
    )
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=6)
    _save(figure, path)


def _month_ticks(axes: Axes, dates: np.ndarray, ahead: int) -> None:
    """Name the months along an axis that counts trading days from the last of `dates`, weekends having no width."""
    future = np.busday_offset(dates[-1], np.arange(1, ahead + 1), roll="backward")
    days = np.concatenate([dates, future])
    months = days.astype("datetime64[M]")
    firsts = np.flatnonzero(months[1:] != months[:-1]) + 1
    names = [f"{month.item():%b %Y}" for month in months[firsts]]
    axes.set_xticks(firsts - (len(dates) - 1), names)


def draw_evaluation(trained: "TrainedForecaster", path: Path) -> None:
    """Four views of the test part, as a PNG: skill, its course in time, calibration, and how training went."""
    figure = _figure(12.0, 8.4)
    skill, course, calibration, training = figure.subplots(2, 2).flat
    _draw_skill(skill, trained)
    _draw_course(course, trained)
    _draw_calibration(calibration, trained)
    _draw_training(training, trained)
    series, split = trained.prepared.series, trained.prepared.split
    first, last = (series.dates[trained.prepared.origins[split.test[end]]] for end in (0, -1))
    figure.suptitle(
        f"{skill_line(trained.evaluation)}\n{len(split.test)} test forecasts, made from {first} to {last}",
        x=0.01,
        ha="left",
    )
    _save(figure, path)


def _draw_skill(axes: Axes, trained: "TrainedForecaster") -> None:
    scores = trained.evaluation.scores
    names = [name for name in _COLOURS if name != "random walk"]  # ewma's mean is the drift's
    horizons = trained.prepared.config.prediction_horizons
    width = 0.8 / len(names)
    low, high = 0.0, 0.0
    for place, name in enumerate(names):
        own = [score for score in scores if score.forecaster == name]
        values = np.array([score.r2_random_walk for score in own])
        errors = np.array([score.r2_random_walk_error for score in own])
        centres = np.arange(len(horizons)) + (place - (len(names) - 1) / 2) * width
        axes.bar(centres, values, width * 0.9, color=_COLOURS[name], label=name)
        axes.errorbar(centres, values, yerr=2 * errors, fmt="none", ecolor=_INK, elinewidth=0.8, capsize=2)
        if name != "momentum":  # whose failures would flatten all the others
            low, high = min(low, (values - 2 * errors).min()), max(high, (values + 2 * errors).max())
    axes.axhline(0.0, color=_INK, linewidth=0.8)
    margin = 0.08 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xticks(range(len(horizons)), [f"{horizon}d" for horizon in horizons])
    axes.set_ylabel("R² against the random walk")
    axes.set_title("Skill on returns, with ±2 standard errors", loc="left")
    axes.legend(loc="best", frameon=False, fontsize=9, ncols=2)


def _draw_course(axes: Axes, trained: "TrainedForecaster") -> None:
    prepared = trained.prepared
    dates = mdates.date2num(prepared.series.dates[prepared.origins[prepared.split.test]])
    costs = {
        name: crps(trained.test.predictions[name].quantiles, trained.test.actual, QUANTILES) for name in (MODEL, RIVAL)
    }
    # Divided by the rival's whole CRPS, the curve of each horizon ends at the share of it that the model saved.
    gain = np.cumsum(costs[RIVAL] - costs[MODEL], axis=0) / costs[RIVAL].sum(axis=0)
    for column, horizon in enumerate(prepared.config.prediction_horizons):
        axes.plot(dates, gain[:, column], color=_horizon_colour(column), linewidth=1.5, label=f"{horizon}d")
    axes.axhline(0.0, color=_INK, linewidth=0.8)
    locator = mdates.AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_ylabel("share of its CRPS saved")
    axes.set_title("CRPS saved against the ewma walk, summed up over time", loc="left")
    axes.legend(loc="best", frameon=False, fontsize=9, ncols=2, title="rising: Mamba is better", title_fontsize=9)


def _draw_calibration(axes: Axes, trained: "TrainedForecaster") -> None:
    shares = trained.evaluation.calibration
    axes.plot((0, 1), (0, 1), color=_INK, linewidth=0.8, label="ideal")
    for column, horizon in enumerate(trained.prepared.config.prediction_horizons):
        axes.plot(
            shares["nominal"],
            shares[f"{horizon}d"],
            "o-",
            color=_horizon_colour(column),
            linewidth=1.2,
            markersize=4,
            label=f"{horizon}d",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("forecast probability")
    axes.set_ylabel("share of returns below the quantile")
    axes.set_title("Calibration of the quantiles", loc="left")
    axes.legend(loc="best", frameon=False, fontsize=9)


def _draw_training(axes: Axes, trained: "TrainedForecaster") -> None:
    history, best = trained.record.history, trained.record.best_epoch
    trained_epochs = history[1:]
    axes.plot(
        [entry["epoch"] for entry in trained_epochs],
        [entry["train_loss"] for entry in trained_epochs],
        "o-",
        color=_COLOURS["random walk"],
        markersize=3,
        label="training",
    )
    epochs = [entry["epoch"] for entry in history]
    losses = [entry["validation_loss"] for entry in history]
    axes.plot(epochs, losses, "o-", color=_COLOURS[MODEL], markersize=3, label="validation")
    axes.plot(best, losses[best], "*", color=_COLOURS["drift"], markersize=14, label=f"kept: epoch {best}")
    axes.set_xlabel("epoch (0: drift with empirical quantiles)")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Training", loc="left")
    axes.legend(loc="best", frameon=False, fontsize=9)


def _at_level(quantiles: np.ndarray, level: float) -> np.ndarray:
    return quantiles[:, QUANTILES.index(round(level, 6))]


def _horizon_colour(column: int) -> str:
    return _HORIZON_COLOURS[column % len(_HORIZON_COLOURS)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path)
