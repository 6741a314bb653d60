"""`mambakit forecast monitor` and `mambakit forecast ab`: what became of the forecasts that were logged."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambakit.cli.forecast.options import Source

if TYPE_CHECKING:
    from rich.table import Table

    from mambakit.forecast.ab import SequentialResult
    from mambakit.forecast.artefact import SavedForecaster
    from mambakit.forecast.monitor import MonitorReport
    from mambakit.forecast.prediction_log import PredictionLog
    from mambakit.forecast.registry import ModelRegistry

DECAYED = 3  # exit status of `monitor --check`

MONITOR_EXAMPLES = """
Try it at once, on forecasts of the test part made day by day:

  mambakit forecast monitor AAPL --replay

Every night, from cron; status 3 tells of decay:

  mambakit forecast monitor --check
"""
AB_EXAMPLES = """
Choose a challenger, and compare it with production on the test part:

  mambakit forecast models challenge AAPL v2
  mambakit forecast ab AAPL --replay
"""

_Models = Annotated[Path, typer.Option(help="Folder with the models.")]
_Log = Annotated[Path | None, typer.Option(help="Log of predictions; MODELS/predictions.sqlite by default.")]
_Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
_Replay = Annotated[
    bool, typer.Option("--replay", help="First log the forecast of every day since the test part began.")
]


def monitor(
    symbols: Annotated[list[str] | None, typer.Argument(metavar="[SYMBOL]...", help="All with models if none.")] = None,
    models: _Models = Path("models"),
    log: _Log = None,
    use: Annotated[str, typer.Option(help="A version such as v1, or an alias.")] = "production",
    source: Source = "builtin",
    window: Annotated[int, typer.Option(min=30, help="Forecasts to look at, the latest.")] = 250,
    replay: _Replay = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with status 3 where a model has decayed.")] = False,
    as_json: _Json = False,
    export: Annotated[Path | None, typer.Option(help="Also write the log to this .parquet or .csv file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the verdicts.")] = False,
) -> None:
    """Show rolling accuracy, calibration and drift of inputs, and say whether a model has decayed.

    Joins the outcomes of logged predictions first, as far as prices have arrived. A model that can't be read is named,
    stops no other, and makes the exit status 1.
    """
    from mambakit.errors import ArtefactError, MambakitError
    from mambakit.forecast.monitor import Thresholds
    from mambakit.forecast.monitor import monitor as judge
    from mambakit.forecast.reference import load_reference
    from mambakit.forecast.registry import ModelRegistry

    registry, predictions = ModelRegistry(models), _open_log(models, log)
    names = symbols or registry.symbols()
    if not names:
        raise ArtefactError(f"no models in {models}; train one with: mambakit forecast train --symbols AAPL")
    reports, failed = [], False
    for name in names:
        try:
            version, saved = _loaded(registry, name, use)
            note = _join(saved, version, "production", predictions, replay, source)
            logged = predictions.forecasts(saved.symbol, version, saved.metadata["training_date"])
            reference = load_reference(registry.folder(saved.symbol) / version)
        except MambakitError as error:
            failed = True
            print(f"mambakit: error: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        report = judge(saved.symbol, version, logged, reference, Thresholds(window=window))
        reports.append(report)
        if not as_json:
            _print_report(report, note, quiet)
    if as_json:
        print(json.dumps([_report_as_json(report) for report in reports], indent=2))
    if export is not None:
        predictions.export(export)
    if failed:
        raise typer.Exit(1)
    if check and any(report.decayed for report in reports):
        raise typer.Exit(DECAYED)


def ab(
    symbols: Annotated[
        list[str] | None, typer.Argument(metavar="[SYMBOL]...", help="All with a challenger if none.")
    ] = None,
    models: _Models = Path("models"),
    log: _Log = None,
    source: Source = "builtin",
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.5, help="Chance of a wrong winner, ever.")] = 0.05,
    replay: _Replay = False,
    as_json: _Json = False,
) -> None:
    """Compare production with its challenger on the days on which both forecast, and say which is better.

    The bounds hold on all days at once: look as often as you like, and stop when a winner is named.
    """
    from mambakit.errors import ArtefactError
    from mambakit.forecast.ab import compare_arms
    from mambakit.forecast.registry import ALIASES, CHALLENGER, ModelRegistry

    registry, predictions = ModelRegistry(models), _open_log(models, log)
    names = symbols or [name for name in registry.symbols() if CHALLENGER in registry.aliases(name)]
    if not names:
        raise ArtefactError(
            f"no challenger in {models}; choose one with: mambakit forecast models challenge SYMBOL VERSION"
        )
    answers = []
    for name in names:
        arms = []
        for alias in ALIASES:
            version, saved = _loaded(registry, name, alias)
            _join(saved, version, alias, predictions, replay, source)
            arms.append((version, predictions.forecasts(saved.symbol, version, saved.metadata["training_date"])))
        (ours, production), (theirs, challenger) = arms
        results = compare_arms(production, challenger, alpha)
        answers.append({"symbol": saved.symbol, "production": ours, "challenger": theirs, "results": results})
        if not as_json:
            _print_comparison(saved.symbol, ours, theirs, results, alpha)
    if as_json:
        print(json.dumps([_answer_as_json(answer) for answer in answers], indent=2))


def _open_log(models: Path, log: Path | None) -> "PredictionLog":
    from mambakit.forecast.prediction_log import LOG_NAME, PredictionLog

    return PredictionLog(models / LOG_NAME if log is None else log)


def _loaded(registry: "ModelRegistry", name: str, use: str) -> "tuple[str, SavedForecaster]":
    """A symbol's version and model."""
    from mambakit.forecast.artefact import load_forecaster

    folder = registry.find(name, use)
    return folder.name, load_forecaster(folder)


def _join(
    saved: "SavedForecaster", version: str, arm: str, predictions: "PredictionLog", replay: bool, source: str
) -> str:
    """Bring outcomes into the log; return what was found, in words."""
    from mambakit.forecast.prices import fetch_historical_prices
    from mambakit.forecast.replay import replay as forecast_again

    series = fetch_historical_prices([saved.symbol], source=source)[saved.symbol]
    made = forecast_again(saved, series, predictions, version, arm) if replay else 0
    joined = predictions.join_outcomes(series)
    words = [f"{made} days replayed"] if replay else []
    words += [f"{joined.joined} outcomes joined", f"{joined.waiting} waiting for prices after {series.dates[-1]}"]
    if joined.unmatched:
        words.append(f"{joined.unmatched} from days that these prices, since {series.dates[0]}, do not have")
    return ", ".join(words)


def _print_report(report: "MonitorReport", note: str, quiet: bool) -> None:
    from mambakit.cli.console import console

    if not quiet:
        print(f"{report.symbol} {report.version}: {note}")
        if report.horizons:
            console().print(_accuracy_table(report))
        if any(row.coverages for row in report.horizons):
            console().print(_calibration_table(report))
        if report.inputs:
            shifted = sum(drift.shifted for drift in report.inputs)
            furthest = ", ".join(f"{each.name} {each.psi:.2f} (usual {each.usual:.2f})" for each in report.inputs[:3])
            print(f"Inputs: {shifted} of {len(report.inputs)} have shifted; furthest by PSI: {furthest}")
        for unknown in report.unknown:
            print(f"Not judged: {unknown}")
    print(report.sentence)


def _accuracy_table(report: "MonitorReport") -> "Table":
    headings = ("horizon", "outcomes", "R² vs drift", "direction", "up-rate", "loss", "promised", "p of a higher loss")
    rows = [
        (
            f"{row.horizon}d",
            str(row.outcomes),
            _number(row.r2_drift, ".4f"),
            _number(row.hit_rate, ".1%"),
            _number(row.up_rate, ".1%"),
            _number(row.loss, ".3f"),
            _number(row.promised_loss, ".3f"),
            _number(row.loss_p_value, ".2f"),
        )
        for row in report.horizons
    ]
    return _table(headings, rows)


def _calibration_table(report: "MonitorReport") -> "Table":
    headings = ("horizon", "interval", "held", "chance explains", "test part", "p")
    rows = [
        (
            f"{row.horizon}d",
            f"{each.level:.0%}",
            f"{each.share:.1%}",
            f"{each.low:.1%} .. {each.high:.1%}",
            _number(each.promised, ".1%"),
            f"{each.p_value:.2f}",
        )
        for row in report.horizons
        for each in row.coverages
    ]
    return _table(headings, rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _print_comparison(
    symbol: str, production: str, challenger: str, results: "list[SequentialResult]", alpha: float
) -> None:
    from mambakit.cli.console import console

    headings = ("horizon", "days", "lead of the challenger", "bounds at all times", "better", "since")
    rows = []
    for each in results:
        started = each.days >= each.needed
        rows.append(
            (
                f"{each.horizon}d",
                str(each.days),
                _number(each.mean, ".5f") if each.days else "-",
                f"{each.lower:+.5f} .. {each.upper:+.5f}" if started else f"from {each.needed} days on",
                each.winner or ("not known yet" if started else "too early"),
                str(each.decided_on or "-"),
            )
        )
    print(f"{symbol}: production {production}, challenger {challenger}")
    console().print(_table(headings, rows))
    ahead = {
        name: [f"{each.horizon}d" for each in results if each.winner == name] for name in ("production", "challenger")
    }
    if ahead["challenger"] and not ahead["production"]:
        print(
            f"{symbol}: the challenger is better at {', '.join(ahead['challenger'])} (chance of a wrong winner, ever: "
            f"{alpha:.0%}); promote it with: mambakit forecast models promote {symbol}"
        )
    elif ahead["production"] and not ahead["challenger"]:
        print(
            f"{symbol}: production is better at {', '.join(ahead['production'])}; withdraw the challenger with: "
            f"mambakit forecast models challenge {symbol} --withdraw"
        )
    elif ahead["production"]:
        print(
            f"{symbol}: production is better at {', '.join(ahead['production'])}, "
            f"the challenger at {', '.join(ahead['challenger'])}"
        )
    else:
        print(f"{symbol}: no winner yet; both go on")


def _report_as_json(report: "MonitorReport") -> dict[str, object]:
    return {**asdict(report), "decayed": report.decayed, "sentence": report.sentence}


def _answer_as_json(answer: dict) -> dict[str, object]:
    def plain(result: "SequentialResult") -> dict[str, object]:
        values = asdict(result)
        decided = result.decided_on
        values["decided_on"] = None if decided is None else str(decided)
        return {name: None if value != value else value for name, value in values.items()}  # JSON has no NaN

    return {**answer, "results": [plain(result) for result in answer["results"]]}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, f"z{form}")
