"""A translated page's headings get the anchors of the original's, so that links hold in every language."""

import re

from markdown.extensions.toc import slugify, unique

_HEADING = re.compile(r"^(#{1,6}) +(.*?)(?: *\{ *#([\w-]+) *\})? *$")


def headings(markdown: str) -> list[tuple[int, str, str | None]]:
    """The number of the line, the text and the given anchor of each heading, those in blocks of code left out."""
    found, fence = [], ""
    for number, line in enumerate(markdown.splitlines()):
        opened = re.match(r"\s*(`{3,}|~{3,})", line)
        if opened and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else opened[1]
        heading = None if fence or opened else _HEADING.match(line)
        if heading:
            found.append((number, heading[2], heading[3]))
    return found


def with_anchors_of(original: str, translated: str) -> str:
    """Raises ValueError where the translation has another number of headings."""
    wanted, there = headings(original), headings(translated)
    if len(wanted) != len(there):
        raise ValueError(f"the original has {len(wanted)} headings, the translation {len(there)}")
    lines = translated.splitlines()
    taken: set[str] = set()
    for (_, text, given), (number, _, own) in zip(wanted, there, strict=True):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", lambda found: found[1] or "", text)
        anchor = unique(given or slugify(plain, "-"), taken)
        if own is None:
            lines[number] += f" {{ #{anchor} }}"
    return "\n".join(lines) + "\n"
