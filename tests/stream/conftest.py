"""Tables of the contest's format, small enough for milliseconds, and networks with random weights on them."""

import sys
from pathlib import Path

import pandas as pd
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from mambakit.stream.data import Sequences, read_sequences  # noqa: E402
from mambakit.stream.generate import generate  # noqa: E402


@pytest.fixture(scope="session")
def table() -> pd.DataFrame:
    """Six sequences of 120 steps, 8 features, the first 100 steps not scored."""
    return generate(6, 120, 8)


@pytest.fixture(scope="session")
def sequences(table: pd.DataFrame) -> Sequences:
    return read_sequences(table)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
