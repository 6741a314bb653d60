"""`mambakit stream`: models of market states, from a contest's training file to its submission.

Everything heavy is imported inside the commands, so that help comes at once.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mambakit.stream.config import StreamConfig
    from mambakit.training import TrainingConfig

app = typer.Typer(
    help="Predict market states step by step: train on a contest's file, score, pack a submission.",
    no_args_is_help=True,
)

_MODEL = Path("stream-model")

_GENERATE_EXAMPLES = """
A training file and a file to score on, of one synthetic market:

  mambakit stream generate --out train.parquet

  mambakit stream generate --out valid.parquet --sequences 100 --seed 1
"""

_TRAIN_EXAMPLES = """
All defaults, on the contest's own file or a generated one:

  mambakit stream train --data train.parquet

Smaller and sooner:

  mambakit stream train --data train.parquet --num-models 1 --epochs 5 --d-model 64 --n-layers 2

Go on with a training that was killed, with the options it had:

  mambakit stream train --data train.parquet --resume

Columns of the row itself as targets, weighted Pearson as the metric:

  mambakit stream train --data train.parquet --target t0,t1 --metric pearson
"""

_SCORE_EXAMPLES = """
  mambakit stream score --data valid.parquet

  mambakit stream score --data valid.parquet --model stream-model --precision bfloat16 --json
"""

_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no explanations.")]
_Data = Annotated[Path, typer.Option(help="A parquet file in the contest's format.")]
_Model = Annotated[Path, typer.Option(help="Folder of the trained models.")]


@app.command(epilog=_GENERATE_EXAMPLES)
def generate(
    out: Annotated[Path, typer.Option(help="The parquet file to write.")],
    sequences: Annotated[int, typer.Option(min=1, help="Sequences.")] = 500,
    steps: Annotated[int, typer.Option(min=102, help="Steps of each, of which 100 warm up.")] = 1000,
    features: Annotated[int, typer.Option(min=8, help="Width of a state, a multiple of 8.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Draws the sequences; the dynamics stay the same.")] = 0,
) -> None:
    """Write a synthetic file in the contest's format, and print the best score that anyone can get on it.

    Synthetic: a score on it says nothing of scores on real data.
    """
    from mambakit.errors import DataError
    from mambakit.stream.generate import generate as draw
    from mambakit.stream.generate import reference_scores, write_generated

    if out.exists():
        raise DataError(f"{out} is there already; remove it, or choose another name with --out")
    table = draw(sequences, steps, features, seed)
    scores = reference_scores(table)
    write_generated(out, table, scores)
    print(f"{out}: {sequences} synthetic sequences of {steps} steps, {features} features, seed {seed}")
    print(
        f"attainable mean R2 {scores['attainable']:.4f} (the exact filter); repeating the state {scores['repeat']:.4f}"
    )


@app.command(epilog=_TRAIN_EXAMPLES)
def train(
    data: _Data,
    out: Annotated[Path, typer.Option(help="Folder for the trained models.")] = _MODEL,
    num_models: Annotated[int, typer.Option(min=1, help="Networks that differ by their seeds.")] = 3,
    kind: Annotated[str, typer.Option(help="mamba, mamba2, mamba3, s4d, or a rival: gru, lstm.")] = "mamba",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part, at most.")] = 15,
    d_model: Annotated[int, typer.Option(min=1, help="Width; of a rival: of the Mamba as large as it.")] = 128,
    n_layers: Annotated[int, typer.Option(min=1, help="Blocks.")] = 4,
    d_state: Annotated[int | None, typer.Option(min=1, help="State size; by default a good one for the kind.")] = None,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Steps that gradients flow back; by default all. The state is carried.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences behind one step of the optimiser.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="AdamW's decay of the weight matrices.")] = None,
    dropout: Annotated[float, typer.Option(help="On what leaves the stack, while training.")] = 0.0,
    features: Annotated[str, typer.Option(help="raw, or engineered: 13 numbers for each input.")] = "raw",
    normalise: Annotated[bool, typer.Option("--normalise", help="Standardise within the sequence as it runs.")] = False,
    residual: Annotated[bool, typer.Option("--residual", help="Predict what ridge leaves over.")] = False,
    target: Annotated[
        str | None, typer.Option(help="Columns to predict, such as t0,t1; by default the next state.")
    ] = None,
    metric: Annotated[str, typer.Option(help="r2, or pearson: weighted by |target|.")] = "r2",
    restart_epochs: Annotated[
        int | None, typer.Option(min=1, help="Cosine with warm restarts, the first after so many epochs.")
    ] = None,
    average_decay: Annotated[float | None, typer.Option(help="Of the average of the weights; 0 keeps none.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without progress.")] = None,
    validation_share: Annotated[float, typer.Option(min=0.01, max=0.9, help="Sequences that are held out.")] = 0.2,
    precision: Annotated[str, typer.Option(help="no or bf16: mixed precision in training.")] = "no",
    seed: Annotated[int, typer.Option(min=0, help="Fixes the split and all randomness.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was killed.")] = False,
    quiet: _Quiet = False,
) -> None:
    """Train an ensemble on whole sequences, and judge it on sequences that it has not seen.

    Prints the ensemble's score beside its networks', ridge's and repetition's. Stores it as the folder OUT.
    """
    changes = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "patience": patience,
        "seed": seed,
        "mixed_precision": precision,
        "average_decay": average_decay,
    }
    training: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if average_decay == 0:
        training["average_decay"] = None
    if restart_epochs is not None:
        training |= {"schedule": "restarts", "restart_epochs": restart_epochs}
    model = {
        "kind": kind,
        "d_model": d_model,
        "n_layers": n_layers,
        "d_state": d_state,
        "context_length": context_length,
        "dropout": dropout,
        "features": features,
        "normalise": normalise,
        "residual": residual,
        "targets": tuple(name for name in (target or "").split(",") if name.strip()),
        "metric": metric,
    }
    stream_config, training_config = _settings(model, training)
    from mambakit.stream.contest import METRIC_NAMES
    from mambakit.stream.workflow import train_and_store

    saved, there = train_and_store(
        data,
        out,
        stream_config,
        training_config,
        num_models,
        validation_share=validation_share,
        resume=resume,
        quiet=quiet,
    )
    scores, sequences = saved.metrics["validation"], saved.metadata["sequences"]
    mean = f"mean {METRIC_NAMES[saved.ensemble.config.metric]}"
    print(
        f"{num_models} x {kind}, {saved.metadata['parameters']:,} parameters each, "
        f"trained on {sequences['training']} sequences in {saved.metadata['seconds']:.0f} s"
    )
    print(f"Validation, {sequences['validation']} other sequences, {mean}:")
    print(f"  ensemble  {scores['ensemble']:.4f}")
    print(f"  networks  {' '.join(f'{score:.4f}' for score in scores['models'])}")
    print(f"  ridge     {scores['ridge']:.4f}")
    if scores["repeat"] is not None:
        print(f"  repeat    {scores['repeat']:.4f}")
    print(f"{'already trained, kept' if there else 'stored'} as {out}")


@app.command(epilog=_SCORE_EXAMPLES)
def score(
    data: _Data,
    model: _Model = _MODEL,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16: half the weights to read.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    quiet: _Quiet = False,
) -> None:
    """Score trained models on a file as the contest does: row by row, on one thread, the state carried along."""
    import json

    import torch

    torch.set_num_threads(1)  # the contest gives one core
    from mambakit.stream.artefact import load_ensemble
    from mambakit.stream.contest import METRIC_NAMES, Scorer
    from mambakit.stream.generate import attainable_score
    from mambakit.stream.predictor import PredictionModel
    from mambakit.stream.workflow import score_solution

    ensemble = load_ensemble(model).ensemble
    scorer = Scorer(data, ensemble.config.targets, ensemble.config.metric)
    ensemble.require_fit(scorer.layout)
    solution = PredictionModel(ensemble, precision)  # type: ignore[arg-type]  # it checks what it is given
    with _rows_progress(len(scorer.table), quiet or as_json) as on_row:
        result, truth, _ = score_solution(solution, scorer, on_row)
    times, best = result.microseconds(), attainable_score(data)
    if as_json:
        found: dict[str, Any] = {"scores": result.scores, "scored": len(truth), "latency_microseconds": times}
        print(json.dumps(found if best is None else {**found, "attainable": best}, indent=2))
        return
    targets = [value for name, value in result.scores.items() if not name.startswith("mean_")]
    name = f"mean {METRIC_NAMES[scorer.metric]}"
    print(
        f"{name} {result.mean:.4f}, targets from {min(targets):.4f} to {max(targets):.4f}; {len(truth):,} predictions"
    )
    if best is not None:
        print(f"synthetic data: {result.mean / best:.1%} of the attainable {best:.4f}")
    print("time of a tick: " + ", ".join(f"{level} {value:.0f} µs" for level, value in times.items()))
    print(f"all {len(result.seconds):,} ticks: {result.seconds.sum():.1f} s in the model")


@app.command()
def pack(
    model: _Model = _MODEL,
    out: Annotated[Path, typer.Option(help="The zip to write.")] = Path("submission.zip"),
) -> None:
    """Write a submission: solution.py, a step in plain NumPy, and the weights. The same models give the same bytes."""
    import hashlib

    from mambakit.stream.artefact import load_ensemble
    from mambakit.stream.pack import pack as write

    size = write(load_ensemble(model).ensemble, out)
    print(f"{out}: {size / 2**20:.2f} MB of 20, SHA-256 {hashlib.sha256(out.read_bytes()).hexdigest()}")


@app.command()
def report(
    data: _Data,
    model: _Model = _MODEL,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("stream-report"),
    quiet: _Quiet = False,
) -> None:
    """Write tables and figures: the score of each target and along the sequence, learning curves, latency."""
    import torch

    torch.set_num_threads(1)
    from mambakit.errors import ArtefactError
    from mambakit.stream.artefact import load_ensemble
    from mambakit.stream.report import write_report

    if out.exists():
        raise ArtefactError(f"{out} is there already; remove it, or choose another folder with --out")
    saved = load_ensemble(model)
    with _rows_progress(None, quiet) as on_row:
        found = write_report(saved, data, out, on_row)
    for name, scores in found["forecasters"].items():
        print(f"{name:<10} {scores['mean_' + found['metric']]:.4f}")
    print(f"{out / 'report.md'}")


def _settings(model: dict[str, Any], training: dict[str, Any]) -> "tuple[StreamConfig, TrainingConfig]":
    """Both configurations from options; what only they can judge becomes a usage error that names the option."""
    from pydantic import ValidationError

    from mambakit.stream.config import STREAM_TRAINING, StreamConfig
    from mambakit.training import TrainingConfig

    try:
        return (
            StreamConfig.model_validate(model),
            TrainingConfig.model_validate({**STREAM_TRAINING.model_dump(), **training}),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        renamed = {"mixed_precision": "precision"}
        name = str(problem["loc"][0]) if problem["loc"] else "kind"
        message = problem["msg"].removeprefix("Value error, ")
        got = f", got {problem['input']}" if problem["loc"] else ""
        raise typer.BadParameter(
            f"{message}{got}", param_hint="--" + renamed.get(name, name).replace("_", "-")
        ) from error


@contextmanager
def _rows_progress(rows: int | None, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar that counts rows, on a terminal's stderr; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task, seen = bar.add_task("rows", total=rows), 0

        def on_row() -> None:
            nonlocal seen
            seen += 1
            if seen % 1000 == 0:  # telling it of each row would take longer than predicting it
                bar.update(task, completed=seen)

        yield on_row
