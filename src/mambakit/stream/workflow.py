"""What the commands do, end to end: train and store, resume, score with times."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambakit.errors import ArtefactError, TrainingDiverged
from mambakit.stream.artefact import SavedEnsemble, load_ensemble, save_ensemble
from mambakit.stream.config import StreamConfig
from mambakit.stream.contest import DataPoint, Scorer, Solution, target_scores
from mambakit.stream.data import read_sequences
from mambakit.stream.train import VALIDATION_SHARE, train_ensemble
from mambakit.training import TrainingConfig
from mambakit.training.artefacts import exclusive, remove_folder

PERCENTILES = (50.0, 99.0, 99.9)


def train_and_store(
    data: str | Path,
    out: str | Path,
    config: StreamConfig,
    training: TrainingConfig,
    num_models: int,
    *,
    validation_share: float = VALIDATION_SHARE,
    resume: bool = False,
    quiet: bool = False,
) -> tuple[SavedEnsemble, bool]:
    """Train an ensemble on a file and store it as the folder `out`; returns it, and whether it was there already.

    Checkpoints go to the folder `out`.run beside it, which goes when the ensemble is stored. With `resume` a killed
    training goes on from there, and an `out` that was made with the same settings is taken as it is.

    Raises DataError for a file that can't be used, ArtefactError where `out` is there already or can't be written.
    """
    out, run_dir = Path(out), Path(f"{out}.run")
    if out.exists():
        if resume and (saved := _same_training(out, config, training, num_models)) is not None:
            return saved, True
        raise ArtefactError(f"{out} is there already; remove it, or choose another folder with --out")
    sequences = read_sequences(data, config.targets)
    with exclusive(run_dir):
        try:
            trained = train_ensemble(
                sequences,
                config,
                training,
                num_models,
                validation_share=validation_share,
                run_dir=run_dir,
                resume=resume,
                quiet=quiet,
            )
        except TrainingDiverged:
            remove_folder(run_dir)  # resuming would only diverge again
            raise
        finally:
            with suppress(OSError):
                run_dir.rmdir()  # what holds no checkpoint is not worth resuming
        save_ensemble(out, trained, str(data))
        remove_folder(run_dir)
    return load_ensemble(out), False


def _same_training(out: Path, config: StreamConfig, training: TrainingConfig, num_models: int) -> SavedEnsemble | None:
    saved = load_ensemble(out)
    same = (
        saved.ensemble.config == config
        and saved.metadata["models"] == num_models
        and saved.metadata["training_config"] == training.model_dump(mode="json")
    )
    return saved if same else None


class Timed:
    """A solution that keeps the time of each call.

    Attributes:
        seconds: one number a row.
    """

    def __init__(self, solution: Solution) -> None:
        self._solution = solution
        self.seconds: list[float] = []

    def predict(self, data_point: DataPoint) -> np.ndarray | None:
        start = time.perf_counter()
        prediction = self._solution.predict(data_point)
        self.seconds.append(time.perf_counter() - start)
        return prediction


@dataclass(frozen=True)
class Score:
    """What a solution got on a file."""

    scores: dict[str, float]  # by target, and the mean
    mean: float
    seconds: np.ndarray  # (rows,) of each call

    def microseconds(self) -> dict[str, float]:
        """Percentiles of the time of a tick."""
        return {f"p{level:g}": 1e6 * float(np.percentile(self.seconds, level)) for level in PERCENTILES}


def score_solution(
    solution: Solution, scorer: Scorer, on_row: Callable[[], None] | None = None
) -> tuple[Score, np.ndarray, np.ndarray]:
    """Score tick by tick, as the contest does: the score, truth and predictions (scored rows, targets)."""
    timed = Timed(solution)
    truth, predictions = scorer.collect(timed, on_row)
    scores = target_scores(truth, predictions, scorer.layout.targets, scorer.metric)
    return Score(scores, scores[f"mean_{scorer.metric}"], np.array(timed.seconds)), truth, predictions
