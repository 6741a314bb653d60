"""What the contest puts beside a submission: its row, and its scorer, written from its rules, not from the package."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import r2_score


@dataclass
class DataPoint:
    seq_ix: int
    step_in_seq: int
    need_prediction: bool
    state: np.ndarray


class ScorerStepByStep:
    """Edition 1: the prediction returned at a row is compared with the state of the next."""

    def __init__(self, dataset_path):
        self.dataset = pd.read_parquet(dataset_path)
        self.dim = self.dataset.shape[1] - 3

    def score(self, model):
        predictions, targets = [], []
        next_prediction = None
        for row in self.dataset.values:
            state = row[3:]
            if next_prediction is not None:
                predictions.append(next_prediction)
                targets.append(state)
            data_point = DataPoint(row[0], row[1], row[2], state)
            next_prediction = model.predict(data_point)
            if data_point.need_prediction:
                if next_prediction is None:
                    raise ValueError("prediction is missing")
                if next_prediction.shape != (self.dim,):
                    raise ValueError(f"prediction has shape {next_prediction.shape}")
            elif next_prediction is not None:
                raise ValueError("prediction was not asked for")
        predictions, targets = np.array(predictions), np.array(targets, dtype=float)
        scores = [r2_score(targets[:, column], predictions[:, column]) for column in range(self.dim)]
        return float(np.mean(scores)), predictions
