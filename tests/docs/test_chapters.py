"""Chapters and translations are read as they are written, and refused with the place of what is wrong."""

from collections.abc import Callable

import pytest
from tools.guide.chapter import Chapter, ChapterError, expressions, fill
from tools.guide.labels import Labels, needs_translation

Write = Callable[..., Chapter]

CELLS = """# %% [markdown]
# # A chapter
# Prose with {{ x:.1f }}.
# %%
x = 1.0
# %% tags=["hide"]
y = 2.0

# %% [markdown] tags=["answer"]
# **1.** Because.
"""


def test_cells_have_their_kind_tags_and_line(write: Write) -> None:
    chapter = write(CELLS)
    assert chapter.title == "A chapter"
    assert [(cell.kind, cell.hidden, cell.answer, cell.line) for cell in chapter.cells] == [
        ("markdown", False, False, 5),
        ("code", False, False, 8),
        ("code", True, False, 10),
        ("markdown", False, True, 13),
    ]
    assert chapter.cells[0].text == "# A chapter\nProse with {{ x:.1f }}."
    assert chapter.cells[2].text == "y = 2.0"


def test_an_unknown_tag_is_refused_with_its_line(write: Write) -> None:
    with pytest.raises(ChapterError, match=r"01_small\.py, cell 1 \(line 4\): unknown tags \['hidden'\]"):
        write('# %% tags=["hidden"]\nx = 1\n')


def test_a_chapter_without_a_title_is_refused(write: Write, tmp_path: object) -> None:
    chapter = write(CELLS)
    chapter.path.write_text("# %%\nx = 1\n", encoding="utf-8")
    from tools.guide.chapter import read

    with pytest.raises(ChapterError, match="must open with"):
        read(chapter.path)


def test_a_translation_has_the_chapters_cells(write: Write) -> None:
    russian = (
        "---\ntitle: Глава\nlabels:\n  time: время\n---\n# Глава\nТекст {{ x:.1f }}.\n<!-- cell -->\n**1.** Так.\n"
    )
    translation = write(CELLS, ru=russian).translations["ru"]
    assert translation.title == "Глава"
    assert translation.labels == {"time": "время"}
    assert translation.prose == ["# Глава\nТекст {{ x:.1f }}.", "**1.** Так."]


def test_a_translation_with_a_cell_less_is_refused(write: Write) -> None:
    with pytest.raises(ChapterError, match=r"01_small\.py has 2 cells of prose, the translation 1"):
        write(CELLS, ru="---\ntitle: Глава\n---\n# Глава\n")


def test_values_are_found_and_filled_in_where_latex_has_braces_too() -> None:
    text = r"$\frac{{a}}{b}$ is {{ a / b:.2f }}, {{ 'less' if a < b else 'more' }}"
    assert expressions(text) == ["a / b:.2f", "'less' if a < b else 'more'"]
    assert fill(text, {"a / b:.2f": "0.50", "'less' if a < b else 'more'": "less"}.__getitem__).endswith("0.50, less")


def test_labels_are_looked_up_whole_and_with_the_runs_numbers() -> None:
    labels = Labels({"time, s": "время, с", "{} times faster, {} in all": "в {} раз быстрее, всего {}"})
    assert labels("time, s") == "время, с"
    assert labels("3.1 times faster, 8 in all") == "в 3.1 раз быстрее, всего 8"
    assert labels("an unknown text") == "an unknown text"
    assert list(labels.missing) == ["an unknown text"]
    assert labels.unused({"time, s"}) == ["{} times faster, {} in all"]


def test_a_label_that_loses_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="1 times"):
        Labels({"{} times": "раз"})


@pytest.mark.parametrize(("text", "needed"), [("error", True), ("Mamba-2", False), ("$x_t$", False), ("10", False)])
def test_names_numbers_and_formulas_need_no_translation(text: str, needed: bool) -> None:
    assert needs_translation(text) is needed
