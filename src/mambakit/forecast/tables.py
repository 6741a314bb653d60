"""A summary over many symbols, as tables and sentences for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mambakit.forecast.evaluation import MODEL
from mambakit.forecast.summary import (
    ALL_HORIZONS,
    NONE,
    SIGNIFICANCE,
    SKILL,
    WORSE,
    Criterion,
    Pooled,
    Summary,
)

_MARKS = {SKILL: "better", NONE: "-", WORSE: "WORSE"}


def summary_tables(summary: Summary) -> list[Table]:
    """Pooled CRPS ratios, pooled R2 and coverage, and the table of skill."""
    return [_crps_table(summary), _mean_table(summary), _skill_table(summary)]


def horizon_name(horizon: int) -> str:
    """'5d', or 'all' for the mean over the horizons."""
    return "all" if horizon == ALL_HORIZONS else f"{horizon}d"


def baseline_name(name: str, summary: Summary) -> str:
    """The baseline, and for how many symbols it was made where not for all."""
    fewer = next(each.symbols for each in summary.crps if each.name == name)
    return name if fewer is None else f"{name} ({fewer} of {len(summary.symbols)} symbols)"


def significance_mark(pooled: Pooled) -> str:
    """'*' where the model is significantly better, '!' where it is significantly worse, at 5%, before correction."""
    if pooled.p_value is None or pooled.error == 0:
        return ""
    if pooled.p_value < SIGNIFICANCE:
        return "*"
    return "!" if pooled.p_value > 1 - SIGNIFICANCE else ""


def _crps_table(summary: Summary) -> Table:
    table = _table(
        f"CRPS of {MODEL} over that of each baseline, {len(summary.symbols)} symbols, {summary.samples} forecasts: "
        "below 1 is better",
        ["baseline", *(horizon_name(horizon) for horizon in (*summary.horizons, ALL_HORIZONS))],
    )
    for name in dict.fromkeys(each.name for each in summary.crps):
        row = [f"{each.value:.4f}{significance_mark(each):1}" for each in summary.crps if each.name == name]
        table.add_row(baseline_name(name, summary), *row)
    table.caption = "* significantly better, ! significantly worse (5%, each test by itself, Driscoll-Kraay errors)"
    table.caption_justify = "left"
    return table


def _mean_table(summary: Summary) -> Table:
    table = _table("The mean, and the intervals", ["", *map(horizon_name, (*summary.horizons, ALL_HORIZONS))])
    for name in dict.fromkeys(each.name for each in summary.r2):
        row = [f"{each.value:+.4f} ±{each.error:.4f}" for each in summary.r2 if each.name == name]
        table.add_row(f"R² against {name}", *row, "")
    for name in dict.fromkeys(each.name for each in summary.coverage):
        row = [f"{each.value:.1%} ±{each.error:.1%}" for each in summary.coverage if each.name == name]
        table.add_row(f"{name} interval covers", *row)
    return table


def _skill_table(summary: Summary) -> Table:
    columns = ["symbol"]
    for horizon in summary.horizons:
        columns += [f"{horizon}d CRPS", f"{horizon}d mean"]
    table = _table("Where the model has skill (Benjamini-Hochberg over all cells, 5%)", columns)
    for symbol in summary.symbols:
        row = []
        for cell in (each for each in summary.cells if each.symbol == symbol):
            row += [f"{cell.crps_ratio:.3f} {_MARKS[cell.distribution]}", f"{cell.r2_drift:+.4f} {_MARKS[cell.mean]}"]
        table.add_row(symbol, *row)
    table.caption = "CRPS: over that of the hardest to beat of the walks with moving volatility; mean: R² against drift"
    table.caption_justify = "left"
    return table


def skill_verdict(summary: Summary) -> str:
    """One sentence: in how many symbols and horizons is there skill, of the mean and of the distribution?"""
    total = len(summary.cells)

    def counts(words: Sequence[str], holm: Sequence[float]) -> str:
        surely = sum(p < SIGNIFICANCE for p in holm)
        return f"{words.count(SKILL)} of {total} (Holm: {surely}), worse in {words.count(WORSE)}"

    distribution = counts([cell.distribution for cell in summary.cells], [cell.crps_holm for cell in summary.cells])
    mean = counts([cell.mean for cell in summary.cells], [cell.mean_holm for cell in summary.cells])
    return (
        f"Skill by symbol and horizon, corrected for having tested them all: of the distribution beyond walks with "
        f"moving volatility in {distribution}; of the mean beyond random walk and drift in {mean}."
    )


def criteria_lines(criteria: Sequence[Criterion]) -> list[str]:
    """PASS, FAIL or UNKNOWN, what was asked, and what was measured."""
    words = {True: "PASS   ", False: "FAIL   ", None: "UNKNOWN"}
    return [f"{words[each.passed]}  {each.name}: {each.detail}" for each in criteria]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    return table
