"""A figure's SVG as it goes into a page: its own ids, the page's colours in the light and the dark scheme."""

import re

from mambakit.lab.figures import COLOURS, GRID, INK, QUIET

# The page's style sheet gives each its value in both schemes; what is drawn in other colours keeps them.
_VARIABLES = {
    **{colour.lower(): f"var(--figure-{number})" for number, colour in enumerate(COLOURS[:-1], start=1)},
    COLOURS[-1].lower(): "var(--figure-ink)",
    INK.lower(): "var(--figure-ink)",
    QUIET.lower(): "var(--figure-quiet)",
    GRID.lower(): "var(--figure-grid)",
    "#ffffff": "var(--figure-ground)",
    "white": "var(--figure-ground)",
}


def for_page(svg: str, name: str) -> str:
    """The `<svg>` element, as wide as its place; `name` makes its ids unlike those of the page's other figures."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = re.match(r"(<svg[^>]*>)(.*)", svg, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    head = re.sub(r' (?:width|height|version|xmlns:xlink)="[^"]*"', "", head)
    head = head.replace("<svg", f'<svg role="img" aria-labelledby="{name}"', 1)
    rest = re.sub(r"xlink:href=", "href=", rest)
    wanted = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in wanted else "", rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r'style="([^"]*)"', lambda found: f'style="{_coloured(found[1])}"', rest)
    return head + re.sub(r"\n\s*", "\n", rest)


def _coloured(style: str) -> str:
    return re.sub(
        r"((?:fill|stroke): ?)(#[0-9a-fA-F]{6}|white)",
        lambda found: found[1] + _VARIABLES.get(found[2].lower(), found[2]),
        style,
    )
