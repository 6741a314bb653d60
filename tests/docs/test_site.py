"""The checker of built sites finds dead links and what would be fetched; the reference has every public name."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from tools.guide.font import formula_font
from tools.guide.links import problems
from tools.guide.reference import ROOMS, command_page, room_page


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "style.css").write_text("@font-face { src: url('font.woff') }")
    (tmp_path / "assets" / "font.woff").write_bytes(b"")
    (tmp_path / "page.html").write_text('<h2 id="part">Part</h2><a href="index.html">back</a>')
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="assets/style.css">'
        '<a href="page.html#part">there</a> <a href="#here" id="here">here</a>'
        '<a href="https://arxiv.org/abs/2312.00752">a paper</a><img src="data:image/png;base64,AAAA">'
    )
    return tmp_path


def add(site: Path, markup: str) -> None:
    page = site / "index.html"
    page.write_text(page.read_text() + markup)


def test_a_sound_site_has_no_problems(site: Path) -> None:
    assert problems(site) == []


@pytest.mark.parametrize(
    ("markup", "said"),
    [
        ('<a href="gone.html">', "index.html: gone.html: no such page or file"),
        ('<a href="page.html#gone">', "index.html: page.html#gone: no such anchor"),
        ('<a href="#gone">', "index.html: #gone: no such anchor"),
        ('<a href="../outside.html">', "index.html: ../outside.html: leads out of the site"),
        ('<img src="gone.png">', "index.html: gone.png: no such page or file"),
        ('<script src="https://cdn.example/x.js"></script>', "index.html: would fetch https://cdn.example/x.js"),
        ('<link rel="preconnect" href="//fonts.example">', "index.html: would fetch //fonts.example"),
        ("<p style=\"background: url('https://x.example/y.png')\">", "index.html: would fetch https://x.example/y.png"),
    ],
)
def test_a_problem_is_named(site: Path, markup: str, said: str) -> None:
    add(site, markup)
    assert problems(site) == [said]


def test_a_style_sheet_that_fetches_is_named(site: Path) -> None:
    (site / "assets" / "style.css").write_text("@import url(https://fonts.example/a.css); p { src: url(gone.woff) }")
    assert problems(site) == [
        "assets/style.css: would fetch https://fonts.example/a.css",
        "assets/style.css: gone.woff: no such page or file",
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name_where_it_is_defined(room: str) -> None:
    page = room_page(room)
    package = import_module(f"mambakit.{room}")
    listed = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    elsewhere = {name for name in package.__all__ if name not in listed}
    assert all(not getattr(package, name).__module__.startswith(package.__name__) for name in elsewhere)
    for line in page.splitlines():
        if line.startswith("::: "):
            module, _, name = line.removeprefix("::: ").rpartition(".")
            assert not inspect.ismodule(getattr(import_module(module), name))


def test_the_page_of_commands_has_commands_and_their_options() -> None:
    page = command_page()
    assert "### `mambakit forecast train`" in page
    assert "`--symbols" in page
    assert "#### `mambakit forecast models promote`" in page


def test_the_formulas_font_is_the_same_at_every_build() -> None:
    first = formula_font()
    formula_font.cache_clear()
    assert formula_font() == first
    assert first[:4] == b"wOFF"
