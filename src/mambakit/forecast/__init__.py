"""Multi-horizon price forecasting: returns are predicted, prices derived, and every claim is held against baselines.

    prices      daily adjusted closes, and fetching them            sources     where they come from
    symbols     lists of symbols                                    quality     are prices fit to be forecast
    splits      splits that look like crashes                       volatility  the unit in which returns are learnt
    features    what the model sees of a day                        feature_stream  the same, one day at a time
    covariates  what else is known of a day                         augmentation    samples, altered at random
    windows     samples, targets, the purged split, the scaler      dataset     all of these for one series
    model       the network                                         train       its training, one symbol
    baselines   who it has to beat                                  evaluation  by how much, and significance: surely?
    artefact    a trained forecaster as a folder                    registry    versions and aliases of such folders
    predictor   forecasts from a stored model                       figures, report  for the eye

Names load on first use, so that serving a forecast does not wait for what training and drawing need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.forecast.augmentation import DataAugmentor as DataAugmentor
    from mambakit.forecast.config import FORECAST_TRAINING as FORECAST_TRAINING
    from mambakit.forecast.config import MambaConfig as MambaConfig
    from mambakit.forecast.covariates import append_covariates as append_covariates
    from mambakit.forecast.covariates import calendar_covariates as calendar_covariates
    from mambakit.forecast.covariates import index_return_covariates as index_return_covariates
    from mambakit.forecast.dataset import prepare_series as prepare_series
    from mambakit.forecast.evaluation import Evaluation as Evaluation
    from mambakit.forecast.feature_stream import FeatureStream as FeatureStream
    from mambakit.forecast.features import TimeSeriesFeatureEngineer as TimeSeriesFeatureEngineer
    from mambakit.forecast.model import MambaModel as MambaModel
    from mambakit.forecast.predictor import Forecast as Forecast
    from mambakit.forecast.predictor import MambaPredictor as MambaPredictor
    from mambakit.forecast.prices import PriceSeries as PriceSeries
    from mambakit.forecast.prices import fetch_historical_prices as fetch_historical_prices
    from mambakit.forecast.prices import fetch_historical_prices_async as fetch_historical_prices_async
    from mambakit.forecast.quality import validate_data_quality as validate_data_quality
    from mambakit.forecast.registry import ModelRegistry as ModelRegistry
    from mambakit.forecast.sources import PriceSource as PriceSource
    from mambakit.forecast.sources import open_source as open_source
    from mambakit.forecast.sources.frames import FrameSource as FrameSource
    from mambakit.forecast.sources.frames import read_frame as read_frame
    from mambakit.forecast.symbols import TIER_1 as TIER_1
    from mambakit.forecast.symbols import parse_symbols as parse_symbols
    from mambakit.forecast.train import train_single_symbol as train_single_symbol
    from mambakit.forecast.windows import SequenceGenerator as SequenceGenerator

_HOME = {
    "DataAugmentor": "augmentation",
    "FORECAST_TRAINING": "config",
    "MambaConfig": "config",
    "append_covariates": "covariates",
    "calendar_covariates": "covariates",
    "index_return_covariates": "covariates",
    "prepare_series": "dataset",
    "Evaluation": "evaluation",
    "FeatureStream": "feature_stream",
    "TimeSeriesFeatureEngineer": "features",
    "MambaModel": "model",
    "Forecast": "predictor",
    "MambaPredictor": "predictor",
    "PriceSeries": "prices",
    "fetch_historical_prices": "prices",
    "fetch_historical_prices_async": "prices",
    "validate_data_quality": "quality",
    "ModelRegistry": "registry",
    "PriceSource": "sources",
    "open_source": "sources",
    "FrameSource": "sources.frames",
    "read_frame": "sources.frames",
    "TIER_1": "symbols",
    "parse_symbols": "symbols",
    "train_single_symbol": "train",
    "SequenceGenerator": "windows",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
