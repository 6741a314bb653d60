"""Every command that a page shows exists, with the options and the values it is shown with."""

import os
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
import typer.main
from tests.docs.pages import PAGES, ROOT, blocks, name
from tests.warm_processes import run_module

from mambakit.cli import app

SHELL = ("", "console", "bash", "sh")


def commands(page: Path) -> list[str]:
    """The command lines of a page, in blocks and in prose; variables that are set before them are left out."""
    lines = [
        line
        for block in blocks(page)
        if block.language in SHELL
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [line for line in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose) if not line.endswith((" ...", "<command>"))]
    return [re.sub(r"^(?:\w+=\S* )+", "", line.replace("\n", " ").strip()) for line in lines]


def arguments(line: str) -> list[str]:
    """A command line's words. Where no # stands before it, two or more spaces end the command: a remark follows."""
    return shlex.split(re.split(r" {2,}", line, maxsplit=1)[0], comments=True)


SHOWN = [(page, line) for page in PAGES for line in commands(page)]


def those(*beginnings: str) -> list[object]:
    return [
        pytest.param(line, id=f"{name(page)}: {line[:60]}")
        for page, line in dict.fromkeys(SHOWN)
        if line.startswith(beginnings)
    ]


@pytest.mark.parametrize("line", those("mambakit ", "accelerate launch -m mambakit.cli "))
def test_a_command_of_mambakit_parses(line: str) -> None:
    words = arguments(line.replace("accelerate launch -m mambakit.cli", "mambakit"))[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"{line}: there is no command {words[0]}"
        command = command.commands[words.pop(0)]
    if words:  # prose may name a command, or a room of them, and no more
        command.make_context(command.name, words)


@pytest.mark.parametrize("line", those("python -m benchmarks", "python -m mambakit.compat", "python -m tools."))
def test_a_module_has_the_options_it_is_shown_with(line: str) -> None:
    words = arguments(line)
    module, options = words[2], [word.partition("=")[0] for word in words[3:] if word.startswith("--")]
    if module == "mambakit.compat":
        options = []  # those are the program's own
    helped = help_of(module)
    assert [option for option in options if option not in helped] == []


@lru_cache
def help_of(module: str) -> str:
    done = run_module(module, "--help", cwd=ROOT, environment=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", those("make "))
def test_a_target_of_make_exists(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in arguments(line)[1:] if "=" not in word]
    variables = [word.partition("=")[0] for word in arguments(line)[1:] if "=" in word]
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    assert all(re.search(rf"^{variable} \?=", makefile, flags=re.MULTILINE) for variable in variables)


def test_an_extra_that_is_installed_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {
        extra.strip()
        for page in PAGES
        for listed in re.findall(r"pip install '(?:\.|mambakit)\[([\w, -]+)\]'", page.read_text(encoding="utf-8"))
        for extra in listed.split(",")
    }
    assert {"lm", "onnx", "ray"} <= extras
    assert all(re.search(rf"^{re.escape(extra)} = \[", project, flags=re.MULTILINE) for extra in extras)


def test_commands_are_found_on_most_pages() -> None:
    assert len({page for page, line in SHOWN if line.startswith("mambakit ")}) > 8
