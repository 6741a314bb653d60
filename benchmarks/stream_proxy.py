"""Real ticks in the contest's shape: a public stand-in for its data, made of the sample that mlfinpy carries.

500,000 trades of E-mini S&P 500 futures (2013), eight of them a row, four numbers of each: log return in basis points,
log volume, signed log volume, log time since the trade before. Whitened by the principal components of the training
rows and rotated: 32 features, 62 sequences of 1000 rows, the last 12 the test set. The right shape and real, but of
weak signal.

    pip install --no-deps mlfinpy      # its file alone is read, so what it needs isn't needed
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

TICKS_A_ROW, STEPS, TEST_SEQUENCES, WARM_UP = 8, 1000, 12, 100


def available() -> bool:
    """Whether mlfinpy is installed."""
    return find_spec("mlfinpy") is not None


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test tables in the contest's format; the test set comes later in time than all of the training."""
    features = tick_features(_ticks())
    rows = len(features) // TICKS_A_ROW // STEPS * STEPS
    values = features[: rows * TICKS_A_ROW].reshape(rows, -1)  # (rows, 32)
    sequences = rows // STEPS
    learnt = values[: (sequences - TEST_SEQUENCES) * STEPS]
    # A price that stands still for most ticks has rare jumps that would be all of the squared error.
    low, high = np.quantile(learnt, [0.001, 0.999], axis=0)
    values, learnt = np.clip(values, low, high), np.clip(learnt, low, high)
    scales, vectors = np.linalg.eigh(np.cov(learnt.T))
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((len(scales), len(scales))))[0]
    white = (values - learnt.mean(axis=0)) @ (vectors / np.sqrt(np.maximum(scales, 1e-9))) @ rotation
    whole = white.reshape(sequences, STEPS, -1).astype(np.float32)
    return _table(whole[:-TEST_SEQUENCES]), _table(whole[-TEST_SEQUENCES:])


def tick_features(ticks: pd.DataFrame) -> np.ndarray:
    """(ticks, 4): log return in basis points, log volume, its sign by the tick rule, log of seconds since the last."""
    returns = 1e4 * np.diff(np.log(ticks["Price"].to_numpy()), prepend=np.log(ticks["Price"].iloc[0]))
    sign = np.sign(returns)
    moved = np.maximum.accumulate(np.where(sign != 0, np.arange(len(sign)), 0))
    volume = np.log1p(ticks["Volume"].to_numpy())
    seconds = ticks["DateTime"].diff().dt.total_seconds().fillna(0.0).clip(lower=0.0).to_numpy()
    return np.stack([returns, volume, sign[moved] * volume, np.log1p(1e3 * seconds)], axis=1)


def _ticks() -> pd.DataFrame:
    spec = find_spec("mlfinpy")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the proxy needs mlfinpy: pip install --no-deps mlfinpy")
    file = Path(spec.submodule_search_locations[0]) / "dataset" / "data" / "tick_data.csv"
    return pd.read_csv(file, parse_dates=["DateTime"], date_format="ISO8601")


def _table(whole: np.ndarray) -> pd.DataFrame:
    sequences, steps, width = whole.shape
    step = np.tile(np.arange(steps), sequences)
    keys = {
        "seq_ix": np.repeat(np.arange(sequences), steps),
        "step_in_seq": step,
        "need_prediction": (step >= WARM_UP) & (step < steps - 1),
    }
    return pd.DataFrame({**keys, **{str(column): whole[..., column].ravel() for column in range(width)}})
