"""`mambakit lm`: language models, from a text file to generated text.

Everything heavy is imported inside the commands, so that help comes at once.
"""

import typer

from mambakit.cli.lm import bench, convert, evaluate, finetune, generate, train

app = typer.Typer(
    help="Language models: train, generate, fine-tune, evaluate, convert between the public formats, measure.",
    no_args_is_help=True,
)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=finetune.EXAMPLES)(finetune.finetune)
app.command(name="eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=convert.EXAMPLES)(convert.convert)
app.command(epilog=bench.EXAMPLES)(bench.bench)
