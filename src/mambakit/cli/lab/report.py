"""`mambakit lab report`: tables and figures of runs, and the published numbers beside ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Tables and figures of the runs in a folder, and what they say of the claims:

  mambakit lab report sweep

  mambakit lab report sweep --claims

Enter what the runs measured into a claims file:

  mambakit lab report sweep --claims --enter src/mambakit/lab/claims.toml --made-by "mambakit lab sweep phase.toml"

Every published number with what was measured for it so far:

  mambakit lab report --claims --every
"""


def report(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Of a run or a sweep; the report goes to DIR/report.")
    ] = None,
    claims: Annotated[bool, typer.Option("--claims", help="Compare with the published numbers.")] = False,
    every: Annotated[
        bool, typer.Option("--every", help="With --claims: a line for each cell of a published table.")
    ] = False,
    enter: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --claims: enter what DIR measured into this claims file.")
    ] = None,
    made_by: Annotated[str, typer.Option(help="With --enter: the command that made the runs.")] = "",
) -> None:
    """Show every seed's best and last evaluation, draw figures, and hold the runs to the published claims.

    Without DIR, --claims prints the claims with what was measured for them.
    """
    import datetime

    from mambakit.errors import DataError
    from mambakit.lab.claims import load_claims
    from mambakit.lab.claims_entry import enter as enter_claims
    from mambakit.lab.report import claim_table, effect_table, read_runs, run_table
    from mambakit.lab.report import report as write_report

    if every and not claims:
        raise DataError("--every is of --claims; add that")
    if folder is None and not claims:
        raise DataError("give the folder of a run or a sweep, or --claims")
    if enter is not None and (folder is None or not claims or not made_by):
        raise DataError("--enter goes with DIR, --claims and --made-by")
    held_to = load_claims() if claims else None
    records = None
    if folder is not None:
        records = read_runs(folder)
        made = write_report(folder, held_to)
        for task in dict.fromkeys(record.task for record in records):
            _print(f"{task}: sequences right", run_table([r for r in records if r.task == task]))
        print(f"{made[0]}, with {len(made) - 2} figures and runs.csv beside it")
    if enter is not None and records is not None:
        lines = [record.lines for record in records]
        entered = enter_claims(enter, lines, made_by, datetime.datetime.now(datetime.UTC).date())
        print(f"{len(entered)} entries written to {enter}")
    if held_to is not None:
        whose = "claims.toml" if folder is None else str(folder)
        _print(f"what the mini presets show ({whose})", effect_table(held_to, records))
        _print(f"published numbers, at the papers' settings ({whose})", claim_table(held_to, records, every))


def _print(title: str, rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from mambakit.cli.console import console

    head, *body = rows
    table = Table(*head, title=title, title_justify="left")
    for row in body:
        table.add_row(*row)
    console().print(table)
