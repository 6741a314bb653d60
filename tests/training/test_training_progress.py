"""A run shows a bar on a terminal, about ten lines elsewhere, and nothing when quiet."""

import io

import pytest
import rich.console
from tests.training.toy import squared_error, toy_model, training_data, validation_data

from mambakit.training import TrainingConfig, fit, progress


def run(epochs=40, **options):
    config = TrainingConfig(epochs=epochs, patience=None)
    return fit(toy_model(), squared_error, training_data(), validation_data(), config, **options)


def test_quiet_is_silent(capsys):
    run(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_about_ten_lines_tell_losses_and_time_left(capsys):
    run(description="[BTC] horizon")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("[BTC] horizon: epoch 0/40, validation ")
    assert all(" left" in line and "best" in line for line in lines[1:-1])
    assert "epoch 40/40" in lines[-1]
    assert "took" in lines[-1]


def test_on_a_terminal_there_is_one_bar(monkeypatch):
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "Console", lambda: terminal)
    run(epochs=3, description="[BTC] horizon")
    assert "[BTC] horizon" in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert "validation" in screen.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.7, "1 min 00 s"), (3725, "1 h 02 min")])
def test_durations_read_well(seconds, text):
    assert progress._duration(seconds) == text
