"""Multi-horizon price forecasting: returns are predicted, prices derived, and every claim is held against baselines.

    prices      daily adjusted closes, and fetching them            sources     where they come from
    symbols     lists of symbols                                    quality     are prices fit to be forecast
    splits      splits that look like crashes                       volatility  the unit in which returns are learnt
    features    what the model sees of a day                        feature_stream  the same, one day at a time
    covariates  what else is known of a day                         augmentation    samples, altered at random
    windows     samples, targets, the purged split, the scaler      dataset     all of these for one series
    model       the network                                         train       its training, one symbol
    baselines   who it has to beat                                  predictions what each of them says, as one form
    metrics     the scores, with significance                       evaluation  both, for one symbol
    backtest    walking forward through time                        conformal   intervals that hold what they promise
    outofsample what was forecast and what came                     summary     what many symbols say together
    samples     windows and sequences as batches                    shrinkage   how much of what was learnt to believe
    pooled      one model over many symbols                         pool_registry  where it lives
    artefact    a trained forecaster as a folder                    registry    versions and aliases of such folders
    predictor   training and forecasts, a stored model each         symbol_training  one symbol in one call
    forecaster  the same for tidy frames                            tidy_frames reading and writing these
    callbacks   stopping, checkpoints, metrics of a run             figures, report, tables, page, charts  for the eye
    service     answers in production: fallback, log, challenger    fallback    the forecast that needs no model
    prediction_log   forecasts and their outcomes                   monitor     has a model decayed?
    reference   what is usual for a model's inputs and losses       ab          is a challenger better?
    replay      the test part as if served day by day               troubleshooting  what may help

Names load on first use, so that serving a forecast does not wait for what training and drawing need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.forecast.augmentation import DataAugmentor as DataAugmentor
    from mambakit.forecast.backtest import Backtest as Backtest
    from mambakit.forecast.backtest import WalkForward as WalkForward
    from mambakit.forecast.callbacks import MetricsTracker as MetricsTracker
    from mambakit.forecast.callbacks import TrainingCallbacks as TrainingCallbacks
    from mambakit.forecast.config import MambaConfig as MambaConfig
    from mambakit.forecast.covariates import append_covariates as append_covariates
    from mambakit.forecast.covariates import calendar_covariates as calendar_covariates
    from mambakit.forecast.covariates import index_return_covariates as index_return_covariates
    from mambakit.forecast.dataset import prepare_series as prepare_series
    from mambakit.forecast.evaluation import Evaluation as Evaluation
    from mambakit.forecast.fallback import FallbackForecaster as FallbackForecaster
    from mambakit.forecast.feature_stream import FeatureStream as FeatureStream
    from mambakit.forecast.features import TimeSeriesFeatureEngineer as TimeSeriesFeatureEngineer
    from mambakit.forecast.forecaster import MambaForecaster as MambaForecaster
    from mambakit.forecast.model import MambaModel as MambaModel
    from mambakit.forecast.pooled import prepare_pooled as prepare_pooled
    from mambakit.forecast.pooled import train_pooled as train_pooled
    from mambakit.forecast.prediction_log import PredictionLog as PredictionLog
    from mambakit.forecast.predictor import Forecast as Forecast
    from mambakit.forecast.predictor import MambaPredictor as MambaPredictor
    from mambakit.forecast.prices import PriceSeries as PriceSeries
    from mambakit.forecast.prices import fetch_historical_prices as fetch_historical_prices
    from mambakit.forecast.prices import fetch_historical_prices_async as fetch_historical_prices_async
    from mambakit.forecast.quality import validate_data_quality as validate_data_quality
    from mambakit.forecast.registry import ModelRegistry as ModelRegistry
    from mambakit.forecast.service import ForecastService as ForecastService
    from mambakit.forecast.sources import PriceSource as PriceSource
    from mambakit.forecast.sources import open_source as open_source
    from mambakit.forecast.sources.frames import FrameSource as FrameSource
    from mambakit.forecast.sources.frames import read_frame as read_frame
    from mambakit.forecast.symbol_training import train_single_symbol as train_single_symbol
    from mambakit.forecast.symbols import TIER_1 as TIER_1
    from mambakit.forecast.symbols import parse_symbols as parse_symbols
    from mambakit.forecast.train import train_prepared as train_prepared
    from mambakit.forecast.windows import SequenceGenerator as SequenceGenerator

_HOME = {
    "MetricsTracker": "callbacks",
    "Backtest": "backtest",
    "WalkForward": "backtest",
    "TrainingCallbacks": "callbacks",
    "DataAugmentor": "augmentation",
    "MambaConfig": "config",
    "append_covariates": "covariates",
    "calendar_covariates": "covariates",
    "index_return_covariates": "covariates",
    "prepare_series": "dataset",
    "Evaluation": "evaluation",
    "FeatureStream": "feature_stream",
    "FallbackForecaster": "fallback",
    "TimeSeriesFeatureEngineer": "features",
    "MambaForecaster": "forecaster",
    "MambaModel": "model",
    "prepare_pooled": "pooled",
    "train_pooled": "pooled",
    "PredictionLog": "prediction_log",
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
    "train_single_symbol": "symbol_training",
    "train_prepared": "train",
    "ForecastService": "service",
    "SequenceGenerator": "windows",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
