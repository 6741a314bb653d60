"""`python -m mambakit.cli` is `mambakit`."""

from mambakit.cli import main

main()
