"""Multi-horizon price forecasting: returns are predicted, prices derived, and every claim is held against baselines.

    prices      daily adjusted closes, and the built-in ones        quality     are they fit to be forecast
    features    what the model sees of a day                        volatility  the unit in which it learns returns
    windows     samples, targets, the purged split, the scaler      dataset     all of these for one series
    model       the network                                         train       its training, one symbol
    baselines   who it has to beat                                  evaluation  by how much, and significance: surely?
    samples     windows and sequences as batches                    shrinkage   how much of what was learnt to believe
    pooled      one model over many symbols                         pool_registry  where it lives
    artefact    a trained forecaster as a folder                    registry    versions and aliases of such folders
    predictor   training and forecasts, a stored model each         symbol_training  one symbol in one call
    forecaster  the same for tidy frames                            tidy_frames reading and writing these
    callbacks   stopping, checkpoints, metrics of a run             figures, report  for the eye

Names load on first use, so that serving a forecast does not wait for what training and drawing need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.forecast.callbacks import MetricsTracker as MetricsTracker
    from mambakit.forecast.callbacks import TrainingCallbacks as TrainingCallbacks
    from mambakit.forecast.config import MambaConfig as MambaConfig
    from mambakit.forecast.dataset import prepare_series as prepare_series
    from mambakit.forecast.evaluation import Evaluation as Evaluation
    from mambakit.forecast.features import TimeSeriesFeatureEngineer as TimeSeriesFeatureEngineer
    from mambakit.forecast.forecaster import MambaForecaster as MambaForecaster
    from mambakit.forecast.model import MambaModel as MambaModel
    from mambakit.forecast.pooled import prepare_pooled as prepare_pooled
    from mambakit.forecast.pooled import train_pooled as train_pooled
    from mambakit.forecast.predictor import Forecast as Forecast
    from mambakit.forecast.predictor import MambaPredictor as MambaPredictor
    from mambakit.forecast.prices import PriceSeries as PriceSeries
    from mambakit.forecast.prices import fetch_historical_prices as fetch_historical_prices
    from mambakit.forecast.quality import validate_data_quality as validate_data_quality
    from mambakit.forecast.registry import ModelRegistry as ModelRegistry
    from mambakit.forecast.symbol_training import train_single_symbol as train_single_symbol
    from mambakit.forecast.train import train_prepared as train_prepared
    from mambakit.forecast.windows import SequenceGenerator as SequenceGenerator

_HOME = {
    "MetricsTracker": "callbacks",
    "TrainingCallbacks": "callbacks",
    "MambaConfig": "config",
    "prepare_series": "dataset",
    "Evaluation": "evaluation",
    "TimeSeriesFeatureEngineer": "features",
    "MambaForecaster": "forecaster",
    "MambaModel": "model",
    "prepare_pooled": "pooled",
    "train_pooled": "pooled",
    "Forecast": "predictor",
    "MambaPredictor": "predictor",
    "PriceSeries": "prices",
    "fetch_historical_prices": "prices",
    "validate_data_quality": "quality",
    "ModelRegistry": "registry",
    "train_single_symbol": "symbol_training",
    "train_prepared": "train",
    "SequenceGenerator": "windows",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
