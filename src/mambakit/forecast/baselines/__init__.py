"""The forecasters to beat. Each is fitted on the training part alone and gives a distribution for every horizon.

Always made, in milliseconds:

- random walk: mean 0, normal with the training part's constant volatility.
- drift: the training part's mean return of that horizon, constant volatility too.
- ewma walk: mean 0, normal with today's EWMA volatility (RiskMetrics).
- ewma: the drift, with the training part's quantiles scaled by EWMA volatility; it is the network before its
  training, so what the network gains on it is what was learnt.
- momentum: the mean daily return of the last 20 days goes on.
- ridge: a linear map from the origin's standardised features, its penalty chosen on the validation part.

Made on request, in seconds (the extra `mambakit[baselines]` brings arch and statsforecast):

- garch walk: mean 0, Student-t with GARCH(1,1) volatility.
- ets, arima: chosen and fitted by statsforecast on log prices.
- gru: the network with a GRU of as many parameters in the place of its Mamba blocks, trained by the same code.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from mambakit.errors import DataError, TrainingDiverged
from mambakit.forecast.baselines.garch import garch_walk
from mambakit.forecast.baselines.recurrent import gru
from mambakit.forecast.baselines.regressions import momentum, ridge
from mambakit.forecast.baselines.statistical import arima, ets
from mambakit.forecast.baselines.walks import drift, ewma, ewma_walk, random_walk
from mambakit.forecast.config import default_training
from mambakit.forecast.dataset import PreparedSeries
from mambakit.forecast.predictions import Predictions
from mambakit.training import TrainingConfig

BASELINES = ("random walk", "drift", "ewma walk", "ewma", "momentum", "ridge")
EXTENDED = ("garch walk", "ets", "arima", "gru")
ALL_BASELINES = BASELINES + EXTENDED

_MAKERS: dict[str, Callable[[PreparedSeries, np.ndarray], Predictions]] = {
    "random walk": random_walk,
    "drift": drift,
    "ewma walk": ewma_walk,
    "ewma": ewma,
    "momentum": momentum,
    "ridge": ridge,
    "garch walk": garch_walk,
    "ets": ets,
    "arima": arima,
}
_PACKAGES = {"garch walk": "arch", "ets": "statsforecast", "arima": "statsforecast"}


@dataclass(frozen=True)
class BaselineForecasts:
    """The baselines' predictions by name, and a sentence for each one that could not be made."""

    predictions: dict[str, Predictions]
    left_out: tuple[str, ...]


def baseline_forecasts(
    prepared: PreparedSeries,
    samples: np.ndarray,
    names: Iterable[str] = BASELINES,
    *,
    training: TrainingConfig | None = None,
    quiet: bool = True,
) -> BaselineForecasts:
    """Predictions of the named baselines, in that order, for the samples at these positions.

    Args:
        training: settings of the GRU's training, the model's by default; the others need none.
        quiet: no progress bar of the GRU's training.

    Raises DataError for a name that is not a baseline's. One whose package is not installed, or whose fit fails, is
    left out, with the reason.
    """
    wanted = tuple(names)
    require_known(wanted)
    predictions, left_out = {}, []
    for name in wanted:
        package = _PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            left_out.append(f"{name}: left out, {package} is not installed (pip install 'mambakit[baselines]')")
            continue
        try:
            if name == "gru":
                settings = training or default_training(prepared.config.training_mode)
                predictions[name] = gru(prepared, samples, settings, quiet=quiet)
            else:
                predictions[name] = _MAKERS[name](prepared, samples)
        except (DataError, TrainingDiverged) as error:
            left_out.append(f"{name}: left out, {error}")
    return BaselineForecasts(predictions, tuple(left_out))


def require_known(names: Iterable[str]) -> None:
    """Raise DataError for a name that is not a baseline's."""
    unknown = [name for name in names if name not in ALL_BASELINES]
    if unknown:
        raise DataError(f"no baseline is called {', '.join(unknown)}; there are {', '.join(ALL_BASELINES)}")
