"""The contest's tables as arrays: read, checked row by row, and split by sequence.

    seq_ix, step_in_seq, need_prediction, then the features, whatever they are called

A table is refused, in one line that names the first row at fault, unless every sequence is one run of rows with steps
0, 1, 2, ..., every number is finite, and every prediction that is asked for has something to be compared with. So a
sequence may be shorter than the others, but not cut off after a row that asks for a prediction of the next state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mambakit.errors import DataError
from mambakit.stream.contest import FIRST_COLUMNS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Layout:
    """Which columns are which."""

    features: tuple[str, ...]
    targets: tuple[str, ...]  # the features themselves where the next state is the target
    same_row: bool  # whether targets are columns of their own, to be predicted on the row itself


@dataclass(frozen=True)
class Sequences:
    """Sequences of equal or unequal length, the shorter ones padded at their end with zeros that are not scored."""

    seq_ix: np.ndarray  # (sequences,) int64
    lengths: np.ndarray  # (sequences,) int64
    states: np.ndarray  # (sequences, steps, features) float32
    targets: np.ndarray  # (sequences, steps, targets) float32: what a prediction made at this step is compared with
    scored: np.ndarray  # (sequences, steps) bool
    layout: Layout

    def __len__(self) -> int:
        return len(self.seq_ix)

    def take(self, positions: np.ndarray) -> "Sequences":
        """The sequences at these positions."""
        return Sequences(
            self.seq_ix[positions],
            self.lengths[positions],
            self.states[positions],
            self.targets[positions],
            self.scored[positions],
            self.layout,
        )


def read_sequences(dataset: "str | Path | pd.DataFrame", targets: Sequence[str] = ()) -> Sequences:
    """Read and check a parquet file in the contest's format, or such a table.

    Args:
        targets: columns to predict on the row itself; none: the next row's state.

    Raises DataError as `check_table` does.
    """
    table = read_table(dataset) if isinstance(dataset, str | Path) else dataset
    layout = check_table(table, targets, str(dataset) if isinstance(dataset, str | Path) else "the table")
    seq_ix = table["seq_ix"].to_numpy(np.int64)
    starts = np.flatnonzero(np.r_[True, seq_ix[1:] != seq_ix[:-1]])
    lengths = np.diff(np.r_[starts, len(seq_ix)])
    row, step = np.repeat(np.arange(len(starts)), lengths), table["step_in_seq"].to_numpy(np.int64)

    def padded(values: np.ndarray) -> np.ndarray:
        whole = np.zeros((len(starts), lengths.max(), *values.shape[1:]), values.dtype)
        whole[row, step] = values
        return whole

    states = padded(table[list(layout.features)].to_numpy(np.float32))
    scored = padded(table["need_prediction"].to_numpy(bool))
    if layout.same_row:
        wanted = padded(table[list(layout.targets)].to_numpy(np.float32))
    else:
        wanted = np.zeros_like(states)
        wanted[:, :-1] = states[:, 1:]
    return Sequences(seq_ix[starts], lengths, states, wanted, scored, layout)


def read_table(path: str | Path) -> "pd.DataFrame":
    """The table in a parquet file; raises DataError where there is none."""
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not there: expected a parquet file in the contest's format")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot read {path}: expected a parquet file in the contest's format ({reason})") from error


def check_table(table: "pd.DataFrame", targets: Sequence[str] = (), name: str = "the table") -> Layout:
    """Which columns of a table are which.

    Raises DataError, naming the table and the first row at fault, for columns missing or not numbers, no rows, NaN or
    infinite values, a sequence that is not one run of steps 0, 1, 2, ..., or a prediction of a row that is not there.
    """
    layout = _layout(table, targets, name)
    if len(table) == 0:
        raise DataError(f"{name} has no rows")
    keys = _whole_numbers(table, name)
    _check_order(keys["seq_ix"], keys["step_in_seq"], name)
    _check_values(table, layout, keys, name)
    if not layout.same_row:
        _check_last_rows(keys, name)
    return layout


def split_sequences(sequences: Sequences, validation_share: float, seed: int) -> tuple[Sequences, Sequences]:
    """Training and validation parts: whole sequences, drawn by the seed.

    Raises DataError where there are fewer than two sequences.
    """
    if len(sequences) < 2:
        raise DataError(f"{len(sequences)} sequence is too few: one part trains and another validates, so at least 2")
    order = np.random.default_rng(seed).permutation(len(sequences))
    validation = min(max(1, round(validation_share * len(sequences))), len(sequences) - 1)
    return sequences.take(np.sort(order[validation:])), sequences.take(np.sort(order[:validation]))


def _layout(table: "pd.DataFrame", targets: Sequence[str], name: str) -> Layout:
    import pandas as pd

    columns = [str(column) for column in table.columns]
    if tuple(columns[:3]) != FIRST_COLUMNS:
        raise DataError(f"{name}: the first columns must be {', '.join(FIRST_COLUMNS)}, got {', '.join(columns[:3])}")
    for target in targets:
        if target not in columns[3:]:
            raise DataError(f"{name} has no column {target!r} to predict; it has {_some(columns[3:])}")
    features = tuple(column for column in columns[3:] if column not in targets)
    if not features:
        raise DataError(f"{name} has no feature: expected columns after {FIRST_COLUMNS[-1]}")
    if len(set(columns)) < len(columns):
        raise DataError(f"{name} has two columns of the same name")
    for position, column in enumerate(columns):
        if not pd.api.types.is_numeric_dtype(table.dtypes.iloc[position]):
            raise DataError(f"{name}: column {column!r} must hold numbers, got {table.dtypes.iloc[position]}")
    return Layout(features, tuple(targets) or features, bool(targets))


def _whole_numbers(table: "pd.DataFrame", name: str) -> dict[str, np.ndarray]:
    keys = {}
    for column in FIRST_COLUMNS:
        values = table[column].to_numpy(np.float64, na_value=np.nan)
        bad = ~np.isfinite(values) | (values != np.round(values))
        if column == "need_prediction":
            bad |= (values != 0) & (values != 1)
        if bad.any():
            row = int(np.argmax(bad))
            wanted = "True or False" if column == "need_prediction" else "whole numbers"
            raise DataError(f"{name}: {column} must hold {wanted}, got {table[column].iloc[row]!r} in row {row}")
        keys[column] = values.astype(np.int64)
    return keys


def _check_order(seq_ix: np.ndarray, steps: np.ndarray, name: str) -> None:
    starts = np.r_[True, seq_ix[1:] != seq_ix[:-1]]
    begun, again = np.unique(seq_ix[starts], return_counts=True)
    if (again > 1).any():
        raise DataError(f"{name}: the rows of sequence {begun[np.argmax(again > 1)]} are not one run; sort the table")
    expected = np.where(starts, 0, np.r_[0, steps[:-1] + 1])
    wrong = steps != expected
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{name}: sequence {seq_ix[row]} has step {steps[row]} in row {row} where step {expected[row]} is "
            "expected; every sequence must run 0, 1, 2, ..."
        )


def _check_values(table: "pd.DataFrame", layout: Layout, keys: dict[str, np.ndarray], name: str) -> None:
    # Not both as one list: targets that are the next state are the features.
    columns = [*layout.features, *(layout.targets if layout.same_row else ())]
    for column in columns:
        # In float32, as models see it: 1e300 is infinite there.
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(table[column].to_numpy(np.float64, na_value=np.nan).astype(np.float32))
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(
                f"{name}: column {column!r} is {table[column].iloc[row]} in row {row} "
                f"(sequence {keys['seq_ix'][row]}, step {keys['step_in_seq'][row]}); expected finite numbers"
            )


def _check_last_rows(keys: dict[str, np.ndarray], name: str) -> None:
    last = np.r_[keys["seq_ix"][1:] != keys["seq_ix"][:-1], True]
    bad = last & (keys["need_prediction"] == 1)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"{name}: sequence {keys['seq_ix'][row]} ends at step {keys['step_in_seq'][row]} with a row that asks for "
            "a prediction of the next state, which is missing; drop the sequence, or set that need_prediction to False"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
