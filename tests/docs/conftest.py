"""Tiny chapters for the tests of the builder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.docs.pages import DOCS
from tools.guide.chapter import Chapter, read

HEAD = "# ---\n# title: A chapter\n# ---\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Chapter]:
    """Writes a chapter of these cells into a folder of its own, with the guide's style.py, and reads it."""

    def written(cells: str, name: str = "01_small.py", **translations: str) -> Chapter:
        folder = tmp_path / "guide"
        folder.mkdir(exist_ok=True)
        shutil.copy(DOCS / "guide" / "style.py", folder)
        path = folder / name
        path.write_text(HEAD + cells, encoding="utf-8")
        for language, text in translations.items():
            path.with_suffix(f".{language}.md").write_text(text, encoding="utf-8")
        return read(path)

    return written
