"""Chapters and their translations, read: cells with their kind, tags and line, and the values that the prose asks for.

A chapter is `docs/guide/NN_slug.py` in jupytext's percent format. Its translation is `NN_slug.<language>.md` beside
it: YAML front matter with `title` and `labels` (see labels.py), then the prose of every markdown cell in order,
separated by lines `<!-- cell -->`. In prose `{{ expression }}` or `{{ expression:format }}` is a value from the run; a
space follows the first braces.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import yaml

LANGUAGES = ("en", "ru")
SEPARATOR = "<!-- cell -->"
_VALUE = re.compile(r"\{\{ (.+?) ?\}\}", flags=re.DOTALL)


class ChapterError(Exception):
    """A chapter that can't be read, run or shown. The message names the chapter, and the cell where there is one."""


@dataclass(frozen=True)
class Cell:
    kind: str  # "markdown" or "code"
    text: str
    tags: frozenset[str]
    line: int  # of its first line of text in the chapter's file

    @property
    def hidden(self) -> bool:
        return "hide" in self.tags

    @property
    def answer(self) -> bool:
        return "answer" in self.tags


@dataclass(frozen=True)
class Chapter:
    path: Path
    title: str
    cells: tuple[Cell, ...]
    translations: "dict[str, Translation]" = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return self.path.stem

    def prose(self, language: str) -> list[str]:
        """The text of every markdown cell, in order."""
        if language == "en":
            return [cell.text for cell in self.cells if cell.kind == "markdown"]
        return self.translations[language].prose


@dataclass(frozen=True)
class Translation:
    title: str
    labels: dict[str, str]
    prose: list[str]


def read(path: Path) -> Chapter:
    """Read a chapter and the translations beside it.

    Raises ChapterError for a cell of an unknown kind or tag, a missing title, or a translation with another number of
    cells than the chapter's prose.
    """
    source = path.read_text(encoding="utf-8")
    markers = [number for number, line in enumerate(source.splitlines(), start=1) if line.startswith("# %%")]
    found = jupytext.reads(source, fmt="py:percent").cells
    title = ""
    if found and found[0].cell_type == "raw":
        title = (yaml.safe_load(found.pop(0).source.strip().strip("-")) or {}).get("title", "")
    if not title:
        raise ChapterError(f"{path.name}: it must open with '# ---', '# title: ...', '# ---'")
    if len(found) != len(markers):
        raise ChapterError(f"{path.name}: {len(markers)} lines begin with '# %%', but it has {len(found)} cells")
    cells = []
    for number, (cell, line) in enumerate(zip(found, markers, strict=True), start=1):
        tags = frozenset(cell.metadata.get("tags", ()))
        if cell.cell_type not in ("markdown", "code"):
            raise ChapterError(
                f"{path.name}, cell {number} (line {line}): {cell.cell_type} cells have no place on a page"
            )
        if not tags <= {"hide", "answer"}:
            raise ChapterError(f"{path.name}, cell {number} (line {line}): unknown tags {sorted(tags)}")
        cells.append(Cell(cell.cell_type, cell.source.strip("\n"), tags, line + 1))
    chapter = Chapter(path, title, tuple(cells))
    for language in LANGUAGES[1:]:
        beside = path.with_suffix(f".{language}.md")
        if beside.exists():
            chapter.translations[language] = read_translation(beside, chapter)
    return chapter


def read_translation(path: Path, chapter: Chapter) -> Translation:
    """Read a chapter's translation. Raises ChapterError where it does not fit its chapter."""
    opened = re.match(r"---\n(.*?)\n---\n(.*)", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    if not opened:
        raise ChapterError(f"{path.name}: it must open with front matter between lines ---")
    head = yaml.safe_load(opened[1])
    if not isinstance(head, dict) or not head.get("title") or not set(head) <= {"title", "labels"}:
        raise ChapterError(f"{path.name}: its front matter must have title, may have labels, and nothing else")
    prose = [part.strip("\n") for part in re.split(rf"^{SEPARATOR}$", opened[2], flags=re.MULTILINE)]
    if prose and not prose[0].strip():  # a separator before the first cell
        prose.pop(0)
    expected = len(chapter.prose("en"))
    if len(prose) != expected:
        raise ChapterError(
            f"{path.name}: {chapter.path.name} has {expected} cells of prose, the translation {len(prose)}"
        )
    labels = {str(text): str(translated) for text, translated in (head.get("labels") or {}).items()}
    return Translation(head["title"], labels, prose)


def expressions(text: str) -> list[str]:
    """What stands between `{{ ` and ` }}`, in order."""
    return _VALUE.findall(text)


def fill(text: str, value: Callable[[str], str]) -> str:
    """The text with each `{{ expression }}` replaced by its value."""
    return _VALUE.sub(lambda found: value(found[1]), text)
