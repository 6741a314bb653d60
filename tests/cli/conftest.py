"""Models that one command trained, for the tests of the others."""

import subprocess
from pathlib import Path

import pytest
from tests.cli.command_line import SMALL, mambakit


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with small models of two symbols, and what the training printed."""
    models = tmp_path_factory.mktemp("trained") / "models"
    return models, mambakit("forecast", "train", "--symbols", "aapl,GOOGL", *SMALL, "--out", models, fresh=True)
