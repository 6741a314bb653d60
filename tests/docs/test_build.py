"""A small site is built as the real one is: strictly, its chapter run, in every language, with nothing to fetch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.pages import DOCS, ROOT
from tools.guide.links import problems

CHAPTER = """# ---
# title: A chapter
# ---
# %% [markdown]
# # A chapter
# Of [the next part](#the-next-part).
# %%
import style
x = 21
style.check("twice and a sum", 2 * x, x + x, 0.0)
# %% [markdown]
# ## The next part
# Twice {{ x }} is $y = 2x$.
"""
RUSSIAN = """---
title: Глава
labels: {twice and a sum: вдвое и сумма}
---
# Глава
О том, что [дальше](#the-next-part).
<!-- cell -->
## Дальше
Дважды {{ x }} — это $y = 2x$.
"""
NAVIGATION = """nav:
  - mambakit: index.md
  - Guide: []
  - Reference: [reference/command-line.md]

theme:"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config[: config.index("nav:\n")] + NAVIGATION + config.partition("\ntheme:")[2]
    config = config.replace("tools/guide/hook.py", str(ROOT / "tools/guide/hook.py"))
    config = config.replace("paths: [src]", f"paths: [{ROOT / 'src'}]")
    config = config.replace("            - how-to/language-models.md\n", "")
    (folder / "mkdocs.yml").write_text(config, encoding="utf-8")
    pages = {
        "index.md": "# Home\n\n[To the chapter](guide/01_small.md#the-next-part)\n",
        "index.ar.md": "# الصفحة الأولى\n",
        "guide/index.md": "# Guide\n\n{{ chapters }}\n",
        "guide/01_small.py": CHAPTER,
        "guide/01_small.ru.md": RUSSIAN,
        "guide/style.py": (DOCS / "guide" / "style.py").read_text(encoding="utf-8"),
        "assets/style.css": (DOCS / "assets" / "style.css").read_text(encoding="utf-8"),
    }
    for name, text in pages.items():
        path = folder / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    build(folder)
    return folder


def build(folder: Path, expected: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")],
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    return done.stderr


def page(folder: Path, name: str) -> str:
    return (folder / "site" / name).read_text(encoding="utf-8")


pytestmark = pytest.mark.slow


def test_the_site_is_sound(folder: Path) -> None:
    assert problems(folder / "site") == []


def test_a_chapter_is_a_page_in_each_language(folder: Path) -> None:
    english, russian = page(folder, "guide/01_small.html"), page(folder, "ru/guide/01_small.html")
    assert "Twice 21 is <math" in english
    assert "<strong>Agrees:</strong> twice and a sum" in english
    assert "Дважды 21" in russian
    assert "<strong>Совпадает:</strong> вдвое и сумма" in russian
    assert 'id="the-next-part"' in russian


def test_a_page_without_a_translation_is_there_in_english(folder: Path) -> None:
    assert "To the chapter" in page(folder, "ru/index.html")


def test_a_language_of_few_pages_has_these_alone(folder: Path) -> None:
    assert 'dir="rtl"' in page(folder, "ar/index.html")
    assert not (folder / "site" / "ar" / "guide" / "01_small.html").exists()


def test_chapters_are_listed_under_their_number_and_in_the_navigation(folder: Path) -> None:
    assert '<ol start="0">' in page(folder, "guide/index.html")
    assert 'href="01_small.html"' in page(folder, "guide/index.html")
    assert "Глава" in page(folder, "ru/guide/index.html")


def test_scripts_and_notebooks_can_be_downloaded(folder: Path) -> None:
    assert page(folder, "guide/01_small.py") == CHAPTER
    notebook = json.loads(page(folder, "guide/01_small.ipynb"))
    assert notebook["cells"][1]["cell_type"] == "code"
    russian = json.loads(page(folder, "ru/guide/01_small.ipynb"))
    assert "Дважды 21" in "".join(russian["cells"][2]["source"])


def test_the_reference_has_signatures_and_the_commands_their_options(folder: Path) -> None:
    assert 'id="mambakit.ops.selective_scan.selective_scan"' in page(folder, "reference/ops.html")
    assert "--symbols" in page(folder, "reference/command-line.html")


def test_the_search_knows_both_languages(folder: Path) -> None:
    index = json.loads(page(folder, "search/search_index.json"))
    assert {"en", "ru", "ar"} <= set(index["config"]["lang"])
    assert any("Дважды" in entry["text"] for entry in index["docs"])


def test_a_chapter_that_fails_fails_the_build(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "site"
    (other / "docs").mkdir(parents=True)
    (other / "docs" / "guide").mkdir()
    (other / "mkdocs.yml").write_text((folder / "mkdocs.yml").read_text(encoding="utf-8"), encoding="utf-8")
    (other / "docs" / "guide" / "style.py").write_text("page = None\n", encoding="utf-8")
    (other / "docs" / "guide" / "01_small.py").write_text(CHAPTER.replace("x = 21", "x = 1 / 0"), encoding="utf-8")
    said = build(other, expected=1)
    assert "01_small.py, cell 2" in said
    assert "ZeroDivisionError" in said
