"""The documentation's pages, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LANGUAGES = ("ru", "ar")
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_translation(page: Path) -> bool:
    return page.name.split(".")[-2] in LANGUAGES


def original(page: Path) -> Path:
    return page.with_name(page.name.split(".")[0] + ".md")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, those inside admonitions too."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^( *)```([\w-]*)\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, language, code in found]
