"""What the evaluation says, in tables and in plain sentences.

The verdict counts as skill of the mean only what survives two questions: is the model's squared error lower than that
of the better of random walk and drift, tested for overlapping samples; and is it still, after every symbol and horizon
that was tried is counted (Holm).
"""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from mambakit.forecast.evaluation import MODEL, Against, Comparison, Evaluation, Score
from mambakit.forecast.predictor import Forecast
from mambakit.forecast.significance import holm

SIGNIFICANCE = 0.05
# Whose CRPS the model's is held against, in words, as far as they were made.
_DISTRIBUTIONS = {
    "random walk": "the constant-volatility random walk's",
    "ewma walk": "the ewma walk's",
    "garch walk": "the garch walk's",
    "ewma": "ewma's",
}
_COLUMNS = (
    "horizon",
    "forecaster",
    "R² vs RW",
    "R² vs drift",
    "MASE",
    "direction",
    "up-rate",
    "PT p",
    "IC",
    "CRPS %",
    "50/80/95%",
)
_LEGEND = (
    "R² vs RW, R² vs drift: out of sample on log returns, above 0 is better than the random walk, the drift. "
    "MASE: absolute error over the training part's mean absolute change. direction: share of right signs; "
    "up-rate: what always saying up scores; PT p: chance of such signs without skill (Pesaran-Timmermann). "
    "IC: correlation of forecast and outcome. CRPS: of the whole distribution, in %, lower is better. "
    "50/80/95%: shares of returns inside the 50, 80 and 95% intervals."
)


def evaluation_table(evaluation: Evaluation, part: str = "test part") -> Table:
    """Every forecaster at every horizon, for a terminal; `part` says which samples were judged."""
    table = Table(title=f"{evaluation.symbol}: {part}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if position < 2 else "right", no_wrap=True)
    previous = evaluation.scores[0].horizon
    for score in evaluation.scores:
        if score.horizon != previous:
            table.add_section()
            previous = score.horizon
        table.add_row(*_cells(score), style="bold" if score.forecaster == MODEL else None)
    return table


def legend() -> str:
    """What the table's columns mean, to be printed once."""
    return _LEGEND


def _cells(score: Score) -> list[str]:
    return [
        f"{score.horizon}d",
        score.forecaster,
        _number(score.r2_random_walk, ".4f"),
        _number(score.r2_drift, ".4f"),
        _number(score.mase, ".3f"),
        _number(score.hit_rate, ".1%"),
        _number(score.up_rate, ".1%"),
        _number(score.pesaran_timmermann_p_value, ".2f"),
        _number(score.ic, ".3f"),
        _number(100 * score.crps, ".3f"),
        "/".join(f"{100 * share:.0f}" for share in (score.coverage_50, score.coverage_80, score.coverage_95)),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, f"z{form}")  # z: no negative zero


def _p_value(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def skill_line(evaluation: Evaluation) -> str:
    """One sentence: has this symbol's model skill beyond random walk and drift, at which horizons?"""
    adjusted = holm([comparison.p_value for comparison in evaluation.comparisons])
    skilled = [
        f"{comparison.horizon}d (p {_p_value(p_value)})"
        for comparison, p_value in zip(evaluation.comparisons, adjusted, strict=True)
        if p_value < SIGNIFICANCE
    ]
    if skilled:
        return f"{evaluation.symbol}: lower squared error than random walk and drift at {', '.join(skilled)}"
    best = min(evaluation.comparisons, key=lambda comparison: comparison.p_value)
    if best.p_value == 1.0:
        return f"{evaluation.symbol}: no skill beyond random walk and drift at any horizon; its mean is the drift"
    return (
        f"{evaluation.symbol}: no skill beyond random walk and drift at any horizon "
        f"(smallest p {best.p_value:.2f}, at {best.horizon}d)"
    )


def verdict(evaluations: Sequence[Evaluation]) -> str:
    """One sentence over all symbols and horizons: did the model beat the baselines?"""
    comparisons: list[Comparison] = [comparison for each in evaluations for comparison in each.comparisons]
    adjusted = holm([comparison.p_value for comparison in comparisons])
    beaten = sum(
        p_value < SIGNIFICANCE and comparison.lowest_error
        for p_value, comparison in zip(adjusted, comparisons, strict=True)
    )
    lowest = sum(comparison.lowest_error for comparison in comparisons)
    total = len(comparisons)
    if beaten == total:
        answer = "the model beat the baselines"
    elif beaten:
        answer = f"the model beat the baselines in {beaten} of {total} cases and not in the others"
    else:
        answer = "the model did not beat the baselines"
    return (
        f"Verdict: {answer}: {beaten} of {total} symbol and horizon pairs are significantly better at 5% "
        f"(Diebold-Mariano, Holm-corrected) than random walk and drift and below momentum and ridge too; "
        f"its squared error is the lowest in {lowest}."
    )


def distribution_verdict(evaluations: Sequence[Evaluation]) -> str:
    """One sentence over all symbols and horizons: whose distributions are the model's better than, by their CRPS?"""
    comparisons = [comparison for each in evaluations for comparison in each.comparisons]
    parts = []
    for name, whose in _DISTRIBUTIONS.items():
        tests = [comparison.against[name] for comparison in comparisons if name in comparison.against]
        if not tests:
            continue
        lower = sum(test.crps_ratio < 1.0 for test in tests)
        better = sum(p < SIGNIFICANCE for p in holm([test.crps_p_value for test in tests]))
        worse = sum(p < SIGNIFICANCE for p in holm([_worse(test) for test in tests]))
        parts.append(f"{whose} in {lower} of {len(tests)} (significantly in {better}, significantly higher in {worse})")
    return f"Distributions: the model's CRPS is lower than {'; than '.join(parts)}."


def _worse(test: Against) -> float:
    """The p-value of "the model's CRPS is higher"; equal distributions prove nothing either way."""
    return 1.0 if test.crps_ratio == 1.0 else 1.0 - test.crps_p_value


def interval_table(forecast: Forecast) -> Table:
    """Forecast prices and their intervals, for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("horizon", "price", "80% interval", "95% interval"):
        table.add_column(column, justify="left" if column == "horizon" else "right", no_wrap=True)
    narrow, wide = forecast.intervals(0.8), forecast.intervals(0.95)
    for horizon, price in forecast.prices().items():
        table.add_row(
            horizon,
            f"{price:.2f}",
            *(f"{lower:.2f} .. {upper:.2f}" for lower, upper in (narrow[horizon], wide[horizon])),
        )
    return table


def model_card(evaluation: Evaluation, metadata: dict[str, Any]) -> str:
    """The stored version's README.md: what it is, what it learnt from, how good it is, what it is not for."""
    data, performance = metadata["data_stats"], metadata["performance_metrics"]
    origins = "\n".join(
        f"- {part}: forecasts made from {first} to {last}" for part, (first, last) in data["origins"].items()
    )
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *(_cells(score) for score in evaluation.scores)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    horizons = ", ".join(str(horizon) for horizon in metadata["model_config"]["prediction_horizons"])
    return f"""# {evaluation.symbol} {metadata["version"]}

A Mamba forecaster of the log return of {evaluation.symbol} over {horizons} trading days: its mean and its quantiles,
made at a day's close. Trained {metadata["training_date"]} with mambakit {metadata["software"]["mambakit"]}.

**{skill_line(evaluation)}.**

## Data

Adjusted closes of {data["days"]} days, {data["first_day"]} to {data["last_day"]} (SHA-256 `{data["sha256"]}`).
The parts follow one another in time, purged by the longest horizon; features are scaled by the training part.

{origins}

Kept: epoch {performance["best_epoch"]} of {performance["total_epochs"]} (epoch 0 is the drift with
volatility-scaled empirical quantiles); {performance["parameters"]:,} parameters. The learnt departure of the mean from
the drift is multiplied, horizon by horizon, by {", ".join(f"{k:.2f}" for k in performance["mean_shrinkage"])}, which
is as much as the validation part supports.

## Test part

{table}

{_LEGEND}

![forecast](forecast.png)
![evaluation](evaluation.png)

## Limits

A forecast price is the current price times exp(mean log return). Returns are mostly noise: read the intervals first.
Past data cannot tell of events unlike any in it. This is no investment advice.
"""
