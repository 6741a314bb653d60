"""The Python of every page runs, from its first block to its last, in an empty folder.

Blocks marked `python` run; those marked `py` need what a test can't have: the internet, several GPUs. A page says what
its blocks find in the folder by lines `<!-- before: mambakit ... -->`, which a reader does not see.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.pages import PAGES, blocks, is_translation, name, original

README = "README.md"  # has a test of its own, tests/test_readme.py
WITH_PYTHON = [
    page
    for page in PAGES
    if not is_translation(page) and page.name != README and any(block.language == "python" for block in blocks(page))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs_in_its_order(page: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in re.findall(r"<!-- before: mambakit (.*) -->", page.read_text(encoding="utf-8")):
        subprocess.run(
            [sys.executable, "-m", "mambakit.cli", *shlex.split(command)], cwd=tmp_path, env=environment, check=True
        )
    code = "\n".join(block.text for block in blocks(page) if block.language == "python")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_is_python_on_the_first_page_and_on_most_others() -> None:
    names = [name(page) for page in WITH_PYTHON]
    assert "docs/index.md" in names
    assert len(names) > 10


@pytest.mark.parametrize("page", [page for page in PAGES if is_translation(page)], ids=name)
def test_a_translation_has_the_code_of_its_original(page: Path) -> None:
    if original(page).exists():  # a chapter's translation has none of its own, its cells are the chapter's
        code = [
            [block.text for block in blocks(of) if block.language in ("python", "py")] for of in (original(page), page)
        ]
        assert code[0] == code[1]
