"""Multi-horizon price forecasting: returns are predicted, prices derived, and every claim is held against baselines.

    prices      daily adjusted closes, and the built-in ones        quality     are they fit to be forecast
    features    what the model sees of a day                        volatility  the unit in which it learns returns
    windows     samples, targets, the purged split, the scaler      dataset     all of these for one series
    model       the network                                         train       its training, one symbol
    baselines   who it has to beat                                  evaluation  by how much, and significance: surely?
    artefact    a trained forecaster as a folder                    registry    versions and aliases of such folders
    predictor   forecasts from a stored model                       figures, report  for the eye
    service     answers in production: fallback, log, challenger    fallback    the forecast that needs no model
    prediction_log   forecasts and their outcomes                   monitor     has a model decayed?
    reference   what is usual for a model's inputs and losses       ab          is a challenger better?
    replay      the test part as if served day by day               troubleshooting  what may help

Names load on first use, so that serving a forecast does not wait for what training and drawing need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.forecast.config import FORECAST_TRAINING as FORECAST_TRAINING
    from mambakit.forecast.config import MambaConfig as MambaConfig
    from mambakit.forecast.dataset import prepare_series as prepare_series
    from mambakit.forecast.evaluation import Evaluation as Evaluation
    from mambakit.forecast.fallback import FallbackForecaster as FallbackForecaster
    from mambakit.forecast.features import TimeSeriesFeatureEngineer as TimeSeriesFeatureEngineer
    from mambakit.forecast.model import MambaModel as MambaModel
    from mambakit.forecast.prediction_log import PredictionLog as PredictionLog
    from mambakit.forecast.predictor import Forecast as Forecast
    from mambakit.forecast.predictor import MambaPredictor as MambaPredictor
    from mambakit.forecast.prices import PriceSeries as PriceSeries
    from mambakit.forecast.prices import fetch_historical_prices as fetch_historical_prices
    from mambakit.forecast.quality import validate_data_quality as validate_data_quality
    from mambakit.forecast.registry import ModelRegistry as ModelRegistry
    from mambakit.forecast.service import ForecastService as ForecastService
    from mambakit.forecast.train import train_single_symbol as train_single_symbol
    from mambakit.forecast.windows import SequenceGenerator as SequenceGenerator

_HOME = {
    "FORECAST_TRAINING": "config",
    "MambaConfig": "config",
    "prepare_series": "dataset",
    "Evaluation": "evaluation",
    "FallbackForecaster": "fallback",
    "TimeSeriesFeatureEngineer": "features",
    "MambaModel": "model",
    "PredictionLog": "prediction_log",
    "Forecast": "predictor",
    "MambaPredictor": "predictor",
    "PriceSeries": "prices",
    "fetch_historical_prices": "prices",
    "validate_data_quality": "quality",
    "ModelRegistry": "registry",
    "ForecastService": "service",
    "train_single_symbol": "train",
    "SequenceGenerator": "windows",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
