"""The real chapters are written as readers expect, and their translations fit them. `make docs` runs them."""

import re
from pathlib import Path

import pytest
import yaml
from tests.docs.pages import DOCS, PAGES, is_translation, name, original
from tools.guide.anchors import headings
from tools.guide.chapter import LANGUAGES, Chapter, expressions, read
from tools.guide.mathml import mathml

CHAPTERS = sorted(DOCS.glob("guide/[0-9][0-9]_*.py"))
TRANSLATIONS = [
    (path, language) for path in CHAPTERS for language in LANGUAGES[1:] if path.with_suffix(f".{language}.md").exists()
]


def each_chapter(test):
    return pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)(test)


def prose(chapter: Chapter, language: str = "en") -> str:
    return "\n\n".join(chapter.prose(language))


def test_there_are_chapters() -> None:
    assert len(CHAPTERS) >= 16


@each_chapter
def test_a_chapter_opens_with_its_title_and_prose(path: Path) -> None:
    chapter = read(path)
    assert chapter.cells[0].kind == "markdown"
    assert chapter.cells[0].text.startswith(f"# {chapter.title}")


@each_chapter
def test_a_chapter_has_a_check_and_then_exercises_with_answers(path: Path) -> None:
    chapter = read(path)
    titles = [text for _, text, _ in headings(prose(chapter))]
    assert titles.index("Exercises") == titles.index("Check") + 1
    assert any("style.check(" in cell.text for cell in chapter.cells if cell.kind == "code")
    assert any(cell.answer for cell in chapter.cells)


@each_chapter
def test_every_formula_of_a_chapter_can_be_read(path: Path) -> None:
    chapter = read(path)
    for language in ["en", *chapter.translations]:
        text = re.sub(r"```.*?```|`[^`]*`|\{\{ .*?\}\}", "", prose(chapter, language), flags=re.DOTALL)
        for formula in re.findall(r"\$\$(.+?)\$\$", text, flags=re.DOTALL):
            assert mathml(formula, display=True).startswith("<math")


@pytest.mark.parametrize(("path", "language"), TRANSLATIONS, ids=lambda value: getattr(value, "stem", value))
def test_a_translation_asks_for_the_values_of_its_chapter(path: Path, language: str) -> None:
    """In number, cell by cell: a sentence may choose its words by an expression of its own."""
    chapter = read(path)
    counts = [[len(expressions(text)) for text in chapter.prose(of)] for of in ("en", language)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("path", "language"), TRANSLATIONS, ids=lambda value: getattr(value, "stem", value))
def test_a_translation_has_the_headings_of_its_chapter(path: Path, language: str) -> None:
    chapter = read(path)
    levels = [
        [re.match("#+", text)[0] for text in prose(chapter, of).splitlines() if re.match("#+ ", text)]
        for of in ("en", language)
    ]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("page", [page for page in PAGES if is_translation(page)], ids=name)
def test_a_translated_page_has_the_headings_of_its_original(page: Path) -> None:
    if original(page).exists():
        found = [len(headings(of.read_text(encoding="utf-8"))) for of in (original(page), page)]
        assert found[0] == found[1]


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    listed = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
    pages = {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS) and not is_translation(page)}
    assert pages - {"guide/index.md"} <= listed
