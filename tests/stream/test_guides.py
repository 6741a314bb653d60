"""The guides name commands and options that exist, and the two languages name the same."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from mambakit.cli import app

DOCS = Path(__file__).parents[2] / "docs" / "how-to"
GUIDES = ("predict-a-stream.md", "predict-a-stream.ru.md")
COMMANDS = typer.main.get_command(app).commands["stream"].commands


def commands(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"^mambakit (stream .*)$", text, flags=re.MULTILINE)


def options(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    return sorted(re.findall(r"`(--[a-z][^`]*)`", text))


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_parses(name):
    assert len(commands(name)) == 7
    for line in commands(name):
        _, command, *arguments = shlex.split(line)
        COMMANDS[command].make_context(command, arguments)


@pytest.mark.parametrize("name", GUIDES)
def test_every_option_of_training_parses(name):
    known = [line for line in options(name) if not line.startswith("--proxy")]
    assert len(known) > 10
    for line in known:
        arguments = shlex.split(line)
        if arguments in (["--out"], ["--d-model"]):  # named without a value
            continue
        COMMANDS["train"].make_context("train", ["--data", "train.parquet", *arguments])


def test_both_languages_have_the_same_commands_and_options():
    assert commands(GUIDES[0]) == commands(GUIDES[1])
    assert options(GUIDES[0]) == options(GUIDES[1])


def test_both_languages_have_the_same_numbers():
    numbers = [re.findall(r"\d\.\d+", (DOCS / name).read_text(encoding="utf-8")) for name in GUIDES]
    assert sorted(numbers[0]) == sorted(numbers[1])
