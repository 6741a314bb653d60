"""An answer for every request that can have one, and it says where it comes from."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from tests.forecast.walks import random_walk

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.ab import assign
from mambakit.forecast.artefact import save_forecaster
from mambakit.forecast.dataset import feature_engineer
from mambakit.forecast.prediction_log import PredictionLog
from mambakit.forecast.predictor import Forecast, MambaPredictor
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.registry import ModelRegistry
from mambakit.forecast.service import ForecastService, clean_series
from mambakit.forecast.train import TrainedForecaster

SERIES = random_walk(memory=0.7)


@pytest.fixture(scope="session")
def stored(trained: TrainedForecaster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Production v1 and challenger v2 of WALK."""
    registry = ModelRegistry(tmp_path_factory.mktemp("stored"))
    for alias in ("production", "challenger"):
        registry.store("WALK", lambda folder, version: save_forecaster(folder, trained, version), alias)
    return registry.root


@pytest.fixture
def models(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "models"))


def changed(**columns: np.ndarray) -> PriceSeries:
    return replace(SERIES, **columns)


def with_price(row: int, price: float) -> PriceSeries:
    prices = SERIES.prices.copy()
    prices[row] = price
    return changed(prices=prices)


def test_a_sound_model_answers_as_the_predictor_does(models: Path) -> None:
    answer = ForecastService(models).serve("WALK", SERIES)
    expected = MambaPredictor(["WALK"], models=models).forecast(SERIES)
    assert (answer.source, answer.reason, answer.arm) == ("v1", None, "production")
    for field in fields(Forecast):
        np.testing.assert_array_equal(getattr(answer, field.name), getattr(expected, field.name))


def test_without_a_model_the_fallback_answers_and_says_why(tmp_path: Path) -> None:
    answer = ForecastService(tmp_path).serve("WALK", SERIES)
    assert (answer.source, answer.arm) == ("fallback", "fallback")
    assert "no model of WALK" in str(answer.reason)
    assert list(answer.prices()) == ["1d", "5d", "10d", "30d"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checksums.json"])
def test_a_damaged_model_does_not_answer(models: Path, name: str) -> None:
    (models / "WALK" / "v1" / name).write_bytes(b"{}")
    answer = ForecastService(models).serve("WALK", SERIES)
    assert answer.source == "fallback"
    assert name in str(answer.reason) or "checksums.json does not list" in str(answer.reason)
    with pytest.raises(ArtefactError):
        ForecastService(models, fallback=False).serve("WALK", SERIES)


def test_a_damaged_alias_file_does_not_stop_the_service(models: Path) -> None:
    (models / "WALK" / "aliases.json").write_text("[")
    assert "aliases.json" in str(ForecastService(models).serve("WALK", SERIES).reason)


def test_a_model_is_stale_when_prices_go_on_for_longer_than_allowed(models: Path) -> None:
    later = changed(dates=SERIES.dates + 28)  # whole weeks: no price falls on a Sunday
    answer = ForecastService(models, max_age_days=27).serve("WALK", later)
    assert answer.source == "fallback"
    assert f"WALK v1 is stale: its data ends on {SERIES.dates[-1]}, 28 days before" in str(answer.reason)
    for allowed in (28, None):
        assert ForecastService(models, max_age_days=allowed).serve("WALK", later).source == "v1"
    with pytest.raises(ArtefactError, match="stale"):
        ForecastService(models, max_age_days=27, fallback=False).serve("WALK", later)


@pytest.mark.parametrize("price", [np.nan, np.inf, 0.0, -3.0])
def test_a_bad_price_among_those_that_the_model_reads_is_named(models: Path, price: float) -> None:
    answer = ForecastService(models).serve("WALK", with_price(-10, price))
    assert answer.source == "fallback"
    assert "1 is missing, not positive or out of order, the first on " + str(SERIES.dates[-10]) in str(answer.reason)
    with pytest.raises(DataError, match="of the last 120 prices"):
        ForecastService(models, fallback=False).serve("WALK", with_price(-10, price))


def test_missing_prices_at_the_end_move_the_forecast_to_the_last_usable_day(models: Path) -> None:
    prices = SERIES.prices.copy()
    prices[-3:] = np.nan
    answer = ForecastService(models).serve("WALK", changed(prices=prices))
    assert "prices of the last 3 days are missing" in str(answer.reason)
    assert answer.as_of == SERIES.dates[-4]
    assert answer.current_price == SERIES.prices[-4]


def test_bad_prices_before_those_that_the_model_reads_are_left_out_and_mentioned(models: Path) -> None:
    answer = ForecastService(models).serve("WALK", with_price(20, np.nan))
    assert answer.source == "v1"
    assert answer.reason == "1 of 460 prices are missing, not positive or out of order, and were left out"


def test_the_first_price_that_the_model_reads_is_where_bad_ones_begin_to_matter(
    models: Path, trained: TrainedForecaster
) -> None:
    config = trained.prepared.config
    window = feature_engineer(config).warm_up + config.sequence_length
    service = ForecastService(models)
    assert service.serve("WALK", with_price(-window, np.nan)).source == "fallback"
    assert service.serve("WALK", with_price(-window - 1, np.nan)).source == "v1"


def test_a_history_too_short_for_the_model_is_enough_for_the_fallback(models: Path) -> None:
    answer = ForecastService(models).serve("WALK", SERIES.last(30))
    assert answer.source == "fallback"
    assert "30 days of prices are too few, at least 120" in str(answer.reason)


def test_days_out_of_order_are_sorted_for_the_fallback(models: Path) -> None:
    order = np.arange(len(SERIES))
    order[[-5, -2]] = order[[-2, -5]]
    answer = ForecastService(models).serve(
        "WALK", PriceSeries("WALK", SERIES.dates[order], SERIES.prices[order], SERIES.volumes[order])
    )
    assert answer.source == "fallback"
    assert "out of order" in str(answer.reason)
    assert answer.as_of == SERIES.dates[-1]
    assert answer.current_price == SERIES.prices[-1]


def test_of_several_entries_of_a_day_the_last_counts() -> None:
    clean = clean_series(
        PriceSeries(
            "WALK",
            np.array(["2020-01-02", "2020-01-03", "2020-01-03"], dtype="datetime64[D]"),
            np.array([1.0, 2.0, 3.0]),
            np.array([1.0, np.nan, -1.0]),
        )
    )
    assert clean.series.prices.tolist() == [1.0, 3.0]
    assert clean.series.volumes.tolist() == [1.0, 0.0]
    assert clean.bad.tolist() == [False, False, True]
    assert clean.bad_volume.tolist() == [False, True, True]


@pytest.mark.parametrize("prices", [[], [np.nan, 5.0], [-1.0, np.nan]])
def test_without_two_usable_prices_there_is_no_answer(models: Path, prices: list[float]) -> None:
    count = len([price for price in prices if price > 0])
    with pytest.raises(DataError, match=f"WALK: {count} usable price"):
        ForecastService(models).serve("WALK", np.array(prices))


def test_a_version_that_was_named_and_is_missing_is_an_error_in_any_case(models: Path) -> None:
    with pytest.raises(ArtefactError, match="no version 'v9'; it has v1, v2"):
        ForecastService(models, use="v9").serve("WALK", SERIES)


@pytest.mark.parametrize("price", [0.0, -1.0, np.nan, np.inf])
def test_a_wrong_current_price_is_an_error_in_any_case(models: Path, price: float) -> None:
    with pytest.raises(DataError, match="current_price must be positive and finite"):
        ForecastService(models).serve("WALK", SERIES, price)


def test_bare_prices_are_served_and_never_stale_but_not_logged(models: Path, tmp_path: Path) -> None:
    answer = ForecastService(models, max_age_days=0).serve("WALK", SERIES.prices, current_price=100.0)
    assert answer.source == "v1"
    assert answer.current_price == 100.0
    with pytest.raises(DataError, match="a log needs dates"):
        ForecastService(models, log=PredictionLog(tmp_path / "log")).serve("WALK", SERIES.prices)


def test_a_promotion_takes_effect_with_the_next_request(models: Path) -> None:
    service = ForecastService(models)
    assert service.serve("WALK", SERIES).source == "v1"
    ModelRegistry(models).promote("WALK")
    assert service.serve("WALK", SERIES).source == "v2"
    ModelRegistry(models).roll_back("WALK")
    assert service.serve("WALK", SERIES).source == "v1"


def test_both_arms_are_logged_and_one_is_shown(models: Path, tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "log.sqlite")
    service = ForecastService(models, log=log, challenger_share=0.5)
    keys = {arm: next(str(n) for n in range(100) if assign(str(n), 0.5) == arm) for arm in ("production", "challenger")}
    assert service.serve("WALK", SERIES, key=keys["challenger"]).source == "v2"
    frame = log.frame().groupby("version")[["shown", "arm"]].first()
    assert frame.arm.to_dict() == {"v1": "production", "v2": "challenger"}
    assert frame.shown.to_dict() == {"v1": False, "v2": True}
    assert service.serve("WALK", SERIES, key=keys["production"]).source == "v1"
    assert log.frame().shown.all()
    assert len(log.frame()) == 2 * 4


def test_without_a_challenger_production_answers_and_says_so(models: Path) -> None:
    ModelRegistry(models).challenge("WALK", None)
    answer = ForecastService(models, challenger_share=1.0).serve("WALK", SERIES)
    assert (answer.source, answer.arm) == ("v1", "production")
    assert "challenger can't answer" in str(answer.reason)


def test_where_production_is_damaged_the_challenger_answers(models: Path) -> None:
    (models / "WALK" / "v1" / "model.safetensors").unlink()
    answer = ForecastService(models, challenger_share=0.0001).serve("WALK", SERIES)
    assert (answer.source, answer.arm) == ("v2", "challenger")
    assert "production can't answer" in str(answer.reason)
    assert "model.safetensors is missing" in str(answer.reason)


def test_a_challenger_beside_a_named_version_is_refused(models: Path) -> None:
    with pytest.raises(DataError, match="beside production, not beside 'v2'"):
        ForecastService(models, use="v2", challenger_share=0.5)


def test_the_fallback_is_logged_with_its_reason(models: Path, tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "log.sqlite")
    ForecastService(models, log=log).serve("WALK", SERIES.last(30))
    row = log.frame().iloc[0]
    assert (row.version, row.arm) == ("fallback", "fallback")
    assert "too few" in row.reason


def test_a_log_that_cannot_be_written_costs_no_forecast(models: Path, tmp_path: Path) -> None:
    (tmp_path / "log.sqlite").write_text("not a database, and long enough to be read as one")
    answer = ForecastService(models, log=PredictionLog(tmp_path / "log.sqlite")).serve("WALK", SERIES)
    assert answer.source == "v1"
    assert "file is not a database" in str(answer.unlogged)


def test_a_sound_answer_is_logged_with_the_features_of_its_last_day(
    models: Path, tmp_path: Path, trained: TrainedForecaster
) -> None:
    log = PredictionLog(tmp_path / "log.sqlite")
    service = ForecastService(models, log=log)
    assert service.serve("WALK", SERIES).unlogged is None
    logged = log.forecasts("WALK", "v1", service.load("WALK").metadata["training_date"])
    scaled = service.load("WALK").scaler.transform(logged.features)
    np.testing.assert_allclose(scaled[0], trained.prepared.features[-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logged.volatility[0], trained.prepared.volatility[-1])
