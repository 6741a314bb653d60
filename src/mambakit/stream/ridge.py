"""The linear baseline: ridge regression of the target on the last few states, by its normal equations.

(X^T X + alpha n I) w = X^T y        X: the last `lags` states, centred; n rows
"""

from collections.abc import Mapping

import numpy as np

from mambakit.errors import DataError
from mambakit.stream.data import Sequences

ALPHA = 1e-4  # of whitened states; more matters only where rows are few
_SEQUENCES_AT_ONCE = 16


class Ridge:
    """A fitted baseline.

    Args:
        weight: (lags, features, targets), the newest state first.
        bias: (targets,).
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        self.weight = np.ascontiguousarray(weight, dtype=np.float32)
        self.bias = np.ascontiguousarray(bias, dtype=np.float32)

    @property
    def lags(self) -> int:
        return self.weight.shape[0]

    def predict(self, states: np.ndarray) -> np.ndarray:
        """Predictions (sequences, steps, targets) float32 of states (sequences, steps, features).

        States before the first count as zeros.
        """
        out = np.broadcast_to(self.bias, (*states.shape[:2], len(self.bias))).copy()
        for back in range(self.lags):
            out[:, back:] += states[:, : states.shape[1] - back] @ self.weight[back]
        return out

    def tensors(self) -> dict[str, np.ndarray]:
        """What to store."""
        return {"weight": self.weight, "bias": self.bias}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> "Ridge":
        """From what `tensors` returned."""
        return cls(tensors["weight"], tensors["bias"])


def fit_ridge(sequences: Sequences, lags: int, alpha: float = ALPHA) -> Ridge:
    """Fit on the scored steps that have `lags` states behind them, or fewer.

    Raises DataError where no step is scored.
    """
    features, width = sequences.states.shape[-1], sequences.targets.shape[-1]
    size = lags * features + 1
    gram, moment, rows = np.zeros((size, size)), np.zeros((size, width)), 0
    for first in range(0, len(sequences), _SEQUENCES_AT_ONCE):
        part = sequences.take(np.arange(first, min(first + _SEQUENCES_AT_ONCE, len(sequences))))
        X = _lagged(part.states.astype(np.float64), lags)[part.scored]  # (rows, lags features + 1)
        gram += X.T @ X
        moment += X.T @ part.targets[part.scored].astype(np.float64)
        rows += len(X)
    if rows == 0:
        raise DataError("no step is scored: need_prediction is False in every row")
    penalty = np.diag(np.r_[np.full(size - 1, alpha * rows), 0.0])  # the constant is free
    solution = np.linalg.solve(gram + penalty + 1e-9 * rows * np.eye(size), moment)
    return Ridge(solution[:-1].reshape(lags, features, width), solution[-1])


def _lagged(states: np.ndarray, lags: int) -> np.ndarray:
    """(sequences, steps, lags features + 1): the newest first, zeros before the first step, and a one."""
    parts = [np.zeros_like(states) for _ in range(lags)]
    for back, part in enumerate(parts):
        part[:, back:] = states[:, : states.shape[1] - back]
    return np.concatenate([*parts, np.ones((*states.shape[:2], 1))], axis=-1)
