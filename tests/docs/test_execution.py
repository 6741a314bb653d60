"""Chapters run cell by cell in one namespace; what they show is captured, and an error names its cell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tools.guide.chapter import Chapter, ChapterError
from tools.guide.results import results

Write = Callable[..., Chapter]

SHOWING = """# %%
import dataclasses
import style

@dataclasses.dataclass
class Pair:
    x: "float"

x = Pair(1.25).x
print("first")
style.table(["name", "value"], [["a", 0.123456], ["b", 2]])
print("then")
style.check("this and that", x, x, 1e-9)
style.html("<b>bold</b>")

# %%
fig, ax = style.figure()
ax.bar(["left", "right"], [1, 2])
ax.set_xlabel("side")
style.caption(fig, "Two bars")

# %% [markdown]
# {{ x }} and {{ x:.1f }} and {{ "big" if x > 1 else "small" }}
"""


def run(chapter: Chapter, cache: Path) -> dict[str, Any]:
    return results([chapter], cache=cache, say=lambda _: None)[chapter.slug]


@pytest.fixture
def shown(write: Write, tmp_path: Path) -> dict[str, Any]:
    russian = "---\ntitle: Г\nlabels: {left: слева, right: справа, side: сторона}\n---\n{{ x }} и {{ x * 2 }}\n"
    return run(write(SHOWING, ru=russian), tmp_path / "cache")


def test_outputs_come_in_the_order_in_which_they_were_shown(shown: dict[str, Any]) -> None:
    assert shown["cells"][0] == [
        {"kind": "text", "text": "first\n"},
        {
            "kind": "table",
            "headings": ["name", "value"],
            "rows": [["a", "0.1235"], ["b", "2"]],
            "numeric": [False, True],
        },
        {"kind": "text", "text": "then\n"},
        {"kind": "check", "says": "this and that", "difference": "0"},
        {"kind": "html", "markup": "<b>bold</b>"},
    ]


def test_a_figure_is_drawn_in_each_language_its_ticks_included(shown: dict[str, Any]) -> None:
    (figure,) = shown["cells"][1]
    assert figure["caption"] == "Two bars"
    assert all(f">{text}<" in figure["svg"]["en"] for text in ("left", "right", "side"))
    assert all(f">{text}<" in figure["svg"]["ru"] for text in ("слева", "справа", "сторона"))
    assert "left" not in figure["svg"]["ru"]
    assert shown["labels_used"] == {"ru": ["left", "right", "side"]}


def test_values_are_evaluated_for_every_language(shown: dict[str, Any]) -> None:
    assert shown["cells"][2] == {
        "x": "1.25",
        "x:.1f": "1.2",
        '"big" if x > 1 else "small"': "big",
        "x * 2": "2.5",
    }


def test_an_error_names_the_chapter_the_cell_and_the_line(write: Write, tmp_path: Path) -> None:
    chapter = write("# %%\nx = 1\n\n# %%\ny = x\nraise RuntimeError('no')\n")
    with pytest.raises(ChapterError, match=r"01_small\.py, cell 2 \(line 8\)") as error:
        run(chapter, tmp_path / "cache")
    assert "line 9" in str(error.value)
    assert "RuntimeError: no" in str(error.value)


def test_a_figure_without_a_caption_is_an_error(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ChapterError, match="has no caption"):
        run(write("# %%\nimport style\nstyle.figure()\n"), tmp_path / "cache")


def test_a_check_that_fails_fails_the_build(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ChapterError, match=r"one and two: the relative difference is 5\.0e-01"):
        run(write("# %%\nimport style\nstyle.check('one and two', 1.0, 2.0, 1e-6)\n"), tmp_path / "cache")


def test_all_failing_chapters_are_named(write: Write, tmp_path: Path) -> None:
    chapters = [write("# %%\n1 / 0\n", name) for name in ("01_one.py", "02_two.py")]
    with pytest.raises(ChapterError, match=r"(?s)01_one\.py.*02_two\.py"):
        results(chapters, cache=tmp_path / "cache", say=lambda _: None)


def test_a_process_that_dies_is_told(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ChapterError, match="its process ended with 3"):
        run(write("# %%\nimport os\nos._exit(3)\n"), tmp_path / "cache")


def test_prose_runs_nothing_anew_and_code_does(write: Write, tmp_path: Path) -> None:
    said: list[str] = []

    def again(cells: str) -> None:
        results([write(cells)], cache=tmp_path / "cache", say=said.append)

    again("# %% [markdown]\n# One {{ 1 + 1 }}\n# %%\nx = 1\n")
    again("# %% [markdown]\n# Another, longer\n# {{ 1 + 1 }}\n# %%\nx = 1\n")
    assert len(said) == 1
    again("# %% [markdown]\n# One {{ 1 + 1 }}\n# %%\nx = 2\n")
    assert len(said) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_chapter_leaves_nothing_beside_itself(write: Write, tmp_path: Path) -> None:
    chapter = write("# %%\nimport style\nopen('left.txt', 'w').close()\n")
    before = sorted(chapter.path.parent.iterdir())
    run(chapter, tmp_path / "cache")
    assert sorted(chapter.path.parent.iterdir()) == before
