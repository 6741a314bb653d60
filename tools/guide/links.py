"""Look for dead links in a built site, and for anything that it would fetch: `python -m tools.guide.links site`

Every link to a page, a file or an anchor of the site has to lead somewhere, and no page may load a script, a style, a
picture or a font from elsewhere. Nothing is asked of the network.
"""

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch", "manifest"}


@dataclass
class Found(HTMLParser):
    """The anchors of a page, where it links to, and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("href"):
            relations = set(given.get("rel", "").split())
            (self.loaded if relations & _LOADED_LINKS else self.links).append(given["href"])
        elif given.get(_LOADED.get(tag, "")):
            self.loaded.append(given[_LOADED[tag]])
        if "url(" in given.get("style", ""):
            self.loaded += _urls(given["style"])


def problems(site: Path) -> list[str]:
    """One line for each dead link, and for each thing that would be fetched from elsewhere."""
    site = site.resolve()
    pages = {path: _read(path) for path in sorted(site.rglob("*.html"))}
    said = []
    for path, found in pages.items():
        where = path.relative_to(site)
        said += [f"{where}: would fetch {address}" for address in found.loaded if _is_elsewhere(address)]
        for address in [*found.links, *found.loaded]:
            if _is_inside(address) and (reason := _dead(address, path, site, pages)):
                said.append(f"{where}: {address}: {reason}")
    for path in sorted(site.rglob("*.css")):
        for address in _urls(path.read_text(encoding="utf-8")):
            if _is_elsewhere(address):
                said.append(f"{path.relative_to(site)}: would fetch {address}")
            elif _is_inside(address) and (reason := _dead(address, path, site, pages)):
                said.append(f"{path.relative_to(site)}: {address}: {reason}")
    return said


def _read(path: Path) -> Found:
    found = Found()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def _urls(style: str) -> list[str]:
    return re.findall(r"url\(\s*[\"']?([^\"')]+)", style)


def _is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def _is_inside(address: str) -> bool:
    parts = urlsplit(address)
    return not parts.netloc and not parts.scheme


def _dead(address: str, page: Path, site: Path, pages: dict[Path, Found]) -> str | None:
    parts = urlsplit(address)
    target = page
    if parts.path:
        start = site if parts.path.startswith("/") else page.parent
        target = (start / unquote(parts.path).lstrip("/")).resolve()
        target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(site):
        return "leads out of the site"
    if not target.exists():
        return "no such page or file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "no such anchor"
    return None


def main() -> int:
    site = Path(sys.argv[1])
    if not (site / "index.html").exists():
        print(f"{site} is no built site: it has no index.html", file=sys.stderr)
        return 2
    said = problems(site)
    print("\n".join(said) or "Every link leads somewhere, and nothing is fetched.")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
