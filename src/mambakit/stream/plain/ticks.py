"""From rows of the contest's table to what a model reads: order, width and finiteness checked, features made.

A row that can't be right is refused before anything has moved, so that no score is silently wrong.
"""

import numpy as np

from .features import FeatureEngineer
from .normaliser import SequenceNormalizer


class TickReader:
    """Checks rows, sees where sequences begin, and carries what features, normaliser and ridge remember.

    Args:
        inputs: numbers in a state.
        engineered: whether features are made.
        normalise: whether they are standardised within the sequence.
        lags: states that ridge sees; 0 for none.
        error: the class of the errors raised.
    """

    def __init__(
        self, inputs: int, engineered: bool, normalise: bool, lags: int = 0, error: type[Exception] = ValueError
    ) -> None:
        self._inputs, self._error = inputs, error
        self._engineer = FeatureEngineer(inputs) if engineered else None
        outputs = self._engineer.outputs if self._engineer else inputs
        self._normaliser = SequenceNormalizer(outputs) if normalise else None
        self._seq_ix: int | None = None
        self._step = -1
        self.lagged = np.zeros((lags, inputs), dtype=np.float32)  # the newest first

    def read(self, seq_ix: int, step: int, state: np.ndarray) -> tuple[np.ndarray, bool]:
        """What the model reads, float32, and whether a sequence begins here and its state must be forgotten.

        Raises an error of the class given for a step out of order, a wrong width, or a value that is not finite.
        """
        begins = seq_ix != self._seq_ix
        expected = 0 if begins else self._step + 1
        if step != expected:
            raise self._error(
                f"sequence {seq_ix}: step {step} came where step {expected} was expected; rows must come in order"
            )
        try:
            # The contest's rows are arrays of objects; and what float32 can't hold is infinite, and refused as such.
            with np.errstate(over="ignore"):
                x = np.asarray(state, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise self._error(f"sequence {seq_ix}, step {step}: the state must hold numbers ({error})") from error
        if x.shape != (self._inputs,):
            raise self._error(
                f"sequence {seq_ix}, step {step}: expected a state of shape ({self._inputs},), got {x.shape}"
            )
        if not np.isfinite(x).all():
            raise self._error(f"sequence {seq_ix}, step {step}: the state holds NaN or infinite values")
        self._seq_ix, self._step = seq_ix, step
        if begins:
            self._forget()
        if len(self.lagged):
            self.lagged[1:] = self.lagged[:-1]
            self.lagged[0] = x
        values = x if self._engineer is None else self._engineer.update(x)
        return (values if self._normaliser is None else self._normaliser.update(values)), begins

    def _forget(self) -> None:
        self.lagged[:] = 0
        if self._engineer is not None:
            self._engineer.reset()
        if self._normaliser is not None:
            self._normaliser.reset()
