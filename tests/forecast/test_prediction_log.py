"""Every forecast is logged once, waits for its outcome, and survives whoever writes beside it."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.forecast.walks import random_walk

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.fallback import FallbackForecaster
from mambakit.forecast.prediction_log import LogEntry, PredictionLog
from mambakit.forecast.predictor import Forecast
from mambakit.forecast.prices import PriceSeries

SERIES = random_walk()


def forecast_of(day: int, version: str = "v1") -> Forecast:
    """A forecast as of the given row of the series."""
    return replace(FallbackForecaster((1, 5)).forecast(_until(SERIES, day)), version=version)


def _until(series: PriceSeries, day: int) -> PriceSeries:
    return PriceSeries(series.symbol, series.dates[: day + 1], series.prices[: day + 1], series.volumes[: day + 1])


@pytest.fixture
def log(tmp_path: Path) -> PredictionLog:
    return PredictionLog(tmp_path / "predictions.sqlite")


def test_an_outcome_is_the_return_to_the_nth_trading_day_of_the_series(log: PredictionLog) -> None:
    log.append([LogEntry(forecast_of(100))])
    gap = np.delete(np.arange(len(SERIES)), 103)  # a holiday: the calendar goes on, trading does not
    series = PriceSeries("WALK", SERIES.dates[gap], SERIES.prices[gap], SERIES.volumes[gap])
    assert log.join_outcomes(_until(series, 104)) == (1, 1, 0)
    assert log.join_outcomes(_until(series, 105)) == (1, 0, 0)
    frame = log.frame().set_index("horizon")
    assert frame.outcome[1] == pytest.approx(np.log(SERIES.prices[101] / SERIES.prices[100]))
    assert frame.outcome[5] == pytest.approx(np.log(SERIES.prices[106] / SERIES.prices[100]))
    assert frame.outcome_day[5] == pd.Timestamp(SERIES.dates[106])


def test_outcomes_do_not_change_when_a_split_rescales_the_series(log: PredictionLog) -> None:
    log.append([LogEntry(forecast_of(100))])
    halved = PriceSeries("WALK", SERIES.dates, SERIES.prices / 2, SERIES.volumes)
    log.join_outcomes(halved)
    assert log.frame().outcome[0] == pytest.approx(np.log(SERIES.prices[101] / SERIES.prices[100]))


def test_outcomes_joined_twice_stay_as_they_are(log: PredictionLog) -> None:
    log.append([LogEntry(forecast_of(100))])
    log.join_outcomes(SERIES)
    before = log.frame()
    assert log.join_outcomes(PriceSeries("WALK", SERIES.dates, SERIES.prices**2, SERIES.volumes)) == (0, 0, 0)
    pd.testing.assert_frame_equal(log.frame(), before)


def test_a_day_that_the_series_lacks_is_counted_as_unmatched(log: PredictionLog) -> None:
    log.append([LogEntry(forecast_of(100))])
    later = PriceSeries("WALK", SERIES.dates[200:], SERIES.prices[200:], SERIES.volumes[200:])
    assert log.join_outcomes(later) == (0, 0, 2)


def test_a_missing_price_leaves_the_outcome_waiting(log: PredictionLog) -> None:
    log.append([LogEntry(forecast_of(100))])
    prices = SERIES.prices.copy()
    prices[101] = np.nan
    assert log.join_outcomes(PriceSeries("WALK", SERIES.dates, prices, SERIES.volumes)) == (1, 1, 0)


def test_one_forecast_is_counted_once_and_shown_once_it_was_shown(log: PredictionLog) -> None:
    entry = LogEntry(forecast_of(100), shown=False)
    assert log.append([entry, entry]) == 1
    assert log.append([replace(entry, shown=True)]) == 0
    frame = log.frame()
    assert len(frame) == 2
    assert frame.shown.all()


def test_models_of_one_name_trained_at_different_times_are_told_apart(log: PredictionLog) -> None:
    entries = [LogEntry(forecast_of(100), trained_at=year) for year in ("2025", "2026")]
    assert log.append(entries) == 2
    assert len(log.forecasts("WALK", "v1", "2026")) == 1
    assert len(log.forecasts("WALK", "v1", "2024")) == 0


def test_forecasts_come_back_as_they_were_logged(log: PredictionLog) -> None:
    features = np.array([0.123456789123, -4.0])
    forecasts = [forecast_of(day) for day in (102, 100, 101)]
    log.append(LogEntry(each, volatility=0.02, features=features) for each in forecasts)
    log.join_outcomes(_until(SERIES, 102))
    back = log.forecasts("WALK", "v1", "")
    assert back.as_of.tolist() == SERIES.dates[100:103].tolist()
    assert back.horizons == (1, 5)
    assert back.levels == QUANTILES
    np.testing.assert_allclose(back.mean[0], forecasts[1].mean)
    np.testing.assert_allclose(back.quantiles[2], forecasts[0].quantiles, rtol=1e-8)
    np.testing.assert_allclose(back.features[1], features, rtol=1e-8)
    assert np.isfinite(back.outcome).tolist() == [[True, False], [True, False], [False, False]]
    assert log.forecasts("WALK", "v1", "", last=1).as_of.tolist() == [SERIES.dates[102]]


def test_forecasts_without_features_are_no_obstacle(log: PredictionLog) -> None:
    log.append([LogEntry(forecast_of(100)), LogEntry(forecast_of(101), features=np.ones(3))])
    features = log.forecasts("WALK", "v1", "").features
    assert np.isnan(features[0]).all()
    assert features[1].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_log_is_exported_with_a_column_for_each_quantile(log: PredictionLog, tmp_path: Path, suffix: str) -> None:
    log.append([LogEntry(forecast_of(100))])
    assert log.export(tmp_path / f"log{suffix}") == 2
    read = pd.read_parquet if suffix == ".parquet" else pd.read_csv
    frame = read(tmp_path / f"log{suffix}")
    assert frame["q0.025"][1] == pytest.approx(forecast_of(100).quantiles[1, 0], rel=1e-8)


def test_an_export_of_another_kind_is_refused(log: PredictionLog, tmp_path: Path) -> None:
    log.append([LogEntry(forecast_of(100))])
    with pytest.raises(DataError, match=r"expected a name that ends in \.parquet or \.csv"):
        log.export(tmp_path / "log.xlsx")


def test_a_log_that_is_not_there_says_how_one_comes_about(log: PredictionLog) -> None:
    for read in (log.frame, lambda: log.join_outcomes(SERIES)):
        with pytest.raises(ArtefactError, match=r"no predictions in .*mambakit forecast predict"):
            read()
    assert not log.path.exists()


def test_a_damaged_log_is_named_and_left_alone(log: PredictionLog) -> None:
    log.path.write_text("not a database at all, but a text of some length")
    with pytest.raises(ArtefactError, match="file is not a database; move it aside"):
        log.append([LogEntry(forecast_of(100))])
    assert log.path.read_text().startswith("not a database")


def test_a_database_of_something_else_is_not_written_to(log: PredictionLog) -> None:
    connection = sqlite3.connect(log.path)
    connection.execute("CREATE TABLE other (a)")
    connection.commit()
    connection.close()
    with pytest.raises(ArtefactError, match=r"not a log of predictions .* choose another file with --log"):
        log.append([LogEntry(forecast_of(100))])


def test_all_of_an_append_is_written_or_nothing(log: PredictionLog) -> None:
    def entries():
        yield LogEntry(forecast_of(100))
        raise RuntimeError

    log.append([LogEntry(forecast_of(99))])
    with pytest.raises(RuntimeError):
        log.append(entries())
    assert len(log.frame()) == 2


def _append_days(path: Path, days: range, version: str) -> None:
    log = PredictionLog(path)
    for day in days:
        log.append([LogEntry(forecast_of(day, version))])


def test_two_processes_that_log_at_once_lose_nothing(log: PredictionLog) -> None:
    processes = multiprocessing.get_context("spawn")
    days = range(100, 115)
    writers = [processes.Process(target=_append_days, args=(log.path, days, name)) for name in ("v1", "v2")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    for version in ("v1", "v2"):
        assert len(log.forecasts("WALK", version, "")) == len(days)


def test_a_writer_killed_in_a_transaction_leaves_the_log_whole_and_open_to_others(log: PredictionLog) -> None:
    log.append([LogEntry(forecast_of(99))])
    code = (
        "import sys, time\n"
        "from mambakit.forecast.prediction_log import PredictionLog\n"
        "with PredictionLog(sys.argv[1])._writing() as connection:\n"
        "    connection.execute('DELETE FROM predictions')\n"
        "    print('deleted', flush=True)\n"
        "    time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(log.path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "deleted\n"
    assert len(log.frame()) == 2  # readers do not wait for it
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert log.append([LogEntry(forecast_of(100))]) == 1
    assert len(log.frame()) == 4
