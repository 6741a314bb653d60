"""Series whose properties are known, and one small forecaster trained on such a series."""

from collections.abc import Callable

import pytest
from tests.forecast.walks import random_walk

from mambakit.forecast.artefact import SavedForecaster, load_forecaster, save_forecaster
from mambakit.forecast.config import SEQUENCE_TRAINING, MambaConfig
from mambakit.forecast.dataset import PreparedSeries, prepare_series
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.train import TrainedForecaster, train_prepared

MakeSeries = Callable[..., PriceSeries]


@pytest.fixture
def make_series() -> MakeSeries:
    return random_walk


@pytest.fixture(scope="session")
def small_config() -> MambaConfig:
    return MambaConfig(d_model=8, d_state=4, num_layers=1)


@pytest.fixture(scope="session")
def window_config(small_config: MambaConfig) -> MambaConfig:
    return small_config.model_copy(update={"training_mode": "windows"})


@pytest.fixture(scope="session")
def prepared(small_config: MambaConfig) -> PreparedSeries:
    # Most of each day's return comes again, so that there is something to learn.
    return prepare_series(random_walk(memory=0.7), small_config)


@pytest.fixture(scope="session")
def trained(prepared: PreparedSeries) -> TrainedForecaster:
    # A model and a series this small need a high rate to learn within seconds.
    training = SEQUENCE_TRAINING.model_copy(update={"epochs": 8, "learning_rate": 1e-2})
    return train_prepared(prepared, training, quiet=True)


@pytest.fixture(scope="session")
def saved(trained: TrainedForecaster, tmp_path_factory: pytest.TempPathFactory) -> SavedForecaster:
    folder = tmp_path_factory.mktemp("saved")
    save_forecaster(folder, trained, "v1")
    return load_forecaster(folder)
