"""Run chapters as the build does, and say what is wrong: `python -m tools.guide docs/guide/01_spring.py ...`

Without names, all chapters. `--labels ru` lists the texts of figures, captions, tables, checks and printed lines that
the translation has no label for.
"""

import argparse
import sys
from pathlib import Path

from tools.guide.chapter import LANGUAGES, Chapter, ChapterError, read
from tools.guide.labels import Labels, needs_translation
from tools.guide.page import make_page
from tools.guide.results import ROOT, results


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tools.guide", description=__doc__.splitlines()[0])
    arguments.add_argument("chapters", nargs="*", type=Path)
    arguments.add_argument("--labels", choices=LANGUAGES[1:], help="list the texts without a label in this language")
    asked = arguments.parse_args()
    paths = asked.chapters or sorted((ROOT / "docs" / "guide").glob("[0-9][0-9]_*.py"))
    try:
        chapters = [read(path) for path in paths]
        shown = results(chapters)
        for chapter in chapters:
            for language in ["en", *chapter.translations]:
                make_page(chapter, shown[chapter.slug], language)
            if asked.labels:
                print(f"{chapter.path.name}, without a label in {asked.labels}:")
                print("".join(f"  {text!r}\n" for text in unlabelled(chapter, shown[chapter.slug], asked.labels)))
    except ChapterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def unlabelled(chapter: Chapter, result: dict, language: str) -> list[str]:
    """The texts that a reader of the language sees in English."""
    translation = chapter.translations.get(language)
    labels = Labels(translation.labels if translation else {})
    texts: dict[str, None] = {}
    for cell, outputs in zip(chapter.cells, result["cells"], strict=True):
        for output in outputs if cell.kind == "code" else ():
            if output["kind"] == "figure":
                texts.update(dict.fromkeys([output["caption"], *output["texts"]]))
            elif output["kind"] == "table":
                texts.update(dict.fromkeys([*output["headings"], *(cell for row in output["rows"] for cell in row)]))
            elif output["kind"] == "check":
                texts[output["says"]] = None
            elif output["kind"] == "text":
                texts.update(dict.fromkeys(map(str.strip, output["text"].splitlines())))
    for text in texts:
        if needs_translation(text):
            labels(text)
    return list(labels.missing)


if __name__ == "__main__":
    sys.exit(main())
