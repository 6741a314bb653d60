"""Running standardisation within a sequence, by Welford's recurrence (1962).

    mean_n = mean_{n-1} + (x_n - mean_{n-1}) / n
    M_n    = M_{n-1} + (x_n - mean_{n-1}) (x_n - mean_n)
    y_n    = (x_n - mean_n) / sqrt(max(M_n / n, FLOOR))

The floor is what keeps y finite: after one tick every variance is 0, and for a feature that never moves it stays so.
Dividing by it unguarded gives 0/0, a NaN that a recurrent state then carries to the end of the sequence.
"""

import numpy as np

FLOOR = 1e-8


class SequenceNormalizer:
    """Standardises tick by tick, or whole sequences at once; the two agree to rounding.

    Args:
        inputs: numbers in what is standardised.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new sequence begins."""
        self._count = 0
        self._mean = np.zeros(self.inputs)
        self._sum = np.zeros(self.inputs)

    def update(self, values: np.ndarray) -> np.ndarray:
        """Take the next values (inputs,), and return them standardised by all so far, float32."""
        x = np.asarray(values, dtype=np.float64)
        self._count += 1
        before = x - self._mean
        self._mean += before / self._count
        after = x - self._mean
        self._sum += before * after
        return (after / np.sqrt(np.maximum(self._sum / self._count, FLOOR))).astype(np.float32)

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Whole sequences (..., steps, inputs), each step standardised by the steps up to it; float32."""
        x = np.asarray(values, dtype=np.float64)
        if x.shape[-1] != self.inputs:
            raise ValueError(f"values must have {self.inputs} inputs, got {x.shape[-1]}")
        mean, total = np.zeros(x.shape[:-2] + x.shape[-1:]), np.zeros(x.shape[:-2] + x.shape[-1:])
        out = np.empty(x.shape, dtype=np.float32)
        for step in range(x.shape[-2]):
            before = x[..., step, :] - mean
            mean += before / (step + 1)
            after = x[..., step, :] - mean
            total += before * after
            out[..., step, :] = after / np.sqrt(np.maximum(total / (step + 1), FLOOR))
        return out
