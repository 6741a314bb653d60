"""A chapter's English texts in another language: of its figures, captions, tables, checks and printed lines.

A text that holds a number from the run is written with `{}` in the number's place, in both languages:
"falls {} times": "падает в {} раз".
"""

import re
from collections.abc import Iterable, Mapping
from itertools import chain, zip_longest


class Labels:
    """Looks texts up, and remembers which labels were used and which texts had none."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Raises ValueError where a label and its translation have different numbers of `{}`."""
        for text, translated in labels.items():
            if text.count("{}") != translated.count("{}"):
                raise ValueError(
                    f"label {text!r} has {text.count('{}')} times {{}}, its translation {translated!r} not"
                )
        self._labels = dict(labels)
        self._patterns = {
            text: re.compile("(.+?)".join(map(re.escape, text.split("{}")))) for text in labels if "{}" in text
        }
        self.used: set[str] = set()
        self.missing: dict[str, None] = {}

    def __call__(self, text: str) -> str:
        """The text in the other language, or as it stands where it has no label."""
        bare = text.strip()
        if bare in self._labels:
            self.used.add(bare)
            return text.replace(bare, self._labels[bare])
        for label, pattern in self._patterns.items():
            found = pattern.fullmatch(bare)
            if found:
                self.used.add(label)
                parts = self._labels[label].split("{}")
                translated = "".join(chain.from_iterable(zip_longest(parts, found.groups(), fillvalue="")))
                return text.replace(bare, translated)
        if needs_translation(bare):
            self.missing[bare] = None
        return text

    def unused(self, used: Iterable[str]) -> list[str]:
        """The labels that are not among those used."""
        return sorted(set(self._labels) - set(used))


def needs_translation(text: str) -> bool:
    """Whether a text has an English word outside its formulas; names such as Mamba-2 and S4D need no translation."""
    words = re.findall(r"[A-Za-z]{3,}", re.sub(r"\$[^$]*\$|https?:\S+", "", text))
    return any(word.islower() or (word[1:].islower() and word not in _NAMES) for word in words)


_NAMES = {"Mamba", "Transformer", "Euler", "Legendre", "Blelloch", "Hillis", "Steele", "Adam", "Achilles"}
