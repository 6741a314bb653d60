"""A Markdown extension: `$formula$` and `$$formula$$` in LaTeX become MathML when a page is made.

Browsers draw MathML by themselves, so that a page needs no script and no font from anywhere.
"""

import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

_NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
ElementTree.register_namespace("", _NAMESPACE.strip("{}"))


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
    # Names that the converter knows, and a bar as long as the letter.
    known = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{split}", formula)
    known = re.sub(r"\\bar\b", r"\\overline", known)
    try:
        made = convert(known, display="block" if display else "inline")
    except Exception as error:  # the converter has no error of its own that covers all
        raise ValueError(f"this formula can't be read ({error!r}): {formula}") from error
    try:
        root = ElementTree.fromstring(made)
    except ElementTree.ParseError:  # an & outside any array comes through as it is
        raise ValueError(f"this formula can't be read: {formula}") from None
    _mend(root)
    return ElementTree.tostring(root, encoding="unicode")


_CHILDREN = {"msup": 2, "msub": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
_PRIMES = re.compile("[\u2032-\u2034\u2057]")


def _mend(element: ElementTree.Element) -> None:
    """Put right what the converter writes otherwise than browsers take it, from the innermost element outwards."""
    for child in element:
        _mend(child)
    _gather_base(element)
    tag, text = _tag(element), element.text or ""
    if tag == "msup" and _PRIMES.fullmatch(element[1].text or ""):  # they are raised already
        element.tag = f"{_NAMESPACE}mrow"
        element[1].tag = f"{_NAMESPACE}mo"
        element[1].attrib.update(lspace="0.05em", rspace="0")
    elif tag == "mi" and re.fullmatch("[\u0391-\u03a9]", text):  # large Greek letters stand upright
        element.set("mathvariant", "normal")
    elif tag == "mo" and text == "|":  # a bracket, and no relation
        element.attrib.update(lspace="0", rspace="0")
    elif tag == "mtd" and "columnalign" in element.attrib:
        side = element.attrib.pop("columnalign")
        joined = side == "right" or (len(element) and _tag(element[0]) == "mi" and not element[0].text)
        element.set("style", f"text-align: {side}" + (f"; padding-{side}: 0" if joined else ""))
    _space_names(element)


def _gather_base(element: ElementTree.Element) -> None:
    """A matrix that carries an index comes as several children where one is due."""
    due = _CHILDREN.get(_tag(element), len(element))
    if len(element) > due:
        children = list(element)[: len(element) - due + 1]
        base = ElementTree.Element(f"{_NAMESPACE}mrow")
        base.extend(children)
        for child in children:
            element.remove(child)
        element.insert(0, base)


def _space_names(element: ElementTree.Element) -> None:
    """A name such as exp stands a little apart from what is before it, and from an argument without brackets."""
    children = list(element)
    for at, child in reversed(list(enumerate(children))):
        if _tag(child) == "mi" and re.fullmatch("[a-z]{2,}", child.text or ""):
            for place, neighbour in ((at + 1, children[at + 1 : at + 2]), (at, children[at - 1 : at] if at else [])):
                if neighbour and _tag(neighbour[0]) not in ("mo", "mspace"):
                    element.insert(place, ElementTree.Element(f"{_NAMESPACE}mspace", width="0.17em"))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.removeprefix(_NAMESPACE)


class _Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, *, display: bool) -> None:
        super().__init__(pattern, md)
        self.compiled_re = re.compile(pattern, flags=re.DOTALL)
        self.display = display

    def handleMatch(self, found: re.Match[str], _data: str) -> tuple[Any, int, int]:
        made = mathml(found[1], display=self.display)
        return self.md.htmlStash.store(made), found.start(0), found.end(0)
