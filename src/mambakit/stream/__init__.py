"""Streaming prediction of market states: a recurrent state carried from tick to tick, no window replayed.

    contest     DataPoint, Scorer: the contest's interface     data        its tables, checked, and split
    generate    a synthetic market with a known optimum         plain/      what runs with NumPy alone
    config      the settings                                    ridge       the baseline
    model       the network                                     dataset     what it is trained on
    train       an ensemble of seeds                            ensemble    several networks as one
    artefact    it as a folder                                  predictor   it tick by tick
    pack        it as a submission                              figures, report  for the eye

Names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.stream.artefact import load_ensemble as load_ensemble
    from mambakit.stream.config import STREAM_TRAINING as STREAM_TRAINING
    from mambakit.stream.config import StreamConfig as StreamConfig
    from mambakit.stream.contest import DataPoint as DataPoint
    from mambakit.stream.contest import Scorer as Scorer
    from mambakit.stream.data import Sequences as Sequences
    from mambakit.stream.data import read_sequences as read_sequences
    from mambakit.stream.ensemble import Ensemble as Ensemble
    from mambakit.stream.generate import Market as Market
    from mambakit.stream.model import StreamModel as StreamModel
    from mambakit.stream.plain.features import FeatureEngineer as FeatureEngineer
    from mambakit.stream.plain.normaliser import SequenceNormalizer as SequenceNormalizer
    from mambakit.stream.predictor import PredictionModel as PredictionModel
    from mambakit.stream.train import train_ensemble as train_ensemble

_HOME = {
    "DataPoint": "contest",
    "Scorer": "contest",
    "PredictionModel": "predictor",
    "FeatureEngineer": "plain.features",
    "SequenceNormalizer": "plain.normaliser",
    "Sequences": "data",
    "read_sequences": "data",
    "Market": "generate",
    "STREAM_TRAINING": "config",
    "StreamConfig": "config",
    "StreamModel": "model",
    "Ensemble": "ensemble",
    "train_ensemble": "train",
    "load_ensemble": "artefact",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
