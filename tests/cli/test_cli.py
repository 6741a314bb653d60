"""What holds for every command."""

import pytest
from tests.cli.command_line import mambakit
from typer.testing import CliRunner

from mambakit import __version__
from mambakit.cli import app


def test_version_is_the_packages() -> None:
    done = mambakit("--version", fresh=True)
    assert (done.returncode, done.stdout) == (0, f"mambakit {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["forecast"]),
        (["forecast"], ["train", "predict"]),
        (["forecast", "train"], ["--symbols", "--resume", "mambakit forecast train --test"]),
        (["forecast", "predict"], ["--models", "--json", "mambakit forecast predict AAPL"]),
    ],
)
def test_help_names_the_options_and_shows_examples(arguments: list[str], words: list[str]) -> None:
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0
    for word in words:
        assert word in done.stdout
