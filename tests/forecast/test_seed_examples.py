"""The seed guide's examples of the Python interface, word for word but for the imports and their size."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from mambakit.forecast import (
    MambaConfig,
    MambaPredictor,
    MetricsTracker,
    TrainingCallbacks,
    fetch_historical_prices,
    train_prepared,
    train_single_symbol,
)
from mambakit.forecast.config import SEQUENCE_TRAINING
from mambakit.forecast.dataset import prepare_series

SMALL = {"d_model": 4, "d_state": 4, "num_layers": 1}


@pytest.fixture
def price_data() -> np.ndarray:
    return fetch_historical_prices(["AAPL"], days=500)["AAPL"].prices


@pytest.fixture(autouse=True)
def models_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_python_api(price_data: np.ndarray) -> None:
    config = MambaConfig(d_model=4, num_layers=1, prediction_horizons=[1, 5, 10, 30])
    predictor = MambaPredictor(symbols=["AAPL"], config=config)
    predictor.train({"AAPL": price_data}, epochs=1)

    async def predict() -> dict[str, float]:
        return await predictor.predict(symbol="AAPL", price_history=price_data, current_price=175.50)

    predictions = asyncio.run(predict())
    assert list(predictions) == ["1d", "5d", "10d", "30d"]
    assert all(100 < price < 300 for price in predictions.values())
    assert predictions == predictor.predict_now("AAPL", price_data, 175.50)
    distribution = predictor.predict_distribution("AAPL", price_data, 175.50)
    assert distribution.prices() == predictions
    assert distribution.quantiles.shape == (4, 21)


def test_custom_configuration() -> None:
    config = MambaConfig(**SMALL, prediction_horizons=[1, 3, 7, 14, 30])
    result = asyncio.run(train_single_symbol(symbol="AAPL", epochs=2, batch_size=64, config=config))
    assert f"Best validation loss: {result[1]['best_val_loss']:.4f}".startswith("Best validation loss: 0.")
    assert result[0] == "AAPL"
    assert result[1]["path"] == Path("models/AAPL/v1")


def test_production_pipeline() -> None:
    async def pipeline() -> dict[str, float]:
        prices = {"AAPL": fetch_historical_prices(["AAPL"])["AAPL"].prices}
        symbol, result = await train_single_symbol(
            "AAPL", epochs=1, historical_days=500, config=MambaConfig(**SMALL), quiet=True
        )
        assert symbol == "AAPL"
        assert result["total_epochs"] == 1
        predictor = MambaPredictor(["AAPL"])
        return await predictor.predict("AAPL", prices["AAPL"], current_price=175.50)

    assert list(asyncio.run(pipeline())) == ["1d", "5d", "10d", "30d"]


def test_two_trainings_awaited_together_come_out_as_they_do_alone() -> None:
    async def together() -> list:
        config = MambaConfig(**SMALL)
        settings = {"epochs": 2, "historical_days": 450, "config": config, "quiet": True}
        return await asyncio.gather(
            train_single_symbol("AAPL", **settings),
            train_single_symbol("IBM", **settings),
            train_single_symbol("AAPL", **settings, models="others"),
        )

    first, _, again = asyncio.run(together())
    assert first[1]["best_val_loss"] == again[1]["best_val_loss"]
    weights = [(result["path"] / "model.safetensors").read_bytes() for _, result in (first, again)]
    assert weights[0] == weights[1]


def test_custom_training_callbacks() -> None:
    callbacks_mgr = TrainingCallbacks(save_dir="models/mamba", symbol="AAPL", patience=5, min_delta=0.0001)
    prepared = prepare_series(fetch_historical_prices(["AAPL"], days=450)["AAPL"], MambaConfig(**SMALL))
    settings = callbacks_mgr.settings(SEQUENCE_TRAINING.model_copy(update={"epochs": 1}))
    train_prepared(prepared, settings, quiet=True, **callbacks_mgr.hooks())
    assert Path("models/mamba/metrics/AAPL_metrics.json").exists()


def test_metrics_tracking() -> None:
    tracker = MetricsTracker(save_dir="models/mamba", symbol="AAPL")
    for epoch in range(3):
        tracker.update(epoch=epoch, train_loss=0.5, val_loss=0.4, train_mae=0.1, val_mae=0.1, lr=0.001, epoch_time=1.0)
    tracker.save()
    assert tracker.get_summary()["total_epochs"] == 2
