"""The Python of a page that says so runs, from its first block to its last, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PROMISE = "Every Python block on this page runs"
PAGES = sorted(page.name for page in DOCS.glob("*.md") if PROMISE in page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_in_its_order(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_is_a_page_on_forecasting() -> None:
    assert "forecasting.md" in PAGES
