"""The synthetic market: reproducible, of the promised difficulty, and its best prediction is the best."""

import itertools

import numpy as np
import pandas as pd
import pytest

from mambakit.errors import DataError
from mambakit.stream import generate as module
from mambakit.stream.contest import Scorer, target_scores
from mambakit.stream.data import read_sequences
from mambakit.stream.generate import Market, attainable_score, generate, reference_scores, write_generated
from mambakit.stream.ridge import fit_ridge


@pytest.fixture(scope="module")
def market():
    """Forty sequences at the contest's width and length."""
    table = generate(40, 1000)
    return table, read_sequences(table)


def test_the_same_seed_gives_the_same_table_and_another_seed_another(table):
    assert generate(6, 120, 8).equals(table)
    assert not generate(6, 120, 8, seed=1).equals(table)


def test_the_table_is_of_the_contests_form(market):
    table, sequences = market
    assert list(table.columns[:4]) == ["seq_ix", "step_in_seq", "need_prediction", "0"]
    assert table.shape == (40_000, 35)
    steps = np.arange(1000)
    assert (sequences.scored == ((steps >= 100) & (steps < 999))).all()
    assert sorted(sequences.seq_ix) == list(range(40))
    assert sequences.seq_ix.tolist() != list(range(40)), "shuffled"


def test_states_are_whitened(market):
    states = market[1].states.reshape(-1, 32)
    covariance = np.cov(states.T)
    assert np.abs(covariance - np.eye(32)).max() < 0.1
    assert np.abs(states.mean(axis=0)).max() < 0.1


def test_scores_are_those_of_the_contest(market):
    """Repeating about -0.4, ridge about 0.33, the optimum 0.40 to 0.42."""
    table, sequences = market
    scores = reference_scores(table)
    ridge = fit_ridge(sequences, lags=3).predict(sequences.states)[sequences.scored]
    names = sequences.layout.targets
    assert scores["repeat"] == pytest.approx(-0.39, abs=0.02)
    assert target_scores(sequences.targets[sequences.scored], ridge, names)["mean_r2"] == pytest.approx(0.34, abs=0.015)
    assert 0.40 < scores["attainable"] < 0.42


def test_the_attainable_score_is_what_the_contests_scorer_gives_the_best_prediction(table):
    sequences = read_sequences(table)
    best = dict(zip(sequences.seq_ix, Market(8).best_predictions(sequences.states), strict=True))

    class Oracle:
        def predict(self, point):
            return best[point.seq_ix][point.step_in_seq] if point.need_prediction else None

    assert Scorer(table).score(Oracle())["mean_r2"] == pytest.approx(reference_scores(table)["attainable"])


def test_the_filter_is_bayes_rule_over_every_path_of_moods():
    """The posterior mean, summed over all 2^6 paths of the mood with their probabilities."""
    block = Market(16).blocks[0]
    z = np.random.default_rng(0).standard_normal((1, 7, 4))
    stay, noise = module._STAY, module._NOISE
    total, weights = np.zeros(4), 0.0
    for path in itertools.product((-1.0, 1.0), repeat=7):
        switches = sum(first != second for first, second in itertools.pairwise(path))
        log_weight = switches * np.log(1 - stay) + (6 - switches) * np.log(stay)
        for step, mood in enumerate(path[:-1]):
            mean = block.A @ z[0, step] + mood * (block.D @ z[0, step] + block.c)
            log_weight -= ((z[0, step + 1] - mean) ** 2).sum() / (2 * noise)
        weight = np.exp(log_weight)
        total += weight * (block.A @ z[0, -1] + path[-1] * (block.D @ z[0, -1] + block.c))
        weights += weight
    assert module._filtered(block, z)[0, -1] == pytest.approx(total / weights)


def test_the_best_prediction_uses_the_past_alone(table):
    states = read_sequences(table).states
    market = Market(8)
    later = states.copy()
    later[:, 60:] += 1.0
    assert np.array_equal(market.best_predictions(states)[:, :60], market.best_predictions(later)[:, :60])


def test_a_file_says_that_it_is_synthetic_and_what_is_attainable(table, tmp_path):
    path = tmp_path / "synthetic.parquet"
    write_generated(path, table, {"attainable": 0.41, "repeat": -0.4})
    assert attainable_score(path) == 0.41
    assert pd.read_parquet(path).equals(table)
    table.to_parquet(tmp_path / "other.parquet")
    assert attainable_score(tmp_path / "other.parquet") is None


def test_the_same_table_gives_the_same_bytes(table, tmp_path):
    for name in ("one", "two"):
        write_generated(tmp_path / name, table, {"attainable": 0.41})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": 12}, "multiple of 8, got 12"),
        ({"steps": 101}, "steps must be at least 102"),
        ({"sequences": 0}, "sequences must be at least 1"),
    ],
)
def test_sizes_that_make_no_market_are_refused(settings, words):
    with pytest.raises(DataError, match=words):
        generate(**{"sequences": 1, "steps": 110, "features": 8, **settings})
