"""One tick through each kind of recurrent layer, in NumPy: what mambakit.nn computes, for all networks of an ensemble.

Every array begins with an axis of networks: a vector x is (models, d_model), a weight (models, rows, columns). A layer
holds its weights and its state, and `layer.step(x)` moves the state on.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

Weights = Mapping[str, np.ndarray]


def product(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(models, rows, columns) times (models, columns): (models, rows)."""
    return np.matmul(weight, x[:, :, None])[:, :, 0]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x (..., size) over the root of its mean square, times the weight."""
    square = np.add.reduce(x * x, axis=-1, keepdims=True)
    return x * (weight / np.sqrt(square / np.float32(x.shape[-1]) + np.float32(eps)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(np.float32(0), x)


class Convolution:
    """The causal convolution of the last inputs, one filter a channel, and its SiLU."""

    def __init__(self, weights: Weights) -> None:
        self._taps, self._bias = weights["conv_weight"], weights["conv_bias"]  # (models, width, channels), (m, c)
        self.reset()

    def reset(self) -> None:
        self._past = np.zeros_like(self._taps)  # the newest last

    def step(self, x: np.ndarray) -> np.ndarray:
        self._past[:, :-1] = self._past[:, 1:]
        self._past[:, -1] = x
        return silu(np.add.reduce(self._past * self._taps, axis=1) + self._bias)


class Mamba:
    """Mamba-1: src/mambakit/nn/mamba.py."""

    def __init__(self, weights: Weights, eps: float) -> None:
        self._w = weights
        self._A = weights["A"]  # (models, dim, state), negative
        self._rank, self._state_size = weights["dt_proj"].shape[-1], self._A.shape[-1]
        self._convolution = Convolution(weights)
        self.reset()

    def reset(self) -> None:
        self._convolution.reset()
        self._h = np.zeros_like(self._A)

    def step(self, x: np.ndarray) -> np.ndarray:
        w, rank, size = self._w, self._rank, self._state_size
        xz = product(w["in_proj"], x)
        dim = xz.shape[-1] // 2
        u = self._convolution.step(xz[:, :dim])
        made = product(w["x_proj"], u)
        B, C = made[:, None, rank : rank + size], made[:, rank + size :]
        dt = softplus(product(w["dt_proj"], made[:, :rank]) + w["dt_bias"])
        h = np.exp(dt[:, :, None] * self._A)
        h *= self._h
        h += (dt * u)[:, :, None] * B
        self._h = h
        y = product(h, C) + w["D"] * u
        return product(w["out_proj"], y * silu(xz[:, dim:]))


class Mamba2:
    """Mamba-2: src/mambakit/nn/mamba2.py."""

    def __init__(self, weights: Weights, eps: float) -> None:
        self._w, self._eps = weights, eps
        self._A = weights["A"]  # (models, heads), negative
        models, self._heads = self._A.shape
        self._dim = weights["norm"].shape[-1]
        self._size = (weights["conv_weight"].shape[-1] - self._dim) // 2
        self._h_shape = (models, self._heads, self._dim // self._heads, self._size)
        self._convolution = Convolution(weights)
        self.reset()

    def reset(self) -> None:
        self._convolution.reset()
        self._h = np.zeros(self._h_shape, dtype=np.float32)

    def step(self, x: np.ndarray) -> np.ndarray:
        w, dim, size = self._w, self._dim, self._size
        made = product(w["in_proj"], x)
        z, dt = made[:, :dim], softplus(made[:, -self._heads :] + w["dt_bias"])
        convolved = self._convolution.step(made[:, dim : -self._heads])
        u = convolved[:, :dim].reshape(self._h_shape[:3])  # (models, heads, headdim)
        B, C = convolved[:, None, None, dim : dim + size], convolved[:, dim + size :]
        self._h *= np.exp(dt * self._A)[:, :, None, None]
        self._h += (dt[:, :, None] * u)[..., None] * B
        y = product(self._h.reshape(len(x), dim, size), C) + (w["D"][:, :, None] * u).reshape(len(x), dim)
        return product(w["out_proj"], rms_norm(y * silu(z), w["norm"], self._eps))


class Mamba3:
    """Mamba-3 with one input and output a head: src/mambakit/nn/mamba3.py, ops/reference/mamba3_scan.py."""

    def __init__(self, weights: Weights, eps: float) -> None:
        self._w, self._eps = weights, eps
        models, heads, size = weights["B_bias"].shape
        dim = weights["out_proj"].shape[-1]
        self._shape = (models, heads, dim // heads)
        pairs = weights["in_proj"].shape[1] - 2 * dim - 2 * size - 3 * heads
        self._bounds = np.cumsum([dim, dim, size, size, heads, heads, heads]).tolist()
        self._pairs, self._size = pairs, size
        self.reset()

    def reset(self) -> None:
        models, heads, headdim = self._shape
        self._angle = np.zeros((models, heads, self._pairs))
        self._h = np.zeros((models, heads, headdim, self._size), dtype=np.float32)
        self._key = np.zeros((models, heads, self._size), dtype=np.float32)
        self._x = np.zeros(self._shape, dtype=np.float32)

    def step(self, x: np.ndarray) -> np.ndarray:
        w = self._w
        z, u, B, C, dt, A, trap, angles = np.split(product(w["in_proj"], x), self._bounds, axis=1)
        u = u.reshape(self._shape)
        dt, trap = softplus(dt + w["dt_bias"]), sigmoid(trap)  # (models, heads)
        decay = np.exp(dt * np.minimum(-softplus(A), -w["A_floor"]))
        turn = np.float32(np.pi) * np.tanh(angles)[:, None, :] * dt[:, :, None]
        self._angle = np.mod(self._angle + turn, 2 * np.pi)  # in float64: it adds up over the sequence
        cos, sin = np.cos(self._angle).astype(np.float32), np.sin(self._angle).astype(np.float32)
        key = _rotated(rms_norm(B, w["B_norm"], self._eps)[:, None] + w["B_bias"], cos, sin)
        query = _rotated(rms_norm(C, w["C_norm"], self._eps)[:, None] + w["C_bias"], cos, sin)
        self._h *= decay[:, :, None, None]
        self._h += ((dt * decay * (1 - trap))[:, :, None] * self._x)[..., None] * self._key[:, :, None]
        self._h += ((dt * trap)[:, :, None] * u)[..., None] * key[:, :, None]
        self._key, self._x = key, u
        y = np.matmul(self._h, query[..., None])[..., 0] + w["D"][:, :, None] * u
        return product(w["out_proj"], y.reshape(len(x), -1) * silu(z))


def _rotated(vectors: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn the first pairs of coordinates (2i, 2i + 1) of (models, heads, state) by angles (models, heads, pairs)."""
    turned, pairs = vectors.copy(), cos.shape[-1]
    first, second = vectors[..., 0 : 2 * pairs : 2], vectors[..., 1 : 2 * pairs : 2]
    turned[..., 0 : 2 * pairs : 2] = first * cos - second * sin
    turned[..., 1 : 2 * pairs : 2] = first * sin + second * cos
    return turned


class S4D:
    """S4D, its convolution's recurrence: src/mambakit/nn/s4d.py. Real and imaginary parts lie side by side."""

    def __init__(self, weights: Weights, eps: float) -> None:
        self._w = weights
        self._decay, self._entry, self._exit = (  # (models, d_model, modes) complex
            weights[name][..., 0] + 1j * weights[name][..., 1] for name in ("Ab", "Bb", "C")
        )
        self.reset()

    def reset(self) -> None:
        self._h = np.zeros_like(self._decay)

    def step(self, x: np.ndarray) -> np.ndarray:
        w = self._w
        self._h = self._decay * self._h + self._entry * x[:, :, None]
        y = 2 * np.add.reduce(self._exit * self._h, axis=-1).real + w["D"] * x
        out = product(w["out_proj"], gelu(y)) + w["out_bias"]
        half = out.shape[-1] // 2
        return out[:, :half] * sigmoid(out[:, half:])


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x), by the error function of Abramowitz and Stegun 7.1.26 in float64, whose error is below 1.5e-7."""
    a = np.abs(x.astype(np.float64)) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * a)
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    error = np.sign(x) * (1 - series * np.exp(-a * a))
    return (0.5 * x * (1 + error)).astype(np.float32)


class GRU:
    """One layer of torch.nn.GRU."""

    def __init__(self, weights: Weights, eps: float) -> None:
        self._w = weights
        self.reset()

    def reset(self) -> None:
        models, rows, _ = self._w["weight_hh"].shape
        self._h = np.zeros((models, rows // 3), dtype=np.float32)

    def step(self, x: np.ndarray) -> np.ndarray:
        w, n = self._w, self._h.shape[-1]
        entering = product(w["weight_ih"], x) + w["bias_ih"]
        carried = product(w["weight_hh"], self._h) + w["bias_hh"]
        gates = sigmoid(entering[:, : 2 * n] + carried[:, : 2 * n])
        new = np.tanh(entering[:, 2 * n :] + gates[:, :n] * carried[:, 2 * n :])
        self._h = new + gates[:, n:] * (self._h - new)
        return self._h


class LSTM:
    """One layer of torch.nn.LSTM."""

    def __init__(self, weights: Weights, eps: float) -> None:
        self._w = weights
        self.reset()

    def reset(self) -> None:
        models, rows, _ = self._w["weight_hh"].shape
        self._h, self._c = np.zeros((2, models, rows // 4), dtype=np.float32)

    def step(self, x: np.ndarray) -> np.ndarray:
        w, n = self._w, self._h.shape[-1]
        gates = product(w["weight_ih"], x) + w["bias_ih"] + product(w["weight_hh"], self._h) + w["bias_hh"]
        opened = sigmoid(gates)
        self._c = opened[:, n : 2 * n] * self._c + opened[:, :n] * np.tanh(gates[:, 2 * n : 3 * n])
        self._h = opened[:, 3 * n :] * np.tanh(self._c)
        return self._h


class Layer(Protocol):
    """What every class here is."""

    def reset(self) -> None:
        """A new sequence begins."""

    def step(self, x: np.ndarray) -> np.ndarray:
        """x and y (models, d_model); the state moves on."""


MIXERS: dict[str, Callable[[Weights, float], Layer]] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "s4d": S4D,
    "gru": GRU,
    "lstm": LSTM,
}
