"""`mambakit forecast report`: one HTML page about stored models or a backtest, with nothing fetched from anywhere.

What it shows follows from the stored predictions alone: where prices may go, whether intervals held what they
promised, how the lead over each baseline came about in time, every comparison with its significance, and a verdict in
plain words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast import charts
from mambakit.forecast.artefact import SavedForecaster, load_forecaster
from mambakit.forecast.backtest import Backtest
from mambakit.forecast.evaluation import MODEL, Evaluation, Score
from mambakit.forecast.outofsample import OutOfSample, read_records
from mambakit.forecast.predictor import forecast_series
from mambakit.forecast.prices import fetch_historical_prices
from mambakit.forecast.registry import ModelRegistry
from mambakit.forecast.report import distribution_verdict, skill_line, verdict
from mambakit.forecast.summary import (
    ALL_HORIZONS,
    NONE,
    SIGNIFICANCE,
    SKILL,
    VOLATILITY_WALKS,
    WORSE,
    Pooled,
    Summary,
    success_criteria,
    summarise,
)
from mambakit.forecast.tables import baseline_name, horizon_name, significance_mark, skill_verdict
from mambakit.training.artefacts import verify_folder, write_file

TEST_RECORDS = "test.parquet"  # in a version's folder: the predictions of its test part
_MOST_FANS = 24  # on one page


@dataclass(frozen=True)
class Run:
    """What a page is made from."""

    title: str
    records: tuple[OutOfSample, ...]
    evaluations: tuple[Evaluation, ...]
    summary: Summary
    fans: tuple[charts.Fan, ...]
    data: tuple[dict[str, str], ...]  # a row for each symbol
    settings: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]


def write_page(run: str | Path, out: str | Path) -> None:
    """Write the page about a folder of models, a symbol's folder, a version's or a backtest's.

    Raises ArtefactError where the folder is none of these, or was changed.
    """
    write_file(out, render(read_run(Path(run))).encode("utf-8"))


def read_run(path: Path) -> Run:
    """What a folder holds; see `write_page`."""
    if (path / "backtest.json").is_file():
        return _of_backtest(Backtest.load(path), path)
    if (path / "metrics.json").is_file():
        verify_folder(path)
        return _of_models([path], path)
    registry = ModelRegistry(path.parent)
    if path.is_dir() and _versions(registry, path.name):
        return _of_models([registry.find(path.name)], path)
    registry = ModelRegistry(path)
    symbols = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
    found = [registry.find(symbol) for symbol in symbols if _versions(registry, symbol)]
    if not found:
        raise ArtefactError(
            f"{path} holds neither models nor a backtest; make one with: mambakit forecast train --test --out {path}"
        )
    return _of_models(found, path)


def _versions(registry: ModelRegistry, symbol: str) -> list[str]:
    try:
        return registry.versions(symbol)
    except DataError:  # a folder whose name is no symbol
        return []


def _of_backtest(result: Backtest, path: Path) -> Run:
    warnings = [note for evaluation in result.evaluations for note in evaluation.notes]
    warnings += [f"{symbol} failed: {reason}" for symbol, reason in result.failures.items()]
    rows = []
    for symbol, each in result.data.items():
        folds = each["folds"]
        rows.append(
            {
                "symbol": symbol,
                "prices": f"{each['days']} days, {each['first_day']} to {each['last_day']}",
                "training": f"{len(folds)} fits, the last up to {folds[-1]['training'][1]}",
                "judged": f"forecasts from {folds[0]['test'][0]} to {folds[-1]['test'][1]}",
                "sha256": each["sha256"][:12],
            }
        )
    settings = result.settings
    walk = settings["walk_forward"] or {"split": "training, validation and test part, as in training"}
    return Run(
        title=f"Backtest {path.name}: {', '.join(record.symbol for record in result.records)}",
        records=result.records,
        evaluations=result.evaluations,
        summary=result.summary,
        fans=tuple(_past_fan(record, result.prices[record.symbol]) for record in result.records[:_MOST_FANS]),
        data=tuple(rows),
        settings={
            "Walk": {**walk, "calibration": settings["calibration"]},
            "Model": settings["model"],
            "Training": settings["training"],
        },
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _past_fan(record: OutOfSample, prices: dict[str, list]) -> charts.Fan:
    """The last forecast of a record, and what came after it."""
    dates, values = np.array(prices["dates"], dtype="datetime64[D]"), np.array(prices["prices"])
    day = int(np.searchsorted(dates, record.dates[-1])) + 1
    own = record.predictions[MODEL]
    return charts.Fan(
        record.symbol, dates[:day], values[:day], record.horizons, own.mean[-1], own.quantiles[-1], values[day:]
    )


def _of_models(folders: Sequence[Path], path: Path) -> Run:
    models = [load_forecaster(folder) for folder in folders]
    records = []
    for folder in folders:
        if not (folder / TEST_RECORDS).is_file():
            raise ArtefactError(f"{folder} has no {TEST_RECORDS}: train it again with this version of mambakit")
        records += read_records(folder / TEST_RECORDS)
    evaluations = tuple(model.evaluation for model in models)
    warnings = [note for evaluation in evaluations for note in evaluation.notes]
    fans, rows = [], []
    for model in models:
        fan, warning = _coming_fan(model)
        fans += [fan] if fan is not None else []
        warnings += [warning] if warning else []
        rows.append(_model_row(model))
    first = models[0].metadata
    return Run(
        title=", ".join(f"{model.symbol} {model.version}" for model in models),
        records=tuple(records),
        evaluations=evaluations,
        summary=summarise(records, evaluations),
        fans=tuple(fans[:_MOST_FANS]),
        data=tuple(rows),
        settings={
            "Model": first["model_config"],
            "Training": first["training_config"],
            "Software": {key: value or "unknown" for key, value in first["software"].items()},
        },
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _model_row(model: SavedForecaster) -> dict[str, str]:
    data = model.metadata["data_stats"]
    return {
        "symbol": f"{model.symbol} {model.version}",
        "prices": f"{data['days']} days, {data['first_day']} to {data['last_day']}",
        "training": "forecasts from {} to {}".format(*data["origins"]["training"]),
        "judged": "forecasts from {} to {}".format(*data["origins"]["test"]),
        "sha256": data["sha256"][:12],
    }


def _coming_fan(model: SavedForecaster) -> tuple[charts.Fan | None, str]:
    """The forecast from the last day of the prices that the model was trained on, if they are at hand."""
    try:
        series = fetch_historical_prices([model.symbol])[model.symbol]
    except DataError as error:
        return None, f"{model.symbol}: no fan chart, its prices are not at hand ({error})"
    series = series.last(model.metadata["data_stats"]["days"])
    if series.fingerprint != model.metadata["data_stats"]["sha256"]:
        return None, f"{model.symbol}: no fan chart, the prices at hand are not those it was trained on"
    forecast = forecast_series(model, series)
    fan = charts.Fan(model.symbol, series.dates, series.prices, forecast.horizons, forecast.mean, forecast.quantiles)
    return fan, ""


def render(run: Run) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("mambakit.forecast") / "templates" / "report.html.j2").read_text("utf-8"))
    squared, still = charts.squared_course(run.records)
    summary = run.summary
    return template.render(
        title=run.title,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, mambakit {version('mambakit')}",
        sentences=plain_verdict(summary),
        details=[verdict(run.evaluations), distribution_verdict(run.evaluations), skill_verdict(summary)],
        criteria=success_criteria(summary),
        warnings=run.warnings,
        fans=[(fan, Markup(charts.fan_chart(fan))) for fan in run.fans],
        left_fans=len(run.records) - len(run.fans),
        crps_course=Markup(charts.crps_course(run.records)),
        squared_course=None if squared is None else Markup(squared),
        drift_horizons=", ".join(map(horizon_name, still)),
        pit=Markup(charts.pit_chart(run.records)),
        reliability=Markup(charts.reliability_chart(run.records)),
        horizons=[*map(horizon_name, (*summary.horizons, ALL_HORIZONS))],
        crps_rows={
            baseline_name(name, summary): row
            for name, row in _rows(summary.crps, lambda each: f"{each.value:.4f}").items()
        },
        r2_rows=_rows(summary.r2, lambda each: f"{each.value:+.4f} ± {each.error:.4f}"),
        coverage_rows=_rows(summary.coverage, lambda each: f"{each.value:.1%} ± {each.error:.1%}"),
        cells={symbol: [cell for cell in summary.cells if cell.symbol == symbol] for symbol in summary.symbols},
        cell_classes={SKILL: "good", NONE: "", WORSE: "bad"},
        evaluations=[
            (each, skill_line(each), [_score_row(score, each) for score in each.scores]) for each in run.evaluations
        ],
        data=run.data,
        settings=run.settings,
        samples=summary.samples,
    )


def _rows(pooled: Sequence[Pooled], shown: Any) -> dict[str, list[tuple[str, str, str]]]:
    """Text, class and mark of each figure, by the name of its row."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for each in pooled:
        mark = significance_mark(each)
        rows.setdefault(each.name, []).append((shown(each), {"*": "good", "!": "bad", "": ""}[mark], mark))
    return rows


def plain_verdict(summary: Summary) -> list[str]:
    """What a reader who reads no table should know, in plain sentences."""
    found = {(each.name, each.horizon): each for each in summary.crps}
    sentences = [_against(found["random walk", ALL_HORIZONS], "a random walk with constant volatility")]
    walks = [found[name, ALL_HORIZONS] for name in VOLATILITY_WALKS if (name, ALL_HORIZONS) in found]
    words = {"ewma walk": "a random walk with EWMA volatility", "garch walk": "a random walk with GARCH volatility"}
    sentences += [_against(walk, words[walk.name]) for walk in walks]
    drift = [each for each in summary.r2 if each.name == "drift"]
    skilled = [each for each in drift if each.p_value is not None and each.p_value * len(drift) < SIGNIFICANCE]
    if skilled:
        sentences.append(
            "Its expected return is better than the drift at "
            + ", ".join(f"{each.horizon}d (R² {each.value:+.4f})" for each in skilled)
            + "."
        )
    elif all(each.value == 0 for each in drift):
        sentences.append("Its expected return is the drift: nothing else was worth believing.")
    else:
        sentences.append("Its expected return has no skill beyond the drift: read the intervals, not the mean.")
    wide = next(each for each in summary.coverage if (each.name, each.horizon) == ("80%", ALL_HORIZONS))
    sentences.append(f"Its 80% intervals held {wide.value:.1%} (± {wide.error:.1%}) of the returns.")
    return sentences


def _against(one: Pooled, whom: str) -> str:
    change = abs(1 - one.value)
    if one.p_value is not None and one.p_value < SIGNIFICANCE:
        return f"Its distributions are better than those of {whom}: {change:.1%} less CRPS (p {one.p_value:.2g})."
    if one.p_value is not None and one.error > 0 and one.p_value > 1 - SIGNIFICANCE:
        return f"Its distributions are worse than those of {whom}: {change:.1%} more CRPS."
    more = "less" if one.value < 1 else "more"
    return f"Its distributions can't be told from those of {whom}: {change:.1%} {more} CRPS, within chance."


def _score_row(score: Score, evaluation: Evaluation) -> tuple[str, list[tuple[str, str]]]:
    """The forecaster, and the texts and classes of its row; the last cell says whether the model's CRPS is lower."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, f"z{form}")

    def with_t(value: float | None, t: float | None) -> str:
        return "–" if value is None or t is None else f"{value:+.3f} ({t:+.1f})"

    comparison = next(each for each in evaluation.comparisons if each.horizon == score.horizon)
    against, mark, kind = comparison.against.get(score.forecaster), "", ""
    if against is not None:
        mark = f"{against.crps_ratio - 1:+.1%}"
        if against.crps_ratio != 1.0 and against.crps_p_value < SIGNIFICANCE:
            mark, kind = f"{mark} *", "good"
        elif against.crps_ratio != 1.0 and against.crps_p_value > 1 - SIGNIFICANCE:
            mark, kind = f"{mark} !", "bad"
    texts = [
        f"{score.horizon}d",
        score.forecaster,
        number(score.r2_random_walk, ".4f"),
        number(score.r2_drift, ".4f"),
        number(score.mase, ".3f"),
        number(100 * score.smape, ".2f"),
        number(score.hit_rate, ".1%"),
        number(score.up_rate, ".1%"),
        number(score.pesaran_timmermann_p_value, ".2f"),
        with_t(score.ic, score.ic_t),
        with_t(score.rank_ic, score.rank_ic_t),
        number(100 * score.crps, ".3f"),
        number(100 * score.pinball, ".3f"),
        "/".join(f"{100 * share:.0f}" for share in (score.coverage_50, score.coverage_80, score.coverage_95)),
        number(score.pit_berkowitz_p_value, ".2f"),
    ]
    return score.forecaster, [*((text, "") for text in texts), (mark, kind)]
