"""A Markdown extension: a docstring's `>>>` examples become blocks of code. Markdown would take them for quotations."""

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor


class DocTests(Extension):
    """Lines from one that begins with `>>> ` to the next empty one are shown as a Python session."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Fences(md), "doctests", 29)  # before fences are found


class _Fences(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        made: list[str] = []
        inside = False
        for line in [*lines, ""]:
            begins = line.startswith(">>> ") and not inside
            ends = inside and not line.strip()
            made += ["", "```pycon"] if begins else ["```"] if ends else []
            inside = (inside or begins) and not ends
            made.append(line.replace("# doctest: +SKIP", "").rstrip() if inside else line)
        return made
