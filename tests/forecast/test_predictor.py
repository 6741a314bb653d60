"""Serving: the stored model forecasts what the trained one did, and says what it is."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.artefact import SavedForecaster, load_forecaster, save_forecaster
from mambakit.forecast.config import QUANTILES, SEQUENCE_TRAINING
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.predictor import MambaPredictor, forecast_series
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.registry import ModelRegistry
from mambakit.forecast.train import train_prepared


def until(series: PriceSeries, day: int) -> PriceSeries:
    """The series as it was at the close of that day."""
    return PriceSeries(series.symbol, series.dates[: day + 1], series.prices[: day + 1], series.volumes[: day + 1])


@pytest.fixture(scope="session")
def models(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    ModelRegistry(root).store("WALK", lambda folder, version: save_forecaster(folder, trained, version))
    return root


def test_a_stored_model_forecasts_what_the_trained_one_did_on_the_same_day(trained, saved: SavedForecaster) -> None:
    prepared = trained.prepared
    for sample in (0, 17, -1):
        day = prepared.origins[prepared.split.test[sample]]
        forecast = forecast_series(saved, until(prepared.series, day))
        np.testing.assert_allclose(forecast.mean, trained.test.predictions["mamba"].mean[sample], rtol=1e-4, atol=1e-7)
        lower = forecast.quantiles[:, QUANTILES.index(0.1)]
        np.testing.assert_allclose(
            lower, trained.test.predictions["mamba"].interval(0.8)[0][sample], rtol=1e-4, atol=1e-7
        )


def test_loading_gives_back_every_weight(trained, saved: SavedForecaster) -> None:
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(saved.model.state_dict()[name], weight), name
    assert saved.evaluation == trained.evaluation
    assert saved.config == trained.prepared.config


def test_prices_are_the_current_price_times_exp_of_the_mean_return(trained, saved: SavedForecaster) -> None:
    forecast = forecast_series(saved, trained.prepared.series)
    assert list(forecast.prices()) == ["1d", "5d", "10d", "30d"]
    expected = trained.prepared.series.prices[-1] * np.exp(forecast.mean)
    np.testing.assert_allclose(list(forecast.prices().values()), expected)


def test_wider_intervals_hold_narrower_ones(trained, saved: SavedForecaster) -> None:
    forecast = forecast_series(saved, trained.prepared.series)
    for horizon in forecast.prices():
        bounds = [forecast.intervals(level)[horizon] for level in (0.5, 0.8, 0.95)]
        lowers, uppers = zip(*bounds, strict=True)
        assert list(lowers) == sorted(lowers, reverse=True)
        assert list(uppers) == sorted(uppers)
    with pytest.raises(DataError, match="level"):
        forecast.intervals(0.77)


def test_another_current_price_moves_prices_and_not_returns(trained, saved: SavedForecaster) -> None:
    series = trained.prepared.series
    ours, other = forecast_series(saved, series), forecast_series(saved, series, current_price=100.0)
    np.testing.assert_array_equal(ours.mean, other.mean)
    assert other.prices()["5d"] == pytest.approx(100 * ours.prices()["5d"] / series.prices[-1])
    with pytest.raises(DataError, match="current_price"):
        forecast_series(saved, series, current_price=-1.0)


def test_the_predictor_takes_bare_prices_as_well(trained, models: Path) -> None:
    predictor = MambaPredictor(["walk"], models=models)
    series = trained.prepared.series
    assert predictor.predict_now("WALK", series.prices) == predictor.predict_now("WALK", series)
    assert predictor.predict_now("WALK", series, current_price=series.prices[-1]) == predictor.predict_now(
        "WALK", series
    )


def test_the_predictor_serves_only_the_symbols_it_was_made_for(trained, models: Path) -> None:
    with pytest.raises(DataError, match="serves WALK, not AAPL"):
        MambaPredictor(["WALK"], models=models).predict_now("AAPL", trained.prepared.series.prices)


def test_too_little_history_is_refused(trained, saved: SavedForecaster) -> None:
    series = trained.prepared.series
    with pytest.raises(DataError, match="119 days of prices are too few, at least 120"):
        forecast_series(saved, series.last(119))
    assert np.isfinite(forecast_series(saved, series.last(120)).mean).all()


@pytest.mark.parametrize("value", [np.inf, 0.0, -5.0])
def test_impossible_prices_are_refused(trained, saved: SavedForecaster, value: float) -> None:
    prices = trained.prepared.series.prices.copy()
    prices[-3] = value
    with pytest.raises(DataError, match="WALK"):
        forecast_series(saved, replace(trained.prepared.series, prices=prices))


def test_a_version_holds_plain_files_and_says_what_it_was_made_from(trained, models: Path) -> None:
    folder = models / "WALK" / "v1"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "checksums.json", "config.json", "evaluation.png", "forecast.png", "metadata.json",
        "metrics.json", "model.safetensors", "reference.json", "scaler.json", "test.parquet",
    }  # fmt: skip
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["symbol"] == "WALK"
    assert metadata["version"] == "v1"
    assert metadata["model_config"]["prediction_horizons"] == [1, 5, 10, 30]
    assert metadata["performance_metrics"]["best_val_loss"] == trained.record.best_validation_loss
    assert metadata["data_stats"]["sha256"] == trained.prepared.series.fingerprint
    assert metadata["data_stats"]["num_samples"] == len(trained.prepared.origins)
    assert metadata["data_stats"]["origins"]["training"][0] == str(
        trained.prepared.series.dates[trained.prepared.origins[0]]
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "scaler.json", "metrics.json"])
def test_a_folder_with_a_file_of_another_kind_is_refused(tmp_path: Path, models: Path, name: str) -> None:
    for path in (models / "WALK" / "v1").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ArtefactError):
        load_forecaster(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path: Path, models: Path) -> None:
    for path in (models / "WALK" / "v1").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 16}))
    with pytest.raises(ArtefactError, match="do not fit"):
        load_forecaster(tmp_path)


def test_awaiting_a_prediction_is_the_same_as_asking_now(trained, models: Path) -> None:
    predictor, series = MambaPredictor(["WALK"], models=models), trained.prepared.series
    awaited = asyncio.run(predictor.predict("WALK", series, current_price=80.0))
    assert awaited == predictor.predict_now("WALK", series, 80.0)
    assert predictor.predict_distribution("WALK", series, 80.0).prices() == awaited


def test_a_model_of_another_configuration_is_refused_where_one_was_asked_for(trained, models: Path) -> None:
    series = trained.prepared.series
    assert MambaPredictor(["WALK"], trained.prepared.config, models).predict_now("WALK", series)
    other = trained.prepared.config.model_copy(update={"d_model": 128})
    with pytest.raises(DataError, match=r"another configuration .*d_model is 8, not 128"):
        MambaPredictor(["WALK"], other, models).predict_now("WALK", series)


def test_training_through_the_predictor_stores_and_serves_the_next_version(trained, tmp_path: Path) -> None:
    series = trained.prepared.series
    predictor = MambaPredictor(["WALK"], trained.prepared.config, tmp_path)
    for version in ("v1", "v2"):
        evaluations = predictor.train({"WALK": series}, epochs=1, quiet=True)
        assert evaluations["WALK"].symbol == "WALK"
        assert predictor.load("WALK").version == version
    with pytest.raises(DataError, match="serves WALK, not AAPL"):
        predictor.train({"AAPL": series.prices})
    with pytest.raises(DataError, match="prices of AAPL were given for WALK"):
        predictor.train({"WALK": replace(series, symbol="AAPL")})
    with pytest.raises(DataError, match="empty"):
        predictor.train({})


def test_a_model_with_covariates_asks_for_them(trained, small_config, tmp_path: Path) -> None:
    series = trained.prepared.series
    config = small_config.model_copy(update={"covariates": ("index",)})
    index = np.random.default_rng(0).normal(size=len(series))
    prepared = prepare_series(series, config, covariates={"index": index})
    made = train_prepared(prepared, SEQUENCE_TRAINING.model_copy(update={"epochs": 1}), quiet=True)
    ModelRegistry(tmp_path).store("WALK", lambda folder, version: save_forecaster(folder, made, version))
    predictor = MambaPredictor(["WALK"], models=tmp_path)
    with pytest.raises(DataError, match="reads the covariates index, got none"):
        predictor.predict_now("WALK", series)
    forecast = predictor.predict_distribution("WALK", series, covariates={"index": index})
    assert np.isfinite(forecast.quantiles).all()
