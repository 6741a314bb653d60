"""The command line as its users have it: another process, its output, its exit status."""

import os
import subprocess
import sys
from pathlib import Path

from tests.warm_processes import run_module

SMALL = ["--days", "430", "--epochs", "1", "--d-model", "4", "--layers", "1"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mambakit.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    # One thread each: tests of two processes at once must not fight over two cores.
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "ACCELERATE_USE_CPU": "true"}


def mambakit(
    *arguments: object, cwd: Path | None = None, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `mambakit ARGUMENTS` to its end, if `fresh` in a process that begins from nothing."""
    given = environment() | variables
    if not fresh:
        return run_module("mambakit.cli", *map(str, arguments), cwd=cwd, environment=given)
    return subprocess.run(
        command(*arguments), cwd=cwd, env=given, capture_output=True, text=True, check=False, timeout=240
    )


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed, and said so in one line with these words in it."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("mambakit: error: ")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr
