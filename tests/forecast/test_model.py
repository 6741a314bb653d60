"""The network: what it is before training, that its quantiles can't cross, and its loss."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_pinball_loss

from mambakit.forecast.config import QUANTILES, MambaConfig
from mambakit.forecast.model import (
    Distribution,
    MambaModel,
    forecast_loss,
    pinball_loss,
    volatility_at_horizons,
)
from mambakit.forecast.train import forecast_windows, untrained_model

HORIZONS = (1, 5, 10, 30)


@pytest.fixture
def untrained(prepared) -> MambaModel:
    return untrained_model(prepared, seed=0)


def test_the_untrained_mean_is_the_drift_of_the_training_part(prepared, untrained) -> None:
    drift = prepared.returns[prepared.split.training].mean(axis=0)
    mean = forecast_windows(untrained, prepared.part(prepared.split.test)).mean
    np.testing.assert_allclose(mean, np.tile(drift, (len(mean), 1)), rtol=1e-5)


def test_the_untrained_quantiles_hold_their_share_of_the_training_part(prepared, untrained) -> None:
    known = prepared.split.training
    quantiles = forecast_windows(untrained, prepared.part(known)).quantiles.numpy()
    below = (prepared.returns[known][..., None] <= quantiles).mean(axis=0)
    np.testing.assert_allclose(below, np.tile(QUANTILES, (4, 1)), atol=2 / len(known))


def test_an_untrained_interval_grows_with_the_volatility(prepared, untrained) -> None:
    features = prepared.part(prepared.split.test).batch(torch.tensor([0, 0]))["features"]
    untrained.eval()
    calm, stormy = untrained(features, torch.tensor([0.01, 0.03])).quantiles - untrained.drift[:, None]
    torch.testing.assert_close(stormy, 3 * calm)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), size=st.floats(0.01, 30.0))
def test_quantiles_never_cross_whatever_the_weights(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = MambaModel(MambaConfig(d_model=4, num_layers=1, d_state=2), n_features=3).eval()
    with torch.no_grad():
        for weight in (*model.heads.parameters(), model.shape):
            weight.normal_(0, size, generator=generator)
        quantiles = model(torch.randn(5, 7, 3, generator=generator), torch.full((5,), 0.02)).quantiles
    assert (quantiles.diff(dim=-1) >= 0).all()


def test_the_forecast_reads_the_whole_window(prepared, trained) -> None:
    batch = prepared.part(prepared.split.test).batch(torch.tensor([0]))
    changed = batch["features"].clone()
    changed[:, 0] += 1.0
    model = trained.model
    assert not torch.equal(model(changed, batch["volatility"]).quantiles, model(**_inputs(batch)).quantiles)


def test_volatility_grows_with_the_square_root_of_the_horizon() -> None:
    scale = volatility_at_horizons(torch.tensor([0.01, 0.02]), (1, 4, 9))
    torch.testing.assert_close(scale, torch.tensor([[0.01, 0.02, 0.03], [0.02, 0.04, 0.06]]))


def test_pinball_loss_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    target, quantiles = generator.normal(size=50), generator.normal(size=(50, len(QUANTILES)))
    ours = pinball_loss(torch.from_numpy(quantiles), torch.from_numpy(target)).mean(dim=0)
    expected = [mean_pinball_loss(target, quantiles[:, i], alpha=level) for i, level in enumerate(QUANTILES)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_the_loss_counts_in_units_of_the_scale() -> None:
    quantiles = torch.randn(6, 4, len(QUANTILES)).sort(dim=-1).values
    forecast = Distribution(torch.randn(6, 4), quantiles)
    returns, scale = torch.randn(6, 4), torch.rand(6, 4) + 0.5
    louder = Distribution(10 * forecast.mean, 10 * quantiles)
    torch.testing.assert_close(
        forecast_loss(louder, 10 * returns, 10 * scale)[0], forecast_loss(forecast, returns, scale)[0]
    )


def test_a_perfect_forecast_has_no_loss() -> None:
    returns = torch.randn(3, 4)
    perfect = Distribution(returns, returns[..., None].expand(3, 4, len(QUANTILES)))
    assert forecast_loss(perfect, returns, torch.rand(3, 4) + 0.1)[0] == 0


def test_the_shrinkage_pulls_mean_and_quantiles_alike_towards_the_drift(prepared, untrained) -> None:
    batch = prepared.part(prepared.split.test).batch(torch.arange(4))
    untrained.eval()
    torch.nn.init.normal_(untrained.heads.weight)
    whole = untrained(**_inputs(batch))
    untrained.shrinkage.fill_(0.25)
    shrunk = untrained(**_inputs(batch))
    torch.testing.assert_close(shrunk.mean - untrained.drift, 0.25 * (whole.mean - untrained.drift))
    torch.testing.assert_close(
        shrunk.quantiles - shrunk.mean[..., None], whole.quantiles - whole.mean[..., None], rtol=1e-4, atol=1e-6
    )


def test_horizons_must_increase() -> None:
    with pytest.raises(ValueError, match="must increase"):
        MambaConfig(prediction_horizons=(5, 1))


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"features": batch["features"], "volatility": batch["volatility"]}
