"""A chapter's page: values filled in, code and answers collapsed, outputs in their places, in two languages."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markdown
import pytest
from tools.guide.chapter import Chapter, ChapterError
from tools.guide.page import ChapterPage, make_page, put_outputs
from tools.guide.results import results

Write = Callable[..., Chapter]

CELLS = """# %% [markdown]
# # Title
# The ratio is {{ ratio:.1f }}.
# %%
ratio = 2.0
# %% [markdown]
# It came to {{ ratio:.1f }}, and $x_t$ is a formula.
# %% tags=["hide"]
import style
fig, ax = style.figure()
ax.set_xlabel("time")
style.caption(fig, "One curve of $x_t$")
print("<printed> @@output 0@@")
style.check("this and that", 1.0, 1.0 + 1e-12, 1e-9)
style.table(["case", "error"], [["a|b", 1.5e-7]])
style.html('<p title="drag">move</p><script>const move = "move";</script>')
# %% [markdown]
# ## Exercises
# 1. Why?
# %% [markdown] tags=["answer"]
# **1.** So:
# %% tags=["answer"]
print("an answer's output")
""".replace("# The ratio is {{ ratio:.1f }}.\n", "")

RUSSIAN = """---
title: Заголовок
labels:
  time: время
  One curve of $x_t$: Кривая $x_t$
  this and that: то и это
  case: случай
  error: ошибка
  move: двигать
  drag: тянуть
---
# Заголовок
<!-- cell -->
Вышло {{ ratio:.1f }}, $x_t$ — формула.
<!-- cell -->
## Упражнения
1. Почему?
<!-- cell -->
**1.** Так:
"""


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def pages(write: Write, tmp_path: Path, kept: dict[str, Any]) -> dict[str, ChapterPage]:
    chapter = write(CELLS, ru=RUSSIAN)
    if not kept:
        kept.update(results([chapter], cache=tmp_path / "cache", say=lambda _: None)[chapter.slug])
    return {language: make_page(chapter, kept, language) for language in ("en", "ru")}


def converted(page: ChapterPage) -> str:
    body = page.markdown.split("---\n", 2)[2]
    html = markdown.markdown(body, extensions=["pymdownx.superfences", "pymdownx.details", "tables", "attr_list"])
    return put_outputs(html, page.outputs)


def test_values_are_filled_in(pages: dict[str, ChapterPage]) -> None:
    assert "It came to 2.0" in pages["en"].markdown
    assert "Вышло 2.0" in pages["ru"].markdown


def test_every_output_is_on_the_page_once(pages: dict[str, ChapterPage]) -> None:
    html = converted(pages["en"])
    assert html.count("<svg") == 1
    assert html.count('<pre class="output"><code>&lt;printed&gt; @@output 0@@') == 1
    assert html.count('<pre class="output"><code>an answer&#x27;s output') == 1
    assert html.count('<script>const move = "move";</script></div>') == 1
    assert "1.5 · 10<sup>−7</sup>" in html


def test_hidden_code_and_answers_are_collapsed(pages: dict[str, ChapterPage]) -> None:
    html = converted(pages["en"])
    assert re.search(r'<details class="code">\s*<summary>Code</summary>', html)
    answers = html[html.index("<summary>Answers</summary>") :]
    assert "So:" in answers
    assert "an answer&#x27;s output" in answers[: answers.index("</details>")]


def test_a_figure_is_named_by_its_caption(pages: dict[str, ChapterPage]) -> None:
    html = converted(pages["en"])
    name = html.split('aria-labelledby="')[1].split('"')[0]
    assert f'<figcaption id="{name}">One curve of <math' in html
    assert 'role="img"' in html


def test_figures_have_the_colours_of_the_page_and_ids_of_their_own(pages: dict[str, ChapterPage]) -> None:
    svg = converted(pages["en"]).split("<svg")[1].split("</svg>")[0]
    assert "var(--figure-ink)" in svg
    assert "#222222" not in svg
    ids = {part.split('"')[0] for part in svg.split(' id="')[1:]}
    used = {part.split(")")[0] for part in svg.split("url(#")[1:]} | {
        part.split('"')[0] for part in svg.split('href="#')[1:]
    }
    assert used <= ids
    assert all(name.startswith("figure-01_small-") for name in ids)


def test_the_russian_page_has_russian_labels(pages: dict[str, ChapterPage]) -> None:
    html = converted(pages["ru"])
    assert ">время<" in html
    assert "Кривая <math" in html
    assert "<strong>Совпадает:</strong> то и это: относительная разница" in html
    assert "случай" in html
    assert '<p title="тянуть">двигать</p>' in html
    assert 'const move = "move"' in html  # scripts stay as they are
    assert "title: 'Заголовок'" in pages["ru"].markdown


def test_a_label_that_nothing_has_is_refused(write: Write, tmp_path: Path) -> None:
    chapter = write("# %% [markdown]\n# # T\n", ru="---\ntitle: Т\nlabels: {gone: нет}\n---\n# Т\n")
    shown = results([chapter], cache=tmp_path / "cache", say=lambda _: None)[chapter.slug]
    with pytest.raises(ChapterError, match=r"no text of the chapter is \['gone'\]"):
        make_page(chapter, shown, "ru")


def test_a_formula_that_cannot_be_read_names_its_cell(write: Write, tmp_path: Path) -> None:
    chapter = write("# %% [markdown]\n# # T\n# $a & b$\n")
    shown = results([chapter], cache=tmp_path / "cache", say=lambda _: None)[chapter.slug]
    with pytest.raises(ChapterError, match=r"01_small, en, cell 1 \(line 5"):
        make_page(chapter, shown, "en")


def test_the_notebook_has_the_cells_with_the_values(pages: dict[str, ChapterPage]) -> None:
    cells = json.loads(pages["ru"].notebook)["cells"]
    assert [cell["cell_type"] for cell in cells][:3] == ["markdown", "code", "markdown"]
    assert "Вышло 2.0" in "".join(cells[2]["source"])
    assert "".join(cells[1]["source"]) == "ratio = 2.0"


def test_the_page_links_to_the_script_and_the_notebook(pages: dict[str, ChapterPage]) -> None:
    assert "[a script](01_small.py) or [a notebook](01_small.ipynb)" in pages["en"].markdown
