"""The network: what it is before training, that its quantiles can't cross, and its loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_pinball_loss

from mambakit.errors import DataError
from mambakit.forecast.config import PRESETS, QUANTILES, MambaConfig, default_training
from mambakit.forecast.model import (
    Distribution,
    MambaModel,
    fit_blend,
    forecast_loss,
    pinball_loss,
    volatility_at_horizons,
)
from mambakit.forecast.samples import WindowData
from mambakit.forecast.train import forecast_samples, untrained_model
from mambakit.forecast.volatility import TERMS

HORIZONS = (1, 5, 10, 30)


@pytest.fixture
def untrained(prepared) -> MambaModel:
    return untrained_model(prepared, seed=0)


def test_the_untrained_mean_is_the_drift_of_the_training_part(prepared, untrained) -> None:
    drift = prepared.returns[prepared.split.training].mean(axis=0)
    mean = forecast_samples(untrained, prepared.part(prepared.split.test)).mean
    np.testing.assert_allclose(mean, np.tile(drift, (len(mean), 1)), rtol=1e-5)


def test_the_untrained_quantiles_hold_their_share_of_the_training_part(prepared, untrained) -> None:
    known = prepared.split.training
    quantiles = forecast_samples(untrained, prepared.part(known)).quantiles.numpy()
    below = (prepared.returns[known][..., None] <= quantiles).mean(axis=0)
    np.testing.assert_allclose(below, np.tile(QUANTILES, (4, 1)), atol=2 / len(known))


def test_an_untrained_interval_grows_with_the_volatility(prepared, untrained) -> None:
    batch = windows(prepared).batch(torch.tensor([0, 0]))
    untrained.eval()
    forecast = untrained(batch["features"], torch.tensor([0.01, 0.03]), batch["terms"])
    calm, stormy = forecast.quantiles - untrained.drift[0, :, None]
    torch.testing.assert_close(stormy, 3 * calm)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), size=st.floats(0.01, 30.0))
def test_quantiles_never_cross_whatever_the_weights(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = MambaModel(MambaConfig(d_model=4, num_layers=1, d_state=2), n_features=3).eval()
    with torch.no_grad():
        for weight in (*model.heads.parameters(), model.shape):
            weight.normal_(0, size, generator=generator)
        features, terms = torch.randn(5, 7, 3, generator=generator), torch.randn(5, 7, len(TERMS), generator=generator)
        quantiles = model(features, torch.full((5,), 0.02), terms).quantiles
    assert (quantiles.diff(dim=-1) >= 0).all()


def test_the_forecast_reads_the_whole_window(prepared, trained) -> None:
    batch = windows(prepared).batch(torch.tensor([0]))
    changed = batch["features"].clone()
    changed[:, 0] += 1.0
    model = trained.model
    assert not torch.equal(
        model(changed, batch["volatility"], batch["terms"]).quantiles, model(**_inputs(batch)).quantiles
    )


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
    forecast = Distribution(torch.randn(6, 4), quantiles, torch.rand(6, 4) + 0.5)
    returns = torch.randn(6, 4)
    louder = Distribution(*(10 * values for values in forecast))
    torch.testing.assert_close(forecast_loss(louder, 10 * returns)[0], forecast_loss(forecast, returns)[0])


def test_a_perfect_forecast_has_no_loss() -> None:
    returns = torch.randn(3, 4)
    perfect = Distribution(returns, returns[..., None].expand(3, 4, len(QUANTILES)), torch.rand(3, 4) + 0.1)
    assert forecast_loss(perfect, returns)[0] == 0


def test_the_shrinkage_pulls_mean_and_quantiles_alike_towards_the_drift(prepared, untrained) -> None:
    batch = windows(prepared).batch(torch.arange(4))
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


def windows(prepared) -> WindowData:
    """The test part of a series as windows, whatever the mode of its model."""
    config = prepared.config.model_copy(update={"training_mode": "windows"})
    return replace(prepared, config=config).part(prepared.split.test)


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("features", "volatility", "terms")}


def test_a_sequence_read_day_by_day_is_the_sequence_read_at_once(prepared, mixer_model) -> None:
    batch = prepared.part(prepared.split.test).batch(torch.tensor([0]))
    days = {name: batch[name][:, :90] for name in ("features", "volatility", "terms")}
    with torch.no_grad():
        whole = mixer_model(**days)
        state, steps = None, []
        for day in range(90):
            step, state = mixer_model.advance(*(each[:, day : day + 1] for each in days.values()), state)
            steps.append(step)
    for name in ("mean", "quantiles"):
        stepwise = torch.cat([getattr(step, name) for step in steps], dim=1)
        torch.testing.assert_close(stepwise, getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_a_window_is_a_sequence_whose_last_day_is_forecast_from(prepared, mixer_model) -> None:
    batch = windows(prepared).batch(torch.tensor([5]))
    with torch.no_grad():
        last = mixer_model(**_inputs(batch))
        volatility = torch.full((1, 60), float(batch["volatility"]))
        whole = mixer_model(batch["features"], volatility, batch["terms"])
    torch.testing.assert_close(last.quantiles, whole.quantiles[:, -1])


@pytest.fixture(params=["mamba", "mamba2", "mamba3", "s4d", "attention"])
def mixer_model(request: pytest.FixtureRequest, prepared) -> MambaModel:
    """A network of each mixer whose heads say something."""
    config = MambaConfig(d_model=8, num_layers=2, mixer=request.param)
    torch.manual_seed(0)
    model = MambaModel(config, prepared.features.shape[1]).eval()
    torch.nn.init.normal_(model.heads.weight)
    torch.nn.init.normal_(model.shape)
    return model


def test_a_storm_is_expected_to_calm_down_and_a_calm_to_end(prepared, untrained) -> None:
    batch = windows(prepared).batch(torch.tensor([0, 0]))
    # Today's volatility is half, or twice, that of the longer memories.
    terms = torch.zeros_like(batch["terms"])
    terms[..., 1:3] = torch.tensor([0.7, -0.7])[:, None, None]
    untrained.eval()
    scale = untrained(batch["features"], torch.tensor([0.01, 0.01]), terms).scale
    usual = volatility_at_horizons(torch.tensor([0.01]), HORIZONS)
    assert (scale[0] > usual).all()
    assert (scale[1] < usual).all()
    assert (scale[0] / usual)[0, -1] > (scale[0] / usual)[0, 0]  # the further ahead, the more so


def test_the_weights_of_the_terms_are_found_where_there_is_data_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(20000, 4, generator=generator).double()
    true = torch.tensor([0.3, -0.2, 0.5, 0.0]).double()
    size = (terms @ true).exp() * torch.empty(20000).exponential_(generator=generator).double()
    near, far = (fit_blend(size, terms, prior) for prior in (true, true + 0.5))
    torch.testing.assert_close(near, true, atol=0.02, rtol=0)
    assert ((far - true).abs() < 0.25).all()
    assert (far > near).all()  # pulled towards the prior


def test_a_model_made_from_its_configuration_alone_reads_the_features_it_asks_for(prepared) -> None:
    model = MambaModel(prepared.config).eval()
    batch = prepared.part(prepared.split.test).batch(torch.tensor([0]))
    assert model(batch["features"], batch["volatility"], batch["terms"]).mean.shape[-1] == 4
    covariates = MambaConfig(d_model=8, num_layers=1, covariates=("a", "b"), include_volume=True)
    assert MambaModel(covariates).embedding.in_features == MambaModel(prepared.config).embedding.in_features + 4 + 2


def test_the_weights_stay_finite_where_a_price_stands_still() -> None:
    prior = torch.tensor([0.2, 0.4, 0.1, -0.3]).double()
    weights = fit_blend(torch.zeros(300).double(), torch.randn(300, 4).double(), prior)
    assert ((weights - prior).abs() < 0.5).all()


def test_days_that_do_not_count_do_not_change_the_loss(prepared, untrained) -> None:
    batch = prepared.part(prepared.split.validation).batch(torch.tensor([0]))
    untrained.eval()
    forecast = untrained(batch["features"], batch["volatility"], batch["terms"])
    loss, _ = forecast_loss(forecast, batch["returns"], batch["counted"])
    spoilt = torch.where(batch["counted"][..., None] > 0, batch["returns"], torch.tensor(9.0))
    assert torch.equal(forecast_loss(forecast, spoilt, batch["counted"])[0], loss)
    at_origins = prepared.at_origins(prepared.split.validation)["returns"]
    assert torch.equal(batch["returns"][batch["counted"] > 0], at_origins)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mixer": "attention", "d_state": 8}, "has no d_state"),
        ({"mixer": "mamba3", "d_conv": 3}, "has no d_conv"),
        ({"mixer": "s4d", "d_state": 15}, "multiple of 2"),
        ({"mixer": "lstm"}, "mixer"),
        ({"covariates": ("a", "a")}, "name of its own"),
    ],
)
def test_a_size_that_the_mixer_does_not_have_is_refused(settings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MambaConfig(**settings)


def test_presets_are_the_seeds_table_for_every_mixer() -> None:
    large = MambaConfig.preset("large")
    assert (large.d_model, large.d_state, large.num_layers) == (128, 32, 6)
    assert MambaConfig.preset("default") == MambaConfig()
    for name in PRESETS:
        for mixer in ("mamba", "mamba2", "mamba3", "s4d", "attention"):
            assert MambaConfig.preset(name, mixer=mixer).num_layers == PRESETS[name]["num_layers"]
    assert [default_training("windows", name).epochs for name in PRESETS] == [50, 20, 100, 75]
    assert [default_training("windows", name).batch_size for name in PRESETS] == [32, 16, 64, 32]
    with pytest.raises(DataError, match="preset must be one of default, small"):
        MambaConfig.preset("huge")


def test_calibration_never_makes_quantiles_cross(small_config) -> None:
    model = MambaModel(small_config, 3).eval()
    model.calibration.copy_(torch.randn_like(model.calibration))
    forecast = model(torch.randn(4, 60, 3), torch.rand(4) + 0.01, torch.randn(4, 60, len(TERMS)))
    assert (forecast.quantiles.diff(dim=-1) >= 0).all()
