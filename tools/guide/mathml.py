"""A Markdown extension: `$formula$` and `$$formula$$` in LaTeX become MathML when a page is made.

Browsers draw MathML by themselves, so that a page needs no script and no font from anywhere.
"""

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


class Formulas(Extension):
    """Formulas: inline between single dollars without a space inside them, displayed between double ones."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Formula(r"\$\$(.+?)\$\$", md, display=True), "displayed formula", 186)
        md.inlinePatterns.register(
            _Formula(r"(?<![\\$\w])\$(?=[^\s$])([^$]*?[^\s$\\])\$(?![\d$])", md, display=False), "formula", 185
        )


def mathml(formula: str, *, display: bool) -> str:
    """LaTeX as a `<math>` element. Raises ValueError for a formula that can't be read."""
    formula = " ".join(formula.split())
    try:
        return convert(formula, display="block" if display else "inline")
    except Exception as error:  # the converter has no error of its own that covers all
        raise ValueError(f"this formula can't be read ({error!r}): {formula}") from error


class _Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, *, display: bool) -> None:
        super().__init__(pattern, md)
        self.compiled_re = re.compile(pattern, flags=re.DOTALL)
        self.display = display

    def handleMatch(self, found: re.Match[str], _data: str) -> tuple[Any, int, int]:  # type: ignore[override]
        made = mathml(found[1], display=self.display)
        return self.md.htmlStash.store(made), found.start(0), found.end(0)
