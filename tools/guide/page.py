"""A chapter's page in one language: Markdown with its values filled in, and the HTML of what its cells showed.

The HTML stands aside while the Markdown is converted, so that nothing in it is taken for Markdown: `markdown` leaves a
paragraph of the form `@@output 3@@`, and `put_outputs` replaces it in the converted page.
"""

import html
import re
from dataclasses import dataclass, field
from typing import Any

import markdown as python_markdown
from tools.guide.chapter import Cell, Chapter, ChapterError, fill
from tools.guide.figure import for_page
from tools.guide.labels import Labels
from tools.guide.mathml import Formulas

WORDS = {
    "en": {
        "code": "Code",
        "answers": "Answers",
        "agrees": "Agrees",
        "difference": "relative difference",
        "download": "This page is a program: download it as [a script]({script}) or [a notebook]({notebook}), "
        "with [style.py](style.py) beside it, and run it.",
    },
    "ru": {
        "code": "Код",
        "answers": "Ответы",
        "agrees": "Совпадает",
        "difference": "относительная разница",
        "download": "Эта страница — программа: скачайте её как [скрипт]({script}) или [блокнот]({notebook}), "
        "положите рядом [style.py](style.py) и запустите.",
    },
}


@dataclass
class ChapterPage:
    """A chapter as a page: `markdown` for MkDocs, `outputs` for `put_outputs`, `notebook` to download."""

    markdown: str
    notebook: str
    outputs: list[str] = field(default_factory=list)


def make_page(chapter: Chapter, result: dict[str, Any], language: str) -> ChapterPage:
    """Raises ChapterError for a formula that can't be read, and for labels that nothing on the page has."""
    words = WORDS[language]
    translation = chapter.translations.get(language)
    labels = Labels(translation.labels if translation else {})
    prose = iter(chapter.prose(language))
    outputs: list[str] = []
    parts: list[str] = []
    answers: list[str] = []
    filled: list[str] = []
    for number, (cell, shown) in enumerate(zip(chapter.cells, result["cells"], strict=True), start=1):
        if cell.kind == "markdown":
            part = fill(next(prose), shown.__getitem__)
            try:
                python_markdown.markdown(part, extensions=[Formulas(), "fenced_code"])
            except ValueError as error:
                where = f"{chapter.slug}, {language}, cell {number} (line {cell.line} of the chapter)"
                raise ChapterError(f"{where}: {error}") from None
            filled.append(part)
        else:
            part = _code(cell, shown, words, labels, language, outputs, chapter.slug)
        if answers and not cell.answer:
            parts.append(_collapsed("success", words["answers"], "\n\n".join(answers)))
            answers.clear()
        (answers if cell.answer else parts).append(part)
    if answers:
        parts.append(_collapsed("success", words["answers"], "\n\n".join(answers)))
    if translation:
        unused = labels.unused(labels.used | set(result["labels_used"][language]))
        if unused:
            raise ChapterError(f"{chapter.slug}.{language}.md: no text of the chapter is {unused}")
    title = translation.title if translation else chapter.title
    link = words["download"].format(script=chapter.path.name, notebook=f"{chapter.slug}.ipynb")
    body = re.sub(r"\A(\s*# .*\n)", rf"\1\n{link}\n{{ .download }}\n\n", "\n\n".join(parts) + "\n", count=1)
    head = f"---\ntitle: {title!r}\n---\n\n"
    return ChapterPage(head + body, _notebook(chapter, filled), outputs)


def put_outputs(converted: str, outputs: list[str]) -> str:
    """The converted page with each output in its place."""
    return re.sub(r"<p>@@output (\d+)@@</p>", lambda found: outputs[int(found[1])], converted)


def _code(
    cell: Cell,
    shown: list[dict[str, Any]],
    words: dict[str, str],
    labels: Labels,
    language: str,
    outputs: list[str],
    slug: str,
) -> str:
    fence = f"````python\n{cell.text}\n````"
    parts = [_collapsed("code", words["code"], fence) if cell.hidden else fence]
    for output in shown:
        if output["kind"] == "table":
            parts.append(_table(output, labels))
        else:
            parts.append(f"@@output {len(outputs)}@@")
            outputs.append(_output(output, words, labels, language, f"figure-{slug}-{len(outputs)}"))
    return "\n\n".join(parts)


def _output(output: dict[str, Any], words: dict[str, str], labels: Labels, language: str, name: str) -> str:
    if output["kind"] == "text":
        lines = "\n".join(map(labels, output["text"].rstrip().splitlines()))
        return f'<pre class="output"><code>{html.escape(lines)}</code></pre>'
    if output["kind"] == "check":
        says = inline(labels(output["says"]))
        return (
            f'<p class="check"><strong>{words["agrees"]}:</strong> {says}: '
            f"{words['difference']} {_scientific(output['difference'])}</p>"
        )
    if output["kind"] == "html":
        return f"<div>{_translated_markup(output['markup'], labels)}</div>"
    svg = output["svg"].get(language, output["svg"]["en"])
    caption = inline(labels(output["caption"]))
    return (
        f'<figure class="drawn"><div data-search-exclude>{for_page(svg, name)}</div>'
        f'<figcaption id="{name}">{caption}</figcaption></figure>'
    )


def _table(output: dict[str, Any], labels: Labels) -> str:
    """As Markdown, so that its cells may hold formulas."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruled = ["---:" if numeric else "---" for numeric in output["numeric"]]
    rows = [
        [_scientific(cell) if numeric else labels(cell) for cell, numeric in zip(row, output["numeric"], strict=True)]
        for row in output["rows"]
    ]
    return "\n".join([line([labels(heading) for heading in output["headings"]]), line(ruled), *map(line, rows)])


def _scientific(number: str) -> str:
    """1.500e-07 as 1.5 · 10⁻⁷."""
    return re.sub(
        r"^(-?\d+(?:\.\d*[1-9])?)\.?0*e([+-])0*(\d+)$",
        lambda found: f"{found[1]} · 10<sup>{'−' if found[2] == '-' else ''}{found[3]}</sup>",
        number,
    )


def _collapsed(kind: str, title: str, body: str) -> str:
    indented = "\n".join("    " + line if line else "" for line in body.splitlines())
    return f'??? {kind} "{title}"\n\n{indented}'


def inline(text: str) -> str:
    """One line of Markdown, formulas included, as HTML without a paragraph around it."""
    converted = python_markdown.markdown(text, extensions=[Formulas()])
    return re.sub(r"\A<p>(.*)</p>\Z", r"\1", converted, flags=re.DOTALL)


def _translated_markup(markup: str, labels: Labels) -> str:
    """Markup whose words between tags, and in attributes that are read out, are looked up; scripts stay as they are.

    Words for a script alone stand in attributes `data-words-...`; its own names, `data-part` for one, are left alone.
    """

    def outside(text: str) -> str:
        text = re.sub(r">([^<>]*[^\s<>][^<>]*)<", lambda found: f">{labels(found[1])}<", text)
        return re.sub(
            r'((?:aria-label|title|placeholder|value|data-words-[a-z-]+)=")([^"]+)"',
            lambda found: f'{found[1]}{labels(found[2])}"',
            text,
        )

    pieces = re.split(r"(<(script|style)\b.*?</\2>)", markup, flags=re.DOTALL)
    return "".join(
        piece if piece.startswith(("<script", "<style")) else outside(piece)
        for at, piece in enumerate(pieces)
        if at % 3 != 2
    )


def _notebook(chapter: Chapter, prose: list[str]) -> str:
    """The chapter as a notebook, its prose in the page's language with the values of the run that made the page."""
    import nbformat

    cells = []
    texts = iter(prose)
    for number, cell in enumerate(chapter.cells):
        made = (
            nbformat.v4.new_markdown_cell(next(texts))
            if cell.kind == "markdown"
            else nbformat.v4.new_code_cell(cell.text)
        )
        made["id"] = f"cell-{number}"
        cells.append(made)
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=metadata))
