"""`mambakit forecast report`: a page for the browser."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Of all models in a folder:

  mambakit forecast report --run models --out report.html

Of one version, or of a backtest:

  mambakit forecast report --run models/AAPL/v1 --out aapl.html
"""


def report(
    run: Annotated[Path, typer.Option(help="Models, one symbol's, one version, or a backtest.")] = Path("models"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page: fan charts, calibration, the course of the backtest, every comparison.

    Nothing in it is fetched from anywhere, so it can be sent and opened offline.
    """
    from mambakit.forecast.page import write_page

    write_page(run, out)
    print(f"Wrote {out}")
