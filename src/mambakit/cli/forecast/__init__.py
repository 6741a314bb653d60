"""`mambakit forecast`: train models of prices, predict from them, and judge both.

Everything heavy is imported inside the commands, so that help and predictions come at once.
"""

import typer

from mambakit.cli.forecast import backtest, data, models, monitor, predict, report, train, tune

app = typer.Typer(
    help="Forecast prices 1, 5, 10 and 30 days ahead, with intervals, and beside honest baselines.",
    no_args_is_help=True,
)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=predict.EXAMPLES)(predict.predict)
app.command(epilog=backtest.EXAMPLES)(backtest.backtest)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=tune.EXAMPLES)(tune.tune)
app.command(epilog=data.EXAMPLES)(data.data)
app.add_typer(models.app, name="models")
app.command(epilog=monitor.MONITOR_EXAMPLES)(monitor.monitor)
app.command(epilog=monitor.AB_EXAMPLES)(monitor.ab)
