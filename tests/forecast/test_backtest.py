"""The walk-forward backtest: its splits, that nothing leaks, and that it can be stored and read back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tests.forecast.walks import random_walk

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.backtest import Backtest, WalkForward, backtest, walk_forward
from mambakit.forecast.baselines import BASELINES
from mambakit.forecast.config import SEQUENCE_TRAINING, MambaConfig
from mambakit.forecast.conformal import adaptive_predictions
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.evaluation import MODEL, UNCALIBRATED

CONFIG = MambaConfig(d_model=4, d_state=2, num_layers=1, sequence_length=10, prediction_horizons=(1, 5))
TRAINING = SEQUENCE_TRAINING.model_copy(update={"epochs": 2, "learning_rate": 1e-2, "batch_size": 64})
PLAN = WalkForward(folds=3, step=20)
ORIGINS = np.arange(100, 500)


@pytest.fixture(scope="module")
def series():
    return random_walk(days=420, memory=0.5, symbol="AAA")


@pytest.fixture(scope="module")
def result(series) -> Backtest:
    short = random_walk(days=50, symbol="SHORT")
    other = random_walk(days=400, seed=1, symbol="BBB")
    return backtest([series, short, other], CONFIG, TRAINING, PLAN, baselines=BASELINES)


def test_the_tests_follow_one_another_to_the_end() -> None:
    splits = list(walk_forward(ORIGINS, 5, WalkForward(folds=4, step=30)))
    np.testing.assert_array_equal(np.concatenate([split.test for split in splits]), np.arange(280, 400))
    assert [len(split.test) for split in splits] == [30] * 4


@pytest.mark.parametrize("embargo", [0, 7])
def test_no_target_reaches_the_next_part(embargo: int) -> None:
    for split in walk_forward(ORIGINS, 5, WalkForward(folds=4, step=30, embargo=embargo)):
        for earlier, later in ((split.training, split.validation), (split.validation, split.test)):
            last_target = ORIGINS[earlier[-1]] + 5
            assert last_target + embargo == ORIGINS[later[0]] - 1  # the first day left out is the first that must be


def test_an_expanding_window_keeps_the_beginning_and_a_rolling_one_its_length() -> None:
    expanding = list(walk_forward(ORIGINS, 5, WalkForward(folds=3, step=30)))
    assert all(split.training[0] == 0 for split in expanding)
    rolling = list(walk_forward(ORIGINS, 5, WalkForward(folds=3, step=30, window=200)))
    assert [split.test[0] - split.training[0] for split in rolling] == [200] * 3


def test_one_fit_may_serve_several_folds() -> None:
    splits = list(walk_forward(ORIGINS, 5, WalkForward(folds=5, step=20, refit_every=2)))
    assert [len(split.test) for split in splits] == [40, 40, 20]


def test_too_little_to_learn_from_is_refused_with_a_way_out() -> None:
    for plan in (WalkForward(folds=20, step=20), WalkForward(window=100), WalkForward(folds=7, step=60)):
        with pytest.raises(DataError, match="take fewer or shorter folds, or a longer window"):
            list(walk_forward(ORIGINS, 5, plan))


def test_a_plan_without_folds_is_refused() -> None:
    with pytest.raises(ValidationError, match="folds"):
        WalkForward(folds=0)


def test_a_fold_is_scaled_by_its_own_training_part(series) -> None:
    origins = prepare_series(series, CONFIG).origins
    first, last = (
        prepare_series(series, CONFIG, split=split)
        for split in list(walk_forward(origins, 5, WalkForward(folds=2, step=40, window=180)))
    )
    assert not np.allclose(first.scaler.mean, last.scaler.mean)
    known = last.split.training
    rows = last.features[last.origins[known[0]] - CONFIG.sequence_length + 1 : last.origins[known[-1]] + 1]
    np.testing.assert_allclose(rows.mean(axis=0), 0.0, atol=0.05)  # not exactly: outliers are cut


def test_every_test_day_is_forecast_once_by_everyone(result, series) -> None:
    record = result.records[0]
    assert record.fold.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    last = len(series) - 1 - 5
    np.testing.assert_array_equal(record.dates, series.dates[last - 59 : last + 1])
    assert list(record.predictions) == [MODEL, *(n for n in record.predictions if n in BASELINES), UNCALIBRATED]
    assert set(BASELINES) < set(record.predictions)


def test_what_came_is_what_the_prices_did(result, series) -> None:
    record = result.records[0]
    row = int(np.searchsorted(series.dates, record.dates[7]))
    assert record.actual[7, 1] == pytest.approx(np.log(series.prices[row + 5] / series.prices[row]))


def test_each_fold_learns_from_more_than_the_one_before(result) -> None:
    record = result.records[0]
    drifts = [record.predictions["drift"].mean[record.fold == fold][0, 0] for fold in range(3)]
    assert len(set(drifts)) == 3


def test_no_forecast_knows_what_came_after_its_day(result, series) -> None:
    record = result.records[0]
    day = int(np.searchsorted(series.dates, record.dates[30]))  # within the second fold
    prices = series.prices.copy()
    prices[day + 1 :] *= np.exp(np.linspace(0.1, 1.0, len(prices) - day - 1))
    changed = backtest([replace(series, prices=prices)], CONFIG, TRAINING, PLAN, baselines=BASELINES).records[0]
    for name, predictions in record.predictions.items():
        np.testing.assert_allclose(
            changed.predictions[name].quantiles[:31], predictions.quantiles[:31], rtol=1e-6, atol=1e-9
        )
    later = changed.predictions["ewma walk"].quantiles[31:]
    assert not np.allclose(later, record.predictions["ewma walk"].quantiles[31:])


def test_a_symbol_that_fails_is_left_out_with_its_reason(result) -> None:
    assert [record.symbol for record in result.records] == ["AAA", "BBB"]
    assert list(result.failures) == ["SHORT"]
    assert "50 days" in result.failures["SHORT"]


def test_where_every_symbol_fails_the_reason_is_raised() -> None:
    with pytest.raises(DataError, match="no symbol could be backtested: SHORT: 50 days"):
        backtest([random_walk(days=50, symbol="SHORT")], CONFIG, TRAINING, PLAN)


def test_an_unknown_baseline_costs_no_training(series) -> None:
    with pytest.raises(DataError, match="no baseline is called prophet"):
        backtest([series], CONFIG, TRAINING, PLAN, baselines=["prophet"])


def test_calibration_moves_the_quantiles_and_not_the_mean(result) -> None:
    record = result.records[0]
    np.testing.assert_array_equal(record.predictions[MODEL].mean, record.predictions[UNCALIBRATED].mean)
    assert not np.allclose(record.predictions[MODEL].quantiles, record.predictions[UNCALIBRATED].quantiles)
    assert all(score.forecaster != UNCALIBRATED for score in result.evaluations[0].scores)


def test_adaptive_calibration_goes_on_from_fold_to_fold(series) -> None:
    record = backtest([series], CONFIG, TRAINING, PLAN, baselines=[], calibration="adaptive").records[0]
    expected = adaptive_predictions(record, UNCALIBRATED)
    np.testing.assert_array_equal(record.predictions[MODEL].quantiles, expected.quantiles)


def test_progress_counts_the_fits_of_each_symbol(series) -> None:
    seen: list[tuple[str, int, int]] = []
    backtest(
        [series],
        CONFIG,
        TRAINING,
        PLAN.model_copy(update={"refit_every": 2}),
        baselines=[],
        calibration="none",
        on_fit=lambda *fit: seen.append(fit),
    )
    assert seen == [("AAA", 1, 2), ("AAA", 2, 2)]


def test_a_backtest_survives_the_disk(result, tmp_path: Path) -> None:
    result.save(tmp_path / "run")
    read = Backtest.load(tmp_path / "run")
    assert read.evaluations == result.evaluations
    assert read.summary == result.summary
    assert (read.settings, read.data, read.failures) == (result.settings, result.data, result.failures)
    np.testing.assert_allclose(
        read.records[1].predictions[MODEL].quantiles, result.records[1].predictions[MODEL].quantiles, rtol=1e-6
    )


def test_a_changed_backtest_and_a_folder_that_is_none_are_refused(result, tmp_path: Path) -> None:
    result.save(tmp_path / "run")
    with (tmp_path / "run" / "backtest.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ArtefactError, match=r"backtest\.json"):
        Backtest.load(tmp_path / "run")
    with pytest.raises(ArtefactError):
        Backtest.load(tmp_path)


def test_the_dates_of_every_part_are_kept(result) -> None:
    folds = result.data["AAA"]["folds"]
    assert len(folds) == 3
    assert folds[0]["training"][1] < folds[0]["validation"][0] < folds[0]["validation"][1] < folds[0]["test"][0]
