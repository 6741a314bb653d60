"""A report on a stored ensemble and a file: tables in Markdown, every number in JSON, and four figures.

report.md  scores.json  targets.png  steps.png  learning.png  latency.png
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mambakit.errors import DataError
from mambakit.stream.artefact import SavedEnsemble
from mambakit.stream.contest import METRIC_NAMES, Scorer, target_scores
from mambakit.stream.data import Sequences, read_sequences
from mambakit.stream.generate import Market, attainable_score
from mambakit.stream.predictor import PredictionModel
from mambakit.stream.workflow import Score, score_solution
from mambakit.training.artefacts import write_folder, write_json

_SPANS = 30  # at most so many points along the sequence


def write_report(
    saved: SavedEnsemble, data: str | Path, out: str | Path, on_row: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Score an ensemble on a file tick by tick, write the folder `out`, and return what its scores.json holds.

    Raises DataError for a file that can't be used or does not fit the ensemble, FileExistsError where `out` is there.
    """
    ensemble = saved.ensemble
    scorer = Scorer(data, ensemble.config.targets, ensemble.config.metric)
    sequences = read_sequences(scorer.table, ensemble.config.targets)
    ensemble.require_fit(sequences.layout)
    score, _, _ = score_solution(PredictionModel(ensemble), scorer, on_row)
    predictions = {"ensemble": ensemble.predict(sequences.states), "ridge": ensemble.ridge.predict(sequences.states)}
    if (noted := attainable_score(data)) is not None:
        predictions["attainable"] = _best_predictions(sequences, noted, str(data))
    centres, along = _along_the_sequence(sequences, predictions, ensemble.config.metric)
    found = _as_json(saved, sequences, score, predictions, str(data))
    found["steps"] = {"centres": centres.tolist(), **{name: values.tolist() for name, values in along.items()}}

    def fill(folder: Path) -> None:
        from mambakit.stream import figures

        names, metric = ensemble.layout.targets, ensemble.config.metric
        by_target = {name: [found["forecasters"][name][target] for target in names] for name in predictions}
        figures.draw_targets(by_target, names, metric, folder / "targets.png")
        figures.draw_steps(along, centres, metric, folder / "steps.png")
        histories = [record["history"] for record in saved.metrics["training"]]
        figures.draw_learning(histories, folder / "learning.png")
        figures.draw_latency(score.seconds, score.microseconds(), folder / "latency.png")
        write_json(folder / "scores.json", found)
        (folder / "report.md").write_text(_markdown(saved, found), encoding="utf-8")

    write_folder(out, fill)
    return found


def _best_predictions(sequences: Sequences, noted: float, data: str) -> np.ndarray:
    """Those of the market that generated a file; raises DataError where it is not today's market."""
    best = Market(sequences.states.shape[-1]).best_predictions(sequences.states)
    scores = target_scores(sequences.targets[sequences.scored], best[sequences.scored], sequences.layout.targets)
    if abs(scores["mean_r2"] - noted) > 1e-4:
        raise DataError(
            f"{data} notes an attainable score of {noted:.4f}, and today's generator reaches {scores['mean_r2']:.4f}: "
            "it was changed, or made by another version; generate it again"
        )
    return best


def _along_the_sequence(
    sequences: Sequences, predictions: Mapping[str, np.ndarray], metric: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Centres (spans,) of spans of scored steps, and the mean score in each by forecaster."""
    steps = np.flatnonzero(sequences.scored.any(axis=0))
    spans = np.array_split(steps, min(_SPANS, len(steps)))
    names = sequences.layout.targets

    def score(values: np.ndarray, span: np.ndarray) -> float:
        chosen = sequences.scored[:, span]
        truth = sequences.targets[:, span][chosen]
        return target_scores(truth, values[:, span][chosen], names, metric)[f"mean_{metric}"]

    along = {name: np.array([score(values, span) for span in spans]) for name, values in predictions.items()}
    return np.array([span.mean() for span in spans]), along


def _as_json(
    saved: SavedEnsemble, sequences: Sequences, score: Score, predictions: Mapping[str, np.ndarray], data: str
) -> dict[str, Any]:
    truth, metric = sequences.targets[sequences.scored], saved.ensemble.config.metric
    whole = {
        name: target_scores(truth, values[sequences.scored], sequences.layout.targets, metric)
        for name, values in predictions.items()
    }
    return {
        "data": data,
        "sequences": len(sequences),
        "rows": int(sequences.lengths.sum()),
        "scored": int(sequences.scored.sum()),
        "metric": metric,
        "streamed": score.mean,
        "forecasters": {name: _finite(scores) for name, scores in whole.items()},
        "latency_microseconds": score.microseconds(),
        "validation": saved.metrics["validation"],
    }


def _finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in scores.items()}


def _markdown(saved: SavedEnsemble, found: Mapping[str, Any]) -> str:
    config, metric = saved.ensemble.config, found["metric"]
    mean = f"mean_{metric}"
    rows = "\n".join(f"| {name} | {scores[mean]:.4f} |" for name, scores in found["forecasters"].items())
    members = ", ".join(f"{score:.4f}" for score in found["validation"]["models"])
    times = ", ".join(f"{name} {value:.0f} µs" for name, value in found["latency_microseconds"].items())
    synthetic = (
        "\nThis file is synthetic, made by `mambakit stream generate`: its scores say nothing of scores on real data.\n"
        if "attainable" in found["forecasters"]
        else ""
    )
    return f"""# {config.kind}, {saved.metadata["models"]} networks of {saved.metadata["parameters"]:,} parameters

Scored tick by tick on `{found["data"]}`: {found["sequences"]} sequences, {found["rows"]:,} rows, of which
{found["scored"]:,} ask for a prediction. Trained on `{saved.metadata["data"]}`, {saved.metadata["training_date"]}.
{synthetic}
| forecaster | mean {METRIC_NAMES[metric]} |
|---|---|
{rows}

On the validation part of the training file: ensemble {found["validation"]["ensemble"]:.4f}, each network {members},
ridge {found["validation"]["ridge"]:.4f}. If the file above is the training file, only these numbers are honest.

Time of a tick, features included: {times}.

![score of each target](targets.png)
![score along the sequence](steps.png)
![learning curves](learning.png)
![latency](latency.png)
"""
