"""The scorer does what the contest's does, and says what is wrong with a solution."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score

from mambakit.errors import DataError
from mambakit.stream.contest import DataPoint, Scorer, target_scores, weighted_pearson


class Repeat:
    """Predicts the current state, and keeps what it was called with."""

    def __init__(self):
        self.points = []

    def predict(self, data_point):
        self.points.append(data_point)
        return data_point.state if data_point.need_prediction else None


class Answer:
    """Answers what it is told to, whatever the row."""

    def __init__(self, answer):
        self.answer = answer

    def predict(self, data_point):
        return self.answer(data_point)


def with_targets(table):
    return table.assign(t0=table["0"] * 2.0, t1=np.arange(len(table)) % 7 - 3.0)


def test_repeating_the_state_scores_as_r2_of_the_next_row(table):
    asked = table["need_prediction"].to_numpy()
    columns = [str(column) for column in range(8)]
    states = table[columns].to_numpy(np.float64)
    truth, repeated = states[np.roll(asked, 1)], states[asked]
    scores = Scorer(table).score(Repeat())
    assert [scores[name] for name in columns] == pytest.approx(r2_score(truth, repeated, multioutput="raw_values"))
    assert scores["mean_r2"] == pytest.approx(np.mean([scores[name] for name in columns]))


def test_rows_come_as_the_contest_hands_them_out(table):
    solution = Repeat()
    Scorer(table).score(solution)
    rows = table.values  # what the contest iterates
    assert len(solution.points) == len(rows)
    for point, row in zip(solution.points, rows, strict=True):
        assert isinstance(point, DataPoint)
        assert (point.seq_ix, point.step_in_seq, point.need_prediction) == tuple(row[:3])
        assert point.state.dtype == object
        assert (point.state == row[3:]).all()


def test_a_file_scores_as_its_table(table, tmp_path):
    table.to_parquet(tmp_path / "data.parquet")
    assert Scorer(tmp_path / "data.parquet").score(Repeat()) == Scorer(table).score(Repeat())


def test_target_columns_are_compared_on_the_row_itself(table):
    labelled = with_targets(table)
    scorer = Scorer(labelled, targets=("t0", "t1"))

    def perfect(point):
        assert point.state.shape == (8,), "targets are no part of the state"
        row = labelled[(labelled.seq_ix == point.seq_ix) & (labelled.step_in_seq == point.step_in_seq)]
        return row[["t0", "t1"]].to_numpy()[0] if point.need_prediction else None

    assert scorer.score(Answer(perfect)) == {"mean_r2": 1.0, "t0": 1.0, "t1": 1.0}


def test_weighted_pearson_is_numpys_weighted_correlation():
    random = np.random.default_rng(0)
    truth, predictions = random.standard_normal((50, 2)), random.standard_normal((50, 2))
    for column, found in enumerate(weighted_pearson(truth, predictions)):
        covariance = np.cov(truth[:, column], predictions[:, column], aweights=np.abs(truth[:, column]))
        assert found == pytest.approx(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def test_weighted_pearson_clips_predictions_at_six():
    random = np.random.default_rng(0)
    truth, predictions = random.standard_normal((50, 1)), random.standard_normal((50, 1))
    wild = predictions.copy()
    wild[3], wild[4] = 1e6, -1e6
    tame = predictions.copy()
    tame[3], tame[4] = 6, -6
    assert weighted_pearson(truth, wild) == pytest.approx(weighted_pearson(truth, tame))


def test_a_constant_prediction_has_no_correlation():
    assert weighted_pearson(np.arange(5.0)[:, None], np.ones((5, 1))).tolist() == [0.0]


def test_the_metric_is_in_the_name_of_the_mean():
    truth = np.arange(6.0)[:, None]
    assert target_scores(truth, truth, ["a"], "pearson") == {
        "mean_pearson": pytest.approx(1.0),
        "a": pytest.approx(1.0),
    }


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda point: None, "step 100: the row asks for a prediction and the solution returned None"),
        (lambda point: np.zeros(8), "step 0: the row asks for no prediction and the solution returned one"),
        (lambda point: np.zeros(7) if point.need_prediction else None, r"expected a prediction of shape \(8,\), got"),
        (lambda point: np.full(8, np.nan) if point.need_prediction else None, "not finite"),
    ],
)
def test_a_solution_that_breaks_the_rules_is_told_so(table, answer, words):
    with pytest.raises(DataError, match=words):
        Scorer(table).score(Answer(answer))


def test_a_solution_may_hand_out_the_same_buffer_each_time(table):
    buffer = np.zeros(8)

    def reuse(point):
        buffer[:] = point.state
        return buffer if point.need_prediction else None

    assert Scorer(table).score(Answer(reuse)) == Scorer(table).score(Repeat())


def test_a_table_that_asks_for_nothing_is_refused(table):
    with pytest.raises(DataError, match="asks for no prediction"):
        Scorer(table.assign(need_prediction=False)).score(Repeat())


def test_an_unknown_metric_is_refused(table):
    with pytest.raises(DataError, match="metric must be"):
        Scorer(table, metric="mse")


def test_every_row_is_reported(table):
    seen = []
    Scorer(table).score(Repeat(), on_row=lambda: seen.append(1))
    assert len(seen) == len(table)


def test_integers_in_the_states_are_numbers_too(table):
    whole = table.copy()
    whole["0"] = np.arange(len(whole), dtype=np.int64)
    assert isinstance(Scorer(pd.DataFrame(whole)).score(Repeat())["0"], float)
