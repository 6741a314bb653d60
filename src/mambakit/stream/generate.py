"""A synthetic market with a known best prediction, in the contest's format. Synthetic: it says nothing of real scores.

The latent state z falls into blocks, and each block has a mood s = -1 or +1 that nobody sees, a Markov chain:

    z_{t+1} = A z_t + s_t (D z_t + c) + sigma e_t        e_t ~ N(0, I)
    s_{t+1} = s_t with probability STAY, else -s_t
    state   = W (z - mean)                               W mixes the blocks, and whitens

A turns z and pulls it to zero, D and c are how the mood changes that. What can be known of the mood is its posterior,
which Bayes' rule gives exactly (the forward algorithm; the blocks are independent). With the log odds l of s_t = +1,

    E[z_{t+1} | past] = A z_t + tanh(l / 2) (D z_t + c)
    l <- switch(l + 2 (z_{t+1} - A z_t) . (D z_t + c) / sigma^2)

and no prediction from the past has a smaller expected squared error. The score of this one is the attainable optimum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mambakit.errors import DataError
from mambakit.stream.contest import target_scores
from mambakit.stream.data import read_sequences
from mambakit.training.artefacts import write_file

if TYPE_CHECKING:
    import pandas as pd

BLOCKS = 4
WARM_UP = 100  # steps that are not scored
NOTE = b"mambakit.synthetic"  # the key of a file's metadata under which the optimum stands

# Chosen so that repeating the state scores about -0.35, ridge 0.33, and the best prediction 0.41.
_STAY = 0.985
_RADIUS, _ANGLE = 0.54, 1.08  # of the turns in A
_MOOD_DYNAMICS, _MOOD_LEVEL = 0.08, 0.25  # mean squared singular value of D, squared length of c
_NOISE = 0.6  # sigma^2
_SETTLING = 50  # steps before the first row, by which the start is forgotten
_WHITENING_SEQUENCES, _WHITENING_STEPS = 32, 1000


@dataclass(frozen=True)
class Block:
    """One block's dynamics, each (size, size) or (size,)."""

    A: np.ndarray
    D: np.ndarray
    c: np.ndarray


class Market:
    """One set of dynamics; sequences drawn from it by different seeds are training and test sets of each other.

    Args:
        features: width of a state, a multiple of 8.
        seed: of the dynamics.

    Raises DataError for another width.
    """

    def __init__(self, features: int = 32, seed: int = 0) -> None:
        if features < 2 * BLOCKS or features % (2 * BLOCKS) != 0:
            raise DataError(f"features must be a multiple of {2 * BLOCKS}, got {features}")
        random = np.random.default_rng([seed, 0])
        self.features = features
        self.size = features // BLOCKS
        self.blocks = [_draw_block(random, self.size) for _ in range(BLOCKS)]
        latent, _ = self._walk(random, _WHITENING_SEQUENCES, _WHITENING_STEPS)
        self._mean = latent.mean(axis=(0, 1))
        rotation = _orthogonal(random, features)
        values, vectors = np.linalg.eigh(np.cov(latent.reshape(-1, features).T))
        self.mixing = rotation @ (vectors / np.sqrt(values)) @ vectors.T  # W
        self._unmixing = np.linalg.inv(self.mixing)

    def states(self, sequences: int, steps: int, seed: int) -> np.ndarray:
        """Draw (sequences, steps, features) float32."""
        latent, _ = self._walk(np.random.default_rng([seed, 1]), sequences, steps)
        return ((latent - self._mean) @ self.mixing.T).astype(np.float32)

    def best_predictions(self, states: np.ndarray) -> np.ndarray:
        """E[next state | states up to now] at every step of (sequences, steps, features); float64."""
        latent = states.astype(np.float64) @ self._unmixing.T + self._mean
        best = np.empty_like(latent)
        for number, block in enumerate(self.blocks):
            columns = slice(number * self.size, (number + 1) * self.size)
            best[..., columns] = _filtered(block, latent[..., columns])
        return (best - self._mean) @ self.mixing.T

    def _walk(self, random: np.random.Generator, sequences: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Latent states (sequences, steps, features) and moods (sequences, steps, BLOCKS)."""
        latent, moods = np.empty((sequences, steps, self.features)), np.empty((sequences, steps, BLOCKS))
        for number, block in enumerate(self.blocks):
            z = random.standard_normal((sequences, self.size))
            mood = np.where(random.random((sequences, 1)) < 0.5, 1.0, -1.0)
            columns = slice(number * self.size, (number + 1) * self.size)
            for step in range(-_SETTLING, steps):
                if step >= 0:
                    latent[:, step, columns], moods[:, step, number] = z, mood[:, 0]
                noise = np.sqrt(_NOISE) * random.standard_normal(z.shape)
                z = z @ block.A.T + mood * (z @ block.D.T + block.c) + noise
                mood = np.where(random.random(mood.shape) < _STAY, mood, -mood)
        return latent, moods


def generate(sequences: int = 500, steps: int = 1000, features: int = 32, seed: int = 0) -> "pd.DataFrame":
    """A table in the contest's format, columns "0", "1", ...; the dynamics are the same for every seed.

    Steps from 100 on ask for a prediction, the last one excepted; sequences come in a random order of seq_ix.

    Raises DataError for too few steps or sequences, or a width that is no multiple of 8.
    """
    import pandas as pd

    if sequences < 1:
        raise DataError(f"sequences must be at least 1, got {sequences}")
    if steps < WARM_UP + 2:
        raise DataError(f"steps must be at least {WARM_UP + 2}, of which the first {WARM_UP} warm up, got {steps}")
    states = Market(features).states(sequences, steps, seed)
    order = np.random.default_rng([seed, 2]).permutation(sequences)
    step = np.tile(np.arange(steps), sequences)
    keys = {
        "seq_ix": np.repeat(order, steps),
        "step_in_seq": step,
        "need_prediction": (step >= WARM_UP) & (step < steps - 1),
    }
    values = states.reshape(-1, features)
    return pd.DataFrame({**keys, **{str(column): values[:, column] for column in range(features)}})


def reference_scores(table: "pd.DataFrame") -> dict[str, float]:
    """Mean R2 of the best prediction ("attainable") and of repeating the state ("repeat") on a generated table."""
    sequences = read_sequences(table)
    truth = sequences.targets[sequences.scored]
    best = Market(sequences.states.shape[-1]).best_predictions(sequences.states)[sequences.scored]
    names = sequences.layout.targets
    return {
        "attainable": target_scores(truth, best, names)["mean_r2"],
        "repeat": target_scores(truth, sequences.states[sequences.scored], names)["mean_r2"],
    }


def write_generated(path: str | Path, table: "pd.DataFrame", scores: Mapping[str, float]) -> None:
    """Write a generated table as parquet, with a note in its metadata that it is synthetic and what is attainable.

    The same table gives the same bytes. Raises ArtefactError where it cannot be written.
    """
    import io
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.Table.from_pandas(table, preserve_index=False)
    note = json.dumps({"synthetic": True, **scores}).encode()
    buffer = io.BytesIO()
    pq.write_table(content.replace_schema_metadata({**(content.schema.metadata or {}), NOTE: note}), buffer)
    write_file(path, buffer.getvalue())


def attainable_score(path: str | Path) -> float | None:
    """The attainable mean R2 noted in a generated file; None for any other file."""
    import json

    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot read {path}: expected a parquet file in the contest's format ({reason})") from error
    return float(json.loads(metadata[NOTE])["attainable"]) if NOTE in metadata else None


def _draw_block(random: np.random.Generator, size: int) -> Block:
    turns = np.zeros((size, size))
    cosine, sine = _RADIUS * np.cos(_ANGLE), _RADIUS * np.sin(_ANGLE)
    for first in range(0, size, 2):
        turns[first : first + 2, first : first + 2] = [[cosine, -sine], [sine, cosine]]
    basis = _orthogonal(random, size)
    level = random.standard_normal(size)
    return Block(
        A=basis @ turns @ basis.T,
        D=np.sqrt(_MOOD_DYNAMICS) * _orthogonal(random, size),
        c=np.sqrt(_MOOD_LEVEL) * level / np.linalg.norm(level),
    )


def _orthogonal(random: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(random.standard_normal((size, size)))[0]


def _filtered(block: Block, z: np.ndarray) -> np.ndarray:
    """E[z_{t+1} | z_0..z_t] (sequences, steps, size) by the forward algorithm."""
    steady, moody = z @ block.A.T, z @ block.D.T + block.c
    evidence = np.zeros(z.shape[:-1])
    evidence[:, 1:] = 2 / _NOISE * ((z[:, 1:] - steady[:, :-1]) * moody[:, :-1]).sum(axis=-1)
    log_odds = np.zeros(len(z))
    best = np.empty_like(z)
    for step in range(z.shape[1]):
        # Of the mood that made the step to here; the mood that will make the next one may have switched since.
        believed = np.tanh((log_odds + evidence[:, step]) / 2) * (2 * _STAY - 1)
        best[:, step] = steady[:, step] + believed[:, None] * moody[:, step]
        log_odds = 2 * np.arctanh(believed)
    return best
