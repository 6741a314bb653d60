"""Streaming prediction at full size: every kind trained in one loop, and what was promised, passed or failed.

    python -m benchmarks.stream                                        # the synthetic market, all kinds, 3 seeds
    python -m benchmarks.stream --workers 16                           # one process a network, a thread each
    python -m benchmarks.stream --device cuda --precision bf16
    python -m benchmarks.stream --proxy --epochs 10                    # real ticks; needs mlfinpy
    python -m benchmarks.stream --data train.parquet --test valid.parquet

Each kind is trained on four fifths of the training sequences and stopped by the last fifth; the scores are those of a
test set that nobody saw, from the whole-sequence form. Times are of training alone; with several workers they are
those of networks side by side.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

KINDS = ("mamba", "mamba2", "mamba3", "gru", "lstm", "ridge")
MAMBAS, RIVALS = ("mamba", "mamba2", "mamba3"), ("gru", "lstm")
TEST_SHARE = 0.2
ABOVE_RIDGE, SHARE_OF_ATTAINABLE = 0.04, 0.95
MINUTES = {"cpu": 45.0, "cuda": 10.0}  # for three models


@dataclass(frozen=True)
class Job:
    """One network to train, all that a worker needs."""

    kind: str
    number: int  # which seed
    train: str  # parquet files
    test: str
    model: dict[str, Any]  # of StreamConfig
    training: dict[str, Any]  # of TrainingConfig
    device: str
    threads: int
    quiet: bool


@dataclass(frozen=True)
class Trained:
    """What came of a job."""

    kind: str
    number: int
    parameters: int
    seconds: float
    epochs: int
    best_epoch: int
    validation: float
    test: float
    error: str  # empty if all went well


def train_one(job: Job) -> tuple[Trained, np.ndarray | None]:
    """Train one network and predict the test set: (scored rows, targets), or None where training failed."""
    os.environ["ACCELERATE_USE_CPU"] = str(job.device == "cpu").lower()
    import torch

    torch.set_num_threads(job.threads)
    from mambakit.errors import MambakitError
    from mambakit.stream import Ensemble, StreamConfig, read_sequences
    from mambakit.stream.contest import target_scores
    from mambakit.stream.train import parameters, prepare_parts, train_network
    from mambakit.training import TrainingConfig

    config, training = StreamConfig.model_validate(job.model), TrainingConfig.model_validate(job.training)
    sequences, test = read_sequences(job.train), read_sequences(job.test)
    parts = prepare_parts(sequences, config, training)
    started = time.perf_counter()
    try:
        name = f"{job.kind} {job.number + 1}"
        model, record = train_network(parts, config, training, job.number, quiet=job.quiet, description=name)
    except MambakitError as error:
        return Trained(job.kind, job.number, 0, time.perf_counter() - started, 0, 0, 0.0, 0.0, str(error)), None
    seconds = time.perf_counter() - started
    predictions = Ensemble(config, sequences.layout, [model], parts.ridge).predict(test.states)[test.scored]
    score = target_scores(test.targets[test.scored], predictions, test.layout.targets)["mean_r2"]
    trained = Trained(
        job.kind,
        job.number,
        parameters(model),
        seconds,
        int(record.history[-1]["epoch"]),
        record.best_epoch,
        1 - record.best_validation_loss,
        score,
        "",
    )
    return trained, predictions


def main() -> None:
    """Make or find the data, train, print the table and the verdicts, and write the record."""
    options = _options()
    console = Console(width=None if Console().is_terminal else 130)
    with tempfile.TemporaryDirectory() as folder:
        train, test, attainable, about = _data(options, Path(folder))
        console.print(about)
        record = _run(options, console, train, test, attainable)
    record["data"] = about
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _run(
    options: argparse.Namespace, console: Console, train: str, test: str, attainable: float | None
) -> dict[str, Any]:
    from mambakit.stream import read_sequences
    from mambakit.stream.config import STREAM_TRAINING
    from mambakit.stream.contest import target_scores
    from mambakit.stream.data import split_sequences
    from mambakit.stream.ridge import fit_ridge
    from mambakit.stream.train import VALIDATION_SHARE

    held_out = read_sequences(test)
    truth, names = held_out.targets[held_out.scored], held_out.layout.targets

    def score(predictions: np.ndarray) -> float:
        return target_scores(truth, predictions, names)["mean_r2"]

    scores: dict[str, float] = {"repeat": score(held_out.states[held_out.scored])}
    learnt, _ = split_sequences(read_sequences(train), VALIDATION_SHARE, STREAM_TRAINING.seed)
    scores["ridge"] = score(fit_ridge(learnt, 3).predict(held_out.states)[held_out.scored])
    started = time.perf_counter()
    trained, ensembles = _train_all(options, train, test)
    wall = time.perf_counter() - started
    scores |= {kind: score(predictions) for kind, predictions in ensembles.items()}
    ticks = int(learnt.lengths.sum())
    console.print(_table(trained, scores, attainable, ticks))
    verdicts = _verdicts(options, trained, scores, attainable)
    for passed, sentence in verdicts:
        console.print(f"{'PASS' if passed else 'FAIL'}  {sentence}")
    console.print(f"all training: {wall / 60:.1f} min with {options.workers} workers on {options.device}")
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        "attainable": attainable,
        "scores": scores,
        "networks": [asdict(one) for one in trained],
        "verdicts": [{"passed": passed, "what": sentence} for passed, sentence in verdicts],
        "wall_seconds": wall,
    }


def _train_all(options: argparse.Namespace, train: str, test: str) -> tuple[list[Trained], dict[str, np.ndarray]]:
    """Every network, and the mean prediction of each kind whose networks all trained."""
    jobs = [
        _job(options, kind, number, train, test)
        for kind in options.kinds
        if kind != "ridge"
        for number in range(options.seeds)
    ]
    if options.workers > 1:
        # spawn: a forked process can't use CUDA, nor OpenMP after its parent has.
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(train_one, jobs))
    else:
        outcomes = [train_one(job) for job in jobs]
    ensembles = {}
    for kind in options.kinds:
        parts = [predictions for one, predictions in outcomes if one.kind == kind]
        if parts and all(part is not None for part in parts):
            ensembles[kind] = np.mean([part for part in parts if part is not None], axis=0, dtype=np.float64)
    return [one for one, _ in outcomes], ensembles


def _job(options: argparse.Namespace, kind: str, number: int, train: str, test: str) -> Job:
    from mambakit.stream.config import STREAM_TRAINING

    training = STREAM_TRAINING.model_dump() | {"epochs": options.epochs, "mixed_precision": options.precision}
    for name in ("batch_size", "learning_rate", "weight_decay", "patience"):
        if getattr(options, name) is not None:
            training[name] = getattr(options, name)
    if options.restart_epochs is not None:
        training |= {"schedule": "restarts", "restart_epochs": options.restart_epochs}
    model = {
        "kind": kind,
        "d_model": options.d_model,
        "n_layers": options.n_layers,
        "features": options.features,
        "residual": options.residual,
        "dropout": options.dropout,
    }
    quiet = options.quiet or options.workers > 1
    return Job(kind, number, train, test, model, training, options.device, options.threads, quiet)


def _data(options: argparse.Namespace, folder: Path) -> tuple[str, str, float | None, str]:
    """Training file, test file, the attainable score on the latter if known, and a line that says what they are."""
    from benchmarks import stream_proxy
    from mambakit.stream.generate import attainable_score, generate, reference_scores, write_generated

    if options.data:
        return str(options.data), str(options.test), attainable_score(options.test), f"{options.data}, {options.test}"
    train, test = folder / "train.parquet", folder / "test.parquet"
    if options.proxy:
        for path, table in zip((train, test), stream_proxy.tables(), strict=True):
            table.to_parquet(path)
        return str(train), str(test), None, "real ticks of mlfinpy in the contest's shape"
    sizes = {train: options.sequences, test: max(2, round(TEST_SHARE * options.sequences))}
    for seed, (path, sequences) in enumerate(sizes.items()):
        table = generate(sequences, options.steps, seed=seed)
        scores = reference_scores(table)
        write_generated(path, table, scores)
    about = f"synthetic: {sizes[train]} training and {sizes[test]} test sequences of {options.steps} steps"
    return str(train), str(test), scores["attainable"], about


def _table(trained: list[Trained], scores: dict[str, float], attainable: float | None, ticks: int) -> Table:
    table = Table(title="mean R2 on the test set", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kind", "ensemble", "above ridge", "of attainable", "networks", "parameters", "s each", "ticks/s"):
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    if attainable is not None:
        table.add_row("attainable", f"{attainable:.4f}", f"{attainable - scores['ridge']:+.4f}", "100.0%")
    for kind in sorted(scores, key=lambda name: -scores[name]):
        own = [one for one in trained if one.kind == kind]
        share = "-" if attainable is None else f"{scores[kind] / attainable:.1%}"
        cells = [kind, f"{scores[kind]:.4f}", f"{scores[kind] - scores['ridge']:+.4f}", share]
        if own:
            seconds = sum(one.seconds for one in own) / len(own)
            speed = ticks * sum(one.epochs for one in own) / sum(one.seconds for one in own)
            networks = " ".join(f"{one.test:.4f}" for one in own)
            cells += [networks, f"{own[0].parameters:,}", f"{seconds:.0f}", f"{speed:,.0f}"]
        table.add_row(*cells)
    return table


def _verdicts(
    options: argparse.Namespace, trained: list[Trained], scores: dict[str, float], attainable: float | None
) -> list[tuple[bool, str]]:
    failed = [one for one in trained if one.error]
    verdicts = [
        (not failed, f"all {len(trained)} networks trained without NaN" + "".join(f"; {one.error}" for one in failed))
    ]
    for kind in (kind for kind in MAMBAS if kind in scores):
        lead = scores[kind] - scores["ridge"]
        verdicts.append((lead >= ABOVE_RIDGE, f"{kind} is {lead:+.4f} above ridge (wanted {ABOVE_RIDGE:+})"))
        for rival in (rival for rival in RIVALS if rival in scores):
            lead = scores[kind] - scores[rival]
            verdicts.append((lead > 0, f"{kind} is {lead:+.4f} above {rival} of its size"))
        if attainable is not None:
            share = scores[kind] / attainable
            verdicts.append(
                (share >= SHARE_OF_ATTAINABLE, f"{kind} reaches {share:.1%} of the attainable (wanted 95%)")
            )
        minutes = sum(one.seconds for one in trained if one.kind == kind) / 60
        limit = MINUTES[options.device] * options.seeds / 3
        verdicts.append(
            (minutes <= limit, f"{kind}: {options.seeds} models one by one take {minutes:.1f} min ({limit:.0f})")
        )
    return verdicts


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="mixed precision")
    parser.add_argument("--kinds", type=lambda text: tuple(text.split(",")), default=KINDS, help="such as mamba,gru")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--workers", type=int, default=1, help="networks trained side by side")
    parser.add_argument("--threads", type=int, default=None, help="of each; by default all, or 1 with workers")
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--features", choices=("raw", "engineered"), default="raw")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--residual", action="store_true", help="predict what ridge leaves over")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--patience", type=int)
    parser.add_argument("--restart-epochs", type=int, help="cosine with warm restarts")
    parser.add_argument("--proxy", action="store_true", help="real ticks instead of synthetic ones")
    parser.add_argument("--data", type=Path, help="a training file in the contest's format")
    parser.add_argument("--test", type=Path, help="the file to score on, with --data")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure to FILE")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    if (options.data is None) != (options.test is None):
        parser.error("--data and --test come together")
    if options.device == "cuda" and not _cuda():
        parser.error("--device cuda: torch sees no CUDA device here")
    options.threads = options.threads or (1 if options.workers > 1 else os.cpu_count())
    return options


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
