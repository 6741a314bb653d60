"""Lists of symbols by name, on the command line, and in files."""

from pathlib import Path

import pytest

from mambakit.errors import DataError
from mambakit.forecast import TIER_1, parse_symbols
from mambakit.forecast.prices import parse_symbol


def test_tier_1_is_fifty_different_symbols() -> None:
    assert len(TIER_1) == len(set(TIER_1)) == 50
    assert all(parse_symbol(symbol) == symbol for symbol in TIER_1)
    assert {"AAPL", "MSFT", "GOOGL"} <= set(TIER_1)


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("AAPL", ("AAPL",)),
        ("aapl, msft ,BRK.B", ("AAPL", "MSFT", "BRK.B")),
        ("MSFT AAPL", ("MSFT", "AAPL")),
        ("AAPL,MSFT,aapl", ("AAPL", "MSFT")),
        ("TIER_1", TIER_1),
        ("tier_1", TIER_1),
        ("ZZZZ,TIER_1,AAPL", ("ZZZZ", *TIER_1)),
    ],
)
def test_symbols_are_read_in_their_order_each_once(text: str, symbols: tuple[str, ...]) -> None:
    assert parse_symbols(text) == symbols


def test_a_file_may_hold_symbols_commas_comments_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "my list.txt"
    path.write_text("# what I watch\nibm, ge\n\nAAPL  # the phones\ntier_1\n")
    assert parse_symbols(f"@{path}") == tuple(dict.fromkeys(("IBM", "GE", "AAPL", *TIER_1)))
    mixed = parse_symbols(f"ZZZZ,@{path},YYYY")
    assert (mixed[0], mixed[1], mixed[-1]) == ("ZZZZ", "IBM", "YYYY")


@pytest.mark.parametrize("text", ["", " , ", ",,"])
def test_no_symbol_at_all_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"names no symbol; expected a list such as AAPL,MSFT, or TIER_1, or @FILE"):
        parse_symbols(text)


def test_a_wrong_symbol_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("AAPL\n../etc\n")
    with pytest.raises(DataError, match=r"list\.txt, line 2: '\.\./etc' is not a symbol"):
        parse_symbols(f"@{path}")


def test_a_file_that_is_empty_or_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing yet\n")
    with pytest.raises(DataError, match=r"empty\.txt names no symbol; expected one a line"):
        parse_symbols(f"@{tmp_path / 'empty.txt'}")
    with pytest.raises(DataError, match=r"cannot read the symbols in .*missing\.txt: No such file"):
        parse_symbols(f"@{tmp_path / 'missing.txt'}")
