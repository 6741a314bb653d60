"""What the builder adds to Markdown: formulas as MathML, examples of docstrings as code, anchors of translations."""

from xml.etree import ElementTree

import griffe
import markdown
import pytest
from tools.guide.anchors import headings, with_anchors_of
from tools.guide.docstrings import SharedArguments
from tools.guide.doctests import DocTests
from tools.guide.mathml import Formulas, mathml

MATH = "{http://www.w3.org/1998/Math/MathML}"


def parsed(formula: str) -> ElementTree.Element:
    return ElementTree.fromstring(mathml(formula, display=False))


def test_dollars_make_formulas_and_prices_do_not() -> None:
    html = markdown.markdown("From $5 to $7, `$x$`, $a_b*c*$ and $$y = x$$.", extensions=[Formulas()])
    assert html.count("<math") == 2
    assert "From $5 to $7" in html
    assert "<code>$x$</code>" in html
    assert 'display="block"' in html


def test_a_displayed_formula_may_have_several_lines() -> None:
    html = markdown.markdown("$$ a\n = b $$", extensions=[Formulas()])
    assert html.count("<math") == 1
    assert "$" not in html


def test_a_matrix_with_an_index_is_one_base() -> None:
    (row,) = parsed(r"\begin{pmatrix} p \\ v \end{pmatrix}_k")
    (indexed,) = row
    assert indexed.tag == f"{MATH}msub"
    assert len(indexed) == 2


def test_a_prime_is_not_raised_twice() -> None:
    assert parsed("h'").find(f".//{MATH}msup") is None
    assert parsed("h^2").find(f".//{MATH}msup") is not None


def test_aligned_equations_are_a_table() -> None:
    cells = parsed(r"\begin{aligned} h &= A \\ y &= C \end{aligned}").findall(f".//{MATH}mtd")
    assert len(cells) == 4
    assert cells[0].get("style") == "text-align: right; padding-right: 0"


@pytest.mark.parametrize("formula", [r"a & b", r"\begin{pmatrix} a"])
def test_a_formula_that_cannot_be_read_is_named(formula: str) -> None:
    with pytest.raises(ValueError, match="can't be read"):
        mathml(formula, display=False)


def test_an_example_becomes_code_and_what_follows_does_not() -> None:
    html = markdown.markdown(
        "Text.\n\n>>> f(1)  # doctest: +SKIP\n[1, 2]\n\nMore.", extensions=[DocTests(), "fenced_code"]
    )
    assert '<pre><code class="language-pycon">&gt;&gt;&gt; f(1)\n[1, 2]\n</code></pre>' in html
    assert html.endswith("<p>More.</p>")


def test_arguments_that_share_a_line_of_a_docstring_get_one_each() -> None:
    source = """
def f(a, b, c):
    '''Do it.

    Args:
        a, b: two
            of a kind.
        c: another, and
            a, b: no names here.

    Returns them.
    '''
"""
    extensions = griffe.load_extensions(SharedArguments())
    package = griffe.temporary_visited_package("small", {"__init__.py": source}, extensions=extensions)
    with package as module:
        assert module["f"].docstring.value == (
            "Do it.\n\nArgs:\n    a: two\n        of a kind.\n    b: two\n        of a kind.\n"
            "    c: another, and\n        a, b: no names here.\n\nReturns them."
        )


def test_headings_are_found_outside_of_code() -> None:
    text = "# A\n```\n# no heading\n```\n## B `c` { #own }\n"
    assert headings(text) == [(0, "A", None), (4, "B `c`", "own")]


def test_a_translation_gets_the_anchors_of_the_original() -> None:
    english = "# Title\n## Two words\n## [Linked](x.md) `code`\n"
    russian = "# Заголовок\n## Два слова\n## Ссылка { #own }\n"
    assert with_anchors_of(english, russian) == (
        "# Заголовок { #title }\n## Два слова { #two-words }\n## Ссылка { #own }\n"
    )


def test_a_translation_with_other_headings_is_refused() -> None:
    with pytest.raises(ValueError, match="2 headings, the translation 1"):
        with_anchors_of("# A\n## B\n", "# А\n")
