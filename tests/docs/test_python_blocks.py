"""The Python of every page runs, from its first block to its last, in an empty folder.

Blocks marked `python` run; those marked `py` need what a test can't have: the internet, several GPUs. A page says what
its blocks find in the folder by lines `<!-- before: mambakit ... -->`, which a reader does not see.
"""

import io
import os
import re
import shlex
import tokenize
from pathlib import Path

import pytest
from tests.docs.pages import PAGES, Block, blocks, is_translation, name, original
from tests.warm_processes import run_code, run_module

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
        done = run_module("mambakit.cli", *shlex.split(command), cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr
    code = "\n".join(block.text for block in blocks(page) if block.language == "python")
    done = run_code(code, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr


def test_there_is_python_on_the_first_page_and_on_most_others() -> None:
    names = [name(page) for page in WITH_PYTHON]
    assert "docs/index.md" in names
    assert len(names) > 10


def without_comments(block: Block) -> list[str]:
    """What a block does: comments, and the spaces before them, are left out."""
    if block.language in ("python", "py"):
        tokens = tokenize.generate_tokens(io.StringIO(block.text).readline)
        return [token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    return [re.sub(r" +# .*", "", line) for line in block.text.splitlines()]


@pytest.mark.parametrize("page", [page for page in PAGES if is_translation(page)], ids=name)
def test_a_translation_has_the_code_of_its_original(page: Path) -> None:
    if original(page).exists():  # a chapter's translation has none of its own, its cells are the chapter's
        code = [[(block.language, without_comments(block)) for block in blocks(of)] for of in (original(page), page)]
        assert code[0] == code[1]


def test_code_is_compared_without_its_comments() -> None:
    python = [Block("python", f'x = "# kept"{comment}\n') for comment in ("", "  # gone", "  # прочь")]
    assert len({tuple(without_comments(block)) for block in python}) == 1
    assert '"# kept"' in without_comments(python[0])
    assert without_comments(Block("python", "y = 1\n")) != without_comments(Block("python", "y = 2\n"))
    assert without_comments(Block("bash", "make demo    # trains\n")) == ["make demo"]
