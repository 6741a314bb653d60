"""The README's Python runs, and the commands that it names exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_python_runs_and_predicts(tmp_path: Path) -> None:
    small = ("--epochs", "1", "--days", "600", "--d-model", "8", "--layers", "1", "--quiet")
    run("-m", "mambakit.cli", "forecast", "train", "--symbols", "AAPL", *small, folder=tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    printed = run("-c", code, folder=tmp_path)
    assert printed.startswith("{'1d': ")


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^`?make (\w+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "bench"} <= named  # each at the start of a line
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)
