"""One model over many symbols: common days, one scaler, and forecasts for those that it has not met."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.forecast.walks import random_walk

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.config import MambaConfig, pooled_training
from mambakit.forecast.pool_registry import load_pooled
from mambakit.forecast.pooled import (
    TrainedPool,
    pooled_objective,
    prepare_pooled,
    prepare_unmet,
    save_pooled,
    train_and_store_pooled,
    train_pooled,
    untrained_pool,
)
from mambakit.forecast.predictor import MambaPredictor
from mambakit.forecast.train import forecast_samples

QUICK = pooled_training("sequence").model_copy(update={"epochs": 2, "learning_rate": 1e-2})


@pytest.fixture(scope="module")
def series() -> list:
    return [random_walk(days=days, seed=seed, symbol=name) for name, days, seed in (("BB", 520, 1), ("AA", 480, 2))]


@pytest.fixture(scope="module")
def pool(series, small_config) -> TrainedPool:
    return train_pooled(prepare_pooled(series, small_config), QUICK, quiet=True)


def test_the_parts_end_on_the_same_days_and_no_target_crosses(pool: TrainedPool) -> None:
    first_validation = [each.series.dates[each.origins[each.split.validation[0]]] for each in pool.prepared]
    first_test = [each.series.dates[each.origins[each.split.test[0]]] for each in pool.prepared]
    assert len(set(first_validation)) == len(set(first_test)) == 1
    for each in pool.prepared:
        dates, origins = each.series.dates, each.origins
        assert dates[origins[each.split.training[-1]] + 30] < first_validation[0]
        assert dates[origins[each.split.validation[-1]] + 30] < first_test[0]


def test_one_scaler_knows_all_training_parts(pool: TrainedPool, series, small_config) -> None:
    first, second = pool.prepared
    assert first.scaler is second.scaler
    rows = [each.features[each.first_row : each.origins[each.split.training[-1]] + 1] for each in pool.prepared]
    np.testing.assert_allclose(np.concatenate(rows)[:, 2].mean(), 0, atol=1e-2)


def test_the_untrained_pool_forecasts_each_symbols_drift_and_the_mean_one_for_others(pool: TrainedPool) -> None:
    model = untrained_pool(pool.prepared, seed=0)
    drifts = [each.returns[each.split.training].mean(axis=0) for each in pool.prepared]
    for number, each in enumerate(pool.prepared, start=1):
        mean = forecast_samples(model, each.part(each.split.test), number).mean
        np.testing.assert_allclose(mean[0], drifts[number - 1], rtol=1e-4)
    stranger = forecast_samples(model, each.part(each.split.test), 0).mean
    np.testing.assert_allclose(stranger[0], np.mean(drifts, axis=0), rtol=1e-4)


def test_symbols_are_now_and_then_forgotten_in_training_alone(pool: TrainedPool) -> None:
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, features, volatility, terms, symbol):
            seen.append(symbol)
            return pool.model(features, volatility, terms, symbol)

    run = pool.prepared[0].days(300, np.arange(300, 310), symbol=2)
    batch = {
        "features": run.features.expand(400, -1, -1),
        "volatility": run.volatility.expand(400, -1),
        "terms": run.terms.expand(400, -1, -1),
        "returns": run.returns.expand(400, -1, -1),
        "counted": run.counted.expand(400, -1),
        "symbol": torch.full((400,), 2),
    }
    with torch.no_grad():
        pooled_objective(Recorder().train(), batch)
        pooled_objective(Recorder().eval(), batch)
    assert 60 < (seen[0] == 0).sum() < 140
    assert ((seen[0] == 0) | (seen[0] == 2)).all()
    assert (seen[1] == 2).all()


def test_every_symbol_is_judged_beside_the_baselines(pool: TrainedPool) -> None:
    assert pool.symbols == ("AA", "BB")
    assert set(pool.evaluations) == {"AA", "BB"}
    for symbol, evaluation in pool.evaluations.items():
        assert evaluation.symbol == symbol
        assert {score.forecaster for score in evaluation.scores} >= {"mamba", "random walk", "drift"}


def test_windows_of_several_symbols_stay_apart(series, small_config) -> None:
    windows = small_config.model_copy(update={"training_mode": "windows"})
    prepared = prepare_pooled(series, windows)
    training = pooled_training("windows").model_copy(update={"epochs": 1})
    trained = train_pooled(prepared, training, quiet=True)
    from mambakit.forecast.pooled import _training_data

    data = _training_data(prepared)
    own = prepared[1].part(prepared[1].split.training)
    last = data.batch(torch.tensor([len(data) - 1]))
    assert torch.equal(last["features"], own.batch(torch.tensor([len(own) - 1]))["features"])
    assert last["symbol"].tolist() == [2]
    assert trained.record.best_validation_loss > 0


def test_a_series_that_was_not_met_is_prepared_as_its_pool_was(pool: TrainedPool) -> None:
    stranger = prepare_unmet(random_walk(days=500, seed=8, symbol="CC"), pool.prepared)
    assert stranger.scaler is pool.prepared[0].scaler
    first = stranger.series.dates[stranger.origins[stranger.split.test[0]]]
    known = pool.prepared[0]
    assert first == known.series.dates[known.origins[known.split.test[0]]]


def test_a_pool_that_cannot_be_cut_by_common_days_is_refused(series, small_config) -> None:
    early = random_walk(days=460, symbol="OLD")
    shifted = replace(early, dates=early.dates - np.timedelta64(3003, "D"))
    with pytest.raises(DataError, match=r"OLD: .* leaves no day for the validation part"):
        prepare_pooled([*series, shifted], small_config)
    with pytest.raises(DataError, match="may come once"):
        prepare_pooled([series[0], series[0]], small_config)


def test_one_seed_gives_one_pool(pool: TrainedPool) -> None:
    again = train_pooled(pool.prepared, QUICK, quiet=True).model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in pool.model.state_dict().items())


def test_a_stored_pool_serves_symbols_it_has_met_and_others(pool: TrainedPool, series, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="train --pooled"):
        load_pooled(tmp_path, "AA")
    stored = train_and_store_pooled(pool.prepared, QUICK, tmp_path, quiet=True)
    assert stored.folder == tmp_path / "pooled-models" / "POOLED" / "v1"
    saved = load_pooled(tmp_path, "AA")
    assert saved.evaluation == stored.trained.evaluations["AA"]
    assert (saved.number("AA"), saved.number("BB"), saved.number("CC")) == (1, 2, 0)
    assert load_pooled(tmp_path, "CC").evaluation.scores == ()
    predictor = MambaPredictor(["AA", "CC"], models=tmp_path, pooled=True)
    met = predictor.predict_distribution("AA", series[1])
    np.testing.assert_allclose(met.drift, stored.trained.model.drift[1], rtol=1e-6)
    stranger = asyncio.run(predictor.predict("CC", random_walk(days=300, seed=3).prices))
    assert list(stranger) == ["1d", "5d", "10d", "30d"]
    assert all(np.isfinite(list(stranger.values())))


def test_a_pools_folder_says_what_it_was_made_from(pool: TrainedPool, tmp_path: Path) -> None:
    save_pooled(tmp_path, pool, "v1")
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["symbols"] == ["AA", "BB"]
    assert metadata["data_stats"]["BB"]["sha256"] == pool.prepared[1].series.fingerprint
    assert "| AA | 2010-01-04 |" in (tmp_path / "README.md").read_text()


def test_the_predictor_trains_a_pool(series, tmp_path: Path) -> None:
    config = MambaConfig(d_model=4, d_state=4, num_layers=1)
    predictor = MambaPredictor(["AA", "BB"], config, tmp_path, pooled=True)
    evaluations = predictor.train({each.symbol: each for each in series}, epochs=1, quiet=True)
    assert set(evaluations) == {"AA", "BB"}
    assert np.isfinite(list(predictor.predict_now("BB", series[0]).values())).all()
