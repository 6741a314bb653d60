"""`mambakit lab`: synthetic tasks, ablations, and runs of them.

Everything heavy is imported inside the commands, so that help comes at once.
"""

import typer

from mambakit.cli.lab import catalogue, report, run, sweep

app = typer.Typer(
    help="The research lab: synthetic tasks and ablations, trained, evaluated and recorded.",
    no_args_is_help=True,
)
app.command(epilog=run.EXAMPLES)(run.run)
app.command(epilog=sweep.EXAMPLES)(sweep.sweep)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(name="list")(catalogue.catalogue)
