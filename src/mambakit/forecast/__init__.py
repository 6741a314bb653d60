"""Multi-horizon price forecasting: returns are predicted, prices derived, and every claim is held against baselines.

    prices      daily adjusted closes, and the built-in ones        quality     are they fit to be forecast
    features    what the model sees of a day                        volatility  the unit in which it learns returns
    windows     samples, targets, the purged split, the scaler      dataset     all of these for one series
    model       the network                                         train       its training, one symbol
    baselines   who it has to beat                                  predictions what each of them says, as one form
    metrics     the scores, with significance                       evaluation  both, for one symbol
    backtest    walking forward through time                        conformal   intervals that hold what they promise
    outofsample what was forecast and what came                     summary     what many symbols say together
    artefact    a trained forecaster as a folder                    registry    versions and aliases of such folders
    predictor   forecasts from a stored model                       figures, report, tables, page, charts  for the eye

Names load on first use, so that serving a forecast does not wait for what training and drawing need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.forecast.backtest import Backtest as Backtest
    from mambakit.forecast.backtest import WalkForward as WalkForward
    from mambakit.forecast.config import FORECAST_TRAINING as FORECAST_TRAINING
    from mambakit.forecast.config import MambaConfig as MambaConfig
    from mambakit.forecast.dataset import prepare_series as prepare_series
    from mambakit.forecast.evaluation import Evaluation as Evaluation
    from mambakit.forecast.features import TimeSeriesFeatureEngineer as TimeSeriesFeatureEngineer
    from mambakit.forecast.model import MambaModel as MambaModel
    from mambakit.forecast.predictor import Forecast as Forecast
    from mambakit.forecast.predictor import MambaPredictor as MambaPredictor
    from mambakit.forecast.prices import PriceSeries as PriceSeries
    from mambakit.forecast.prices import fetch_historical_prices as fetch_historical_prices
    from mambakit.forecast.quality import validate_data_quality as validate_data_quality
    from mambakit.forecast.registry import ModelRegistry as ModelRegistry
    from mambakit.forecast.train import train_single_symbol as train_single_symbol
    from mambakit.forecast.windows import SequenceGenerator as SequenceGenerator

_HOME = {
    "Backtest": "backtest",
    "WalkForward": "backtest",
    "FORECAST_TRAINING": "config",
    "MambaConfig": "config",
    "prepare_series": "dataset",
    "Evaluation": "evaluation",
    "TimeSeriesFeatureEngineer": "features",
    "MambaModel": "model",
    "Forecast": "predictor",
    "MambaPredictor": "predictor",
    "PriceSeries": "prices",
    "fetch_historical_prices": "prices",
    "validate_data_quality": "quality",
    "ModelRegistry": "registry",
    "train_single_symbol": "train",
    "SequenceGenerator": "windows",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
