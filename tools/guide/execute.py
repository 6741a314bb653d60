"""Run one chapter, cell by cell in one namespace, and write down all that it shows.

Started as a process of its own, `python -m tools.guide.execute JOB RESULT`, by results.py: a chapter can disturb
neither another nor the build. JOB and RESULT are JSON. The job names the chapter's file and has, for each cell, its
code or the expressions that its prose asks for in all languages; and the labels of each translation. The result has
for each cell the list of its outputs, or the values of its expressions; or else the error and its cell.
"""

import ast
import contextlib
import io
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.guide.labels import Labels, needs_translation


class Page:
    """Receives what a cell shows, in its order: `style.page` and the standard output while the cell runs."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []

    def write(self, text: str) -> int:
        if self.outputs and self.outputs[-1]["kind"] == "text":
            self.outputs[-1]["text"] += text
        else:
            self.outputs.append({"kind": "text", "text": text})
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def table(self, headings: list[str], rows: list[list[str]], numeric: list[bool]) -> None:
        self.outputs.append({"kind": "table", "headings": headings, "rows": rows, "numeric": numeric})

    def check(self, says: str, difference: str) -> None:
        self.outputs.append({"kind": "check", "says": says, "difference": difference})

    def html(self, markup: str) -> None:
        self.outputs.append({"kind": "html", "markup": markup})


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a chapter's cells until one fails."""
    path = Path(job["path"])
    sys.path.insert(0, str(path.parent))
    import style

    module = ModuleType("__main__")  # classes that the chapter defines look themselves up there
    module.__dict__["__file__"] = str(path)
    sys.modules["__main__"] = module
    labels = {language: Labels(texts) for language, texts in job["labels"].items()}
    cells: list[Any] = []
    for number, cell in enumerate(job["cells"], start=1):
        style.page = page = Page()
        try:
            if cell["kind"] == "code":
                with contextlib.redirect_stdout(page):  # type: ignore[type-var]
                    code = compile("\n" * (cell["line"] - 1) + cell["text"], str(path), "exec")
                    exec(code, module.__dict__)
                    page.outputs += figures(style, labels, path.stem)
                cells.append(page.outputs)
            else:
                cells.append({text: evaluate(text, module.__dict__, style) for text in cell["expressions"]})
        except BaseException as error:
            return {"error": {"cell": number, "line": cell["line"], "text": explain(error, path)}}
    return {
        "cells": cells,
        "labels_used": {language: sorted(found.used) for language, found in labels.items()},
    }


def evaluate(text: str, namespace: dict[str, Any], style: ModuleType) -> str:
    """The value of `expression` or `expression:format` as text; without a format as tables show it."""
    text = text.strip()
    expression, form = text, ""
    for cut in [len(text), *(at for at in range(len(text) - 1, 0, -1) if text[at] == ":")]:
        try:
            ast.parse(text[:cut].strip(), mode="eval")
        except SyntaxError:
            continue
        expression, form = text[:cut].strip(), text[cut + 1 :]
        break
    value = eval(expression, namespace)
    if not form:
        return style.number(value)
    return format(value.item() if hasattr(value, "item") and value.ndim == 0 else value, form)


def figures(style: ModuleType, labels: dict[str, Labels], salt: str) -> Iterator[dict[str, Any]]:
    """The figures that a cell left open, drawn once for each language, and closed.

    Raises ValueError for a figure without a caption.
    """
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    for number in plt.get_fignums():
        figure = plt.figure(number)
        caption = style.caption_of(figure)
        if caption is None:
            raise ValueError("a figure has no caption: call style.caption(fig, ...)")
        drawn = {"en": draw(figure, salt)}
        texts = {text: text.get_text() for text in figure.findobj(Text)}
        for language, translate in labels.items():
            with looked_up(texts, translate):
                drawn[language] = draw(figure, salt)
        yield {
            "kind": "figure",
            "caption": caption,
            "svg": drawn,
            "texts": sorted({text for text in texts.values() if needs_translation(text)}),
        }
        plt.close(figure)


def draw(figure: Any, salt: str) -> str:
    """A figure as SVG, the same at every run, its text as text."""
    import matplotlib as mpl

    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


@contextlib.contextmanager
def looked_up(texts: dict[Any, str], translate: Labels) -> Iterator[None]:
    """While a figure is drawn its texts are translated, those of ticks too, which are set while it is drawn."""
    from matplotlib.text import Text

    set_text = Text.set_text

    def set_translated(self: Any, text: Any) -> None:
        set_text(self, translate(text) if isinstance(text, str) else text)

    Text.set_text = set_translated  # type: ignore[method-assign]
    try:
        for text, words in texts.items():
            text.set_text(words)
        yield
    finally:
        Text.set_text = set_text  # type: ignore[method-assign]
        for text, words in texts.items():
            text.set_text(words)


def explain(error: BaseException, path: Path) -> str:
    """The part of a traceback that begins in the chapter."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [at for at, frame in enumerate(frames) if Path(frame.filename) == path]
    shown = "".join(traceback.format_list(frames[inside[0] :])) if inside else ""
    return shown + "".join(traceback.format_exception_only(error))


def main() -> None:
    job, result = map(Path, sys.argv[1:])
    done = run(json.loads(job.read_text(encoding="utf-8")))
    result.write_text(json.dumps(done, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
