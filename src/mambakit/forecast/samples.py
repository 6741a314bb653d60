"""Samples of a series in the form that the training loop asks for: a length, and batches by index.

Windows: a sample is a window, and its last day is forecast from. Windows overlap by all but one row, so they are not
stored: a batch gathers its rows when it is asked for.

Sequences: a sample is a whole run of days, and every day of it is forecast from. Nothing is read twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Batch = dict[str, Tensor]


class WindowData:
    """Windows of a series.

    Args:
        features: (days, columns) float32, standardised.
        volatility: (days,), terms: (days, terms), known at each day's close.
        returns: (samples, horizons), the targets.
        origins: (samples,) each sample's last row of features.
        sequence_length: rows in a window.
        symbols: (samples,) the number of each sample's symbol in a pooled model; all 0 by default.
    """

    def __init__(
        self,
        features: np.ndarray,
        volatility: np.ndarray,
        terms: np.ndarray,
        returns: np.ndarray,
        origins: np.ndarray,
        sequence_length: int,
        symbols: np.ndarray | None = None,
    ) -> None:
        self._features = torch.from_numpy(features)
        self._returns = torch.from_numpy(returns.astype(np.float32))
        self._volatility = torch.from_numpy(volatility[origins].astype(np.float32))
        self._terms = torch.from_numpy(terms.astype(np.float32))
        self.symbols = torch.zeros(len(origins), dtype=torch.long) if symbols is None else torch.from_numpy(symbols)
        self._rows = torch.from_numpy(origins)[:, None] + torch.arange(1 - sequence_length, 1)  # (samples, length)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor) -> Batch:
        """Features (batch, length, columns), volatility (batch,) of the last day, terms (batch, length, terms) and
        returns (batch, horizons), all float32, and symbol (batch,) int64."""
        rows = self._rows[indices]
        return {
            "features": self._features[rows],
            "volatility": self._volatility[indices],
            "terms": self._terms[rows],
            "returns": self._returns[indices],
            "symbol": self.symbols[indices],
        }


@dataclass(frozen=True)
class DaySequence:
    """A run of days, complete, oldest first."""

    features: Tensor  # (days, columns) float32, standardised
    volatility: Tensor  # (days,) float32
    terms: Tensor  # (days, terms) float32
    returns: Tensor  # (days, horizons) float32, the targets; 0 where there are none
    counted: Tensor  # (days,) float32, 1 for the days that are learnt from or judged
    symbol: int = 0  # its number in a pooled model

    def __len__(self) -> int:
        return len(self.features)

    def cut(self, pieces: int) -> "list[DaySequence]":
        """The same days as `pieces` runs of about equal length, each of which begins without a past."""
        bounds = [round(len(self) * piece / pieces) for piece in range(pieces + 1)]
        return [
            DaySequence(
                self.features[start:end],
                self.volatility[start:end],
                self.terms[start:end],
                self.returns[start:end],
                self.counted[start:end],
                self.symbol,
            )
            for start, end in pairwise(bounds)
        ]


class SequenceData:
    """Whole sequences; those of one batch are padded at their ends, which no earlier day can see."""

    def __init__(self, sequences: Sequence[DaySequence]) -> None:
        self.sequences = tuple(sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def symbols(self) -> Tensor:
        """Of every day that counts, in order, the number of its symbol (days,) int64."""
        return torch.cat(
            [torch.full((int(each.counted.sum()),), each.symbol, dtype=torch.long) for each in self.sequences]
        )

    def batch(self, indices: Tensor) -> Batch:
        """Features (batch, length, columns), volatility and counted (batch, length), terms (batch, length, terms) and
        returns (batch, length, horizons), all float32, and symbol (batch,) int64."""
        chosen = [self.sequences[index] for index in indices.tolist()]
        names = ("features", "volatility", "terms", "returns", "counted")
        batch = {name: pad_sequence([getattr(each, name) for each in chosen], batch_first=True) for name in names}
        longest = batch["volatility"].shape[1]
        past_end = torch.arange(longest) >= torch.tensor([len(each) for each in chosen])[:, None]
        batch["volatility"][past_end] = 1.0  # a scale to divide by, of days that do not count
        return batch | {"symbol": torch.tensor([each.symbol for each in chosen])}
