"""The font of the formulas, taken from an installed package and cut down to the signs that formulas use.

Browsers lay MathML out by the tables of a mathematical font, and many systems have none. STIX Two Math (SIL Open Font
License) comes with the package ziamath.
"""

import io
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

NAME = "assets/formulas.woff"
# Latin, Greek, punctuation, letterlike signs, arrows, operators, braces, brackets, mathematical letters.
_RANGES = (
    (0x20, 0x7E),
    (0xA0, 0xFF),
    (0x300, 0x338),
    (0x391, 0x3F6),
    (0x2010, 0x2064),
    (0x2102, 0x2134),
    (0x2190, 0x21D4),
    (0x2200, 0x22EF),
    (0x2308, 0x230B),
    (0x23B4, 0x23DF),
    (0x27E6, 0x27EB),
    (0x2A00, 0x2A06),
    (0x1D400, 0x1D467),
    (0x1D49C, 0x1D4CF),
    (0x1D538, 0x1D551),
    (0x1D6A4, 0x1D71B),
)


@lru_cache(maxsize=1)
def formula_font() -> bytes:
    """The font as WOFF, the same bytes at every call."""
    options = subset.Options()
    options.flavor = "woff"
    options.layout_features = ["ssty", "dtls", "flac", "kern", "liga"]
    options.name_IDs = [0, 1, 2, 13, 14]  # names, and the licence
    options.hinting = False
    options.notdef_outline = True
    package = find_spec("ziamath")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the font of the formulas comes with ziamath: pip install 'mambakit[docs]'")
    font = TTFont(Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf", recalcTimestamp=False)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[sign for first, last in _RANGES for sign in range(first, last + 1)])
    cutter.subset(font)
    font.flavor = "woff"
    written = io.BytesIO()
    font.save(written, reorderTables=False)
    return written.getvalue()
