"""The reference's pages, written when the documentation is built: the public names of each room, and the commands."""

import inspect
import re
from functools import lru_cache
from importlib import import_module
from typing import Any

import griffe

ROOMS = {
    "ops": "Operations",
    "nn": "Layers",
    "training": "Training",
    "forecast": "Forecasting",
    "stream": "Streaming",
    "lm": "Language models",
    "lab": "The lab",
    "export": "Export",
    "compat": "Stand-ins",
}
# Packages within a room that have public names of their own.
WITHIN = {"lab": ("background", "mechanisms", "tasks")}


def room_page(room: str) -> str:
    """A page of the public names of `mambakit.<room>`, each where it is defined, for mkdocstrings to fill in.

    A name that is defined in another room is on that room's page.
    """
    package = import_module(f"mambakit.{room}")
    lines = [f"# {ROOMS[room]}: `mambakit.{room}`", "", _prose(package.__doc__), ""]
    for within in [package, *(import_module(f"{package.__name__}.{name}") for name in WITHIN.get(room, ()))]:
        if within is not package:
            lines += [f"## `{within.__name__}`", "", _prose(within.__doc__), ""]
        homes = [_home(within, name) for name in within.__all__]
        lines += [line for home in homes if home.startswith(package.__name__) for line in (f"::: {home}", "")]
    return "\n".join(lines)


def _home(package: Any, name: str) -> str:
    """The full name under which a public name is defined."""
    lazy = getattr(package, "_HOME", {}).get(name)
    path = f"{package.__name__}.{lazy}.{name}" if lazy else f"{package.__name__}.{name}"
    found = _sources()[path.partition(".")[2]]
    found = found.final_target if found.is_alias else found
    return f"{found.path}.{name}" if found.is_module else found.path  # a module that bears the name of what is in it


@lru_cache(maxsize=1)
def _sources() -> Any:
    """The library as its source says, without running it."""
    return griffe.load("mambakit", resolve_aliases=True)


def _prose(docstring: str | None) -> str:
    """A package's docstring as Markdown; its tables, which are indented or aligned by spaces, as they stand."""
    parts = []
    for part in inspect.cleandoc(docstring or "").split("\n\n"):
        aligned = any("   " in line.strip() for line in part.splitlines())
        language = "python" if "import " in part else "text"
        parts.append(f"```{language}\n{inspect.cleandoc(part)}\n```" if aligned or part.startswith("    ") else part)
    return "\n\n".join(parts)


def command_page() -> str:
    """A page of all commands: their help, arguments and options, from the commands themselves."""
    import typer.main

    from mambakit.cli import app

    root = typer.main.get_command(app)
    lines = [
        "# The command line",
        "",
        "`mambakit --help` and `mambakit <room> <command> --help` say the same in a terminal.",
        "",
        *_command(root, ["mambakit"], level=2),
    ]
    return "\n".join(lines)


def _command(command: Any, path: list[str], level: int) -> list[str]:
    lines = []
    if len(path) > 1:
        lines += [f"{'#' * level} `{' '.join(path)}`", "", _text(command.help), ""]
    commands = getattr(command, "commands", None)
    if commands is not None:
        for name, below in commands.items():
            if not below.hidden:
                lines += _command(below, [*path, name], min(level + (len(path) > 1), 4))
        return lines
    rows = []
    context = command.context_class(command, info_name=path[-1])
    for parameter in command.params:
        record = None if getattr(parameter, "hidden", False) else parameter.get_help_record(context)
        if record:
            rows.append(f"| `{_cell(record[0])}` | {_cell(_text(record[1]))} |")
    if rows:
        lines += ["| option | what it does |", "|---|---|", *rows, ""]
    return lines


def _text(help_text: str | None) -> str:
    """Help as Markdown: rich's marks are left out."""

    text = inspect.cleandoc(help_text or "").replace("\b\n", "")
    return re.sub(r"\[/?(?:bold|italic|dim|green|red|yellow|cyan)[^\]]*\]", "", text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
