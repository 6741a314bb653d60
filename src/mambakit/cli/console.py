"""Where tables go: a terminal as wide as it is, or a pipe, which has no width to ask for."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 120  # columns


def console() -> "Console":
    """A console on stdout that prints text as it is."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False)
