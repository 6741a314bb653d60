"""MkDocs' events: what the builder makes enters the site as if it lay in docs/, and nothing is written there.

The chapters of the guide (pages, notebooks), the reference's pages, and formulas as MathML.
"""

import fnmatch
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import CombinedEvent, event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.guide import font, reference  # noqa: E402
from tools.guide.anchors import with_anchors_of  # noqa: E402
from tools.guide.chapter import LANGUAGES, ChapterError, read  # noqa: E402
from tools.guide.doctests import DocTests  # noqa: E402
from tools.guide.mathml import Formulas  # noqa: E402
from tools.guide.page import ChapterPage, make_page, put_outputs  # noqa: E402
from tools.guide.results import results  # noqa: E402

log = logging.getLogger("mkdocs.hooks.guide")

PARTIAL = ("ar",)  # languages that have a few pages of their own, and no English ones in the place of others

_stamp: dict[Path, int] = {}
_made: dict[str, str | bytes] = {}  # by the name that a file would have in docs/
_pages: dict[str, ChapterPage] = {}
_contents: dict[str, str] = {}  # the list of chapters in each language


def chapter_paths(docs: Path) -> list[Path]:
    """The chapters in their order. GUIDE_CHAPTERS, a pattern such as `0*`, keeps a hasty build to some of them."""
    wanted = os.environ.get("GUIDE_CHAPTERS", "*")
    return [path for path in sorted(docs.glob("guide/[0-9][0-9]_*.py")) if fnmatch.fnmatch(path.stem, wanted)]


@event_priority(100)
def on_config(config: Any) -> Any:
    if not any(isinstance(extension, Formulas) for extension in config.markdown_extensions):
        config.markdown_extensions += [Formulas(), DocTests()]
    chapters = [f"guide/{path.stem}.md" for path in chapter_paths(Path(config.docs_dir))]
    rooms = [f"reference/{room}.md" for room in reference.ROOMS]
    for part in config.nav or ():
        if "Guide" in part:
            part["Guide"] = ["guide/index.md", *chapters]
        if "Reference" in part:
            part["Reference"] = [*part["Reference"], *(room for room in rooms if room not in part["Reference"])]
    return config


def on_pre_build(config: Any) -> None:
    config.plugins["autorefs"].__init__()  # the names it knows are pages of the language that was built before
    docs = Path(config.docs_dir)
    sources = [*docs.glob("guide/*"), *Path(__file__).parent.glob("*.py")]
    stamp = {path: path.stat().st_mtime_ns for path in sources}
    if _stamp != stamp:  # a site has several languages, each built by itself; what is made serves all
        _make(docs, cache=Path(config.config_file_path).parent / "build" / "guide")
        _stamp.clear()
        _stamp.update(stamp)


@event_priority(100)
def _add_files(files: Files, config: Any) -> Files:
    """Before the languages are told apart: files are added as if they lay in docs/, in place of what lies there."""
    for file in list(files):
        if file.src_uri in _made or re.fullmatch(r"guide/\d\d_\w+\.\w+\.md", file.src_uri):  # a translation's source
            files.remove(file)
    for name in _made:
        files.append(File(name, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


@event_priority(-200)
def _fill_files(files: Files, config: Any) -> Files:
    """After the languages were told apart, which makes new files of the old names: now they get their content."""
    language = config.plugins["i18n"].current_language
    file: Any  # of the plugin for languages, with more to it than MkDocs' own
    for file in list(files):
        if file.src_uri in _made:
            content = _made[file.src_uri]
            file.content_bytes = content if isinstance(content, bytes) else content.encode()
            file.edit_uri = None
        if not file.is_documentation_page():
            continue
        if language in PARTIAL and file.localization != language:
            files.remove(file)
        for other in PARTIAL:  # the menu of languages leads to the first page of one that does not have this page
            if not Path(config.docs_dir, file.norm_src_uri).with_suffix(f".{other}.md").exists():
                file.alternates.pop(other, None)
    return files


on_files = CombinedEvent(_add_files, _fill_files)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files, **_: Any) -> str:
    if page.file.src_uri.startswith("guide/index."):
        markdown = markdown.replace("{{ chapters }}", _contents.get(config.plugins["i18n"].current_language, ""))
    if page.file.localization:
        name = page.file.norm_src_uri
        original = str(_made.get(name) or Path(config.docs_dir, name).read_text(encoding="utf-8"))
        try:
            return with_anchors_of(re.sub(r"\A---\n.*?\n---\n", "", original, flags=re.DOTALL), markdown)
        except ValueError as error:
            log.warning("%s: %s", page.file.src_uri, error)
    return markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    made = _pages.get(page.file.src_uri)
    return put_outputs(html, made.outputs) if made else html


def _make(docs: Path, cache: Path) -> None:
    _made.clear()
    _pages.clear()
    try:
        chapters = [read(path) for path in chapter_paths(docs)]
        shown = results(chapters, cache=cache, say=log.info)
        for chapter in chapters:
            for language in ["en", *chapter.translations]:
                suffix = "" if language == "en" else f".{language}"
                page = make_page(chapter, shown[chapter.slug], language)
                _pages[f"guide/{chapter.slug}{suffix}.md"] = page
                _made[f"guide/{chapter.slug}{suffix}.md"] = page.markdown
                _made[f"guide/{chapter.slug}{suffix}.ipynb"] = page.notebook
    except ChapterError as error:
        raise PluginError(f"The guide can't be built.\n{error}") from None
    for language in LANGUAGES:
        titles = {chapter.slug: chapter.translations.get(language, chapter).title for chapter in chapters}
        items = "\n".join(f'<li markdown="span">[{title}]({slug}.md)</li>' for slug, title in titles.items())
        _contents[language] = f'<ol start="0" markdown="1">\n{items}\n</ol>'  # Markdown counts from 1
    for room in reference.ROOMS:
        _made[f"reference/{room}.md"] = reference.room_page(room)
    _made[font.NAME] = font.formula_font()
    _made["reference/command-line.md"] = reference.command_page()
