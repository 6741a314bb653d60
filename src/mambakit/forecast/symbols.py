"""Lists of symbols: the named one, and what a user writes in place of one on the command line."""

from pathlib import Path

from mambakit.errors import DataError
from mambakit.forecast.prices import parse_symbol

# Fifty of the largest companies listed in the US by market value, as of January 2025; Alphabet by its class A.
# fmt: off
TIER_1 = (
    "AAPL", "NVDA", "MSFT", "AMZN", "GOOGL", "META", "AVGO", "TSLA", "BRK.B", "WMT",
    "JPM", "LLY", "V", "MA", "ORCL", "XOM", "UNH", "COST", "PG", "HD",
    "JNJ", "NFLX", "BAC", "CRM", "ABBV", "KO", "TMUS", "CVX", "MRK", "CSCO",
    "WFC", "ACN", "ADBE", "NOW", "PEP", "AXP", "MCD", "IBM", "DIS", "LIN",
    "MS", "TMO", "AMD", "ABT", "ISRG", "GS", "PM", "GE", "INTU", "CAT",
)
# fmt: on
_LISTS = {"TIER_1": TIER_1}


def parse_symbols(text: str) -> tuple[str, ...]:
    """Symbols, in the order written, each once.

    Args:
        text: symbols with commas between them (AAPL,MSFT); the name of a list (TIER_1); @FILE for a text file with
            the same, on any number of lines, where # starts a comment; or a mixture (TIER_1,IBM,@mine.txt).

    Raises DataError where there is no symbol, one that is none, or a file that can't be read.
    """
    symbols: list[str] = []
    for part in text.split(","):
        symbols += _read_list(Path(part.strip()[1:]).expanduser()) if part.strip().startswith("@") else _words(part)
    if not symbols:
        raise DataError(f"{text!r} names no symbol; expected a list such as AAPL,MSFT, or TIER_1, or @FILE")
    return tuple(dict.fromkeys(symbols))


def _words(text: str) -> list[str]:
    symbols: list[str] = []
    for word in text.replace(",", " ").split():
        symbols += _LISTS.get(word.upper()) or [parse_symbol(word)]
    return symbols


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise DataError(f"cannot read the symbols in {path}: {reason}") from error
    symbols: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            symbols += _words(line.split("#")[0])
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    if not symbols:
        raise DataError(f"{path} names no symbol; expected one a line, such as AAPL")
    return symbols
