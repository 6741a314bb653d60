"""An extension of griffe, which reads docstrings for the reference: arguments that share a line get one each.

    u, delta, z: (batch, length, dim).

is three arguments, of which griffe, taking it for one, knows neither types nor defaults.
"""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"(?:^|\n)( *)Args:\n((?:\1 +.*\n?|\s*\n)+)")


class SharedArguments(griffe.Extension):
    """Writes `a, b: text` in a docstring's `Args:` as `a: text` and `b: text`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(lambda found: _split(found[0]), obj.docstring.value)


def _split(section: str) -> str:
    lines = section.split("\n")
    indent = min((len(line) - len(line.lstrip()) for line in lines[2:] if line.strip()), default=0)
    made: list[str] = []
    block: list[str] = []
    for line in [*lines, ""]:
        starts = line.strip() and len(line) - len(line.lstrip()) == indent
        if block and (starts or not line.strip()):
            made += _each(block)
            block = []
        if starts or block:
            block.append(line)
        else:
            made.append(line)
    return "\n".join(made[:-1])


def _each(block: list[str]) -> list[str]:
    shared = re.match(r"( *)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)", block[0])
    if not shared:
        return block
    names = shared[2].split(", ")
    return [line for name in names for line in (f"{shared[1]}{name}: {shared[3]}", *block[1:])]
