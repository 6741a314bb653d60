"""The linear baseline."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

from mambakit.errors import DataError
from mambakit.stream.ridge import ALPHA, Ridge, fit_ridge


def test_the_fit_is_scikit_learns_on_the_same_lagged_states(sequences):
    X = np.concatenate([sequences.states[:, 2 - back : 120 - back] for back in range(3)], axis=-1)
    chosen = sequences.scored[:, 2:]
    wanted = SklearnRidge(alpha=ALPHA * chosen.sum()).fit(X[chosen], sequences.targets[:, 2:][chosen])
    found = fit_ridge(sequences, lags=3).predict(sequences.states)[:, 2:]
    np.testing.assert_allclose(found[chosen], wanted.predict(X[chosen]), atol=1e-4)


def test_steps_that_are_not_scored_teach_nothing(sequences):
    targets = sequences.targets.copy()
    targets[~sequences.scored] = 1e3
    changed = dataclasses.replace(sequences, targets=targets)
    assert np.array_equal(fit_ridge(changed, 2).weight, fit_ridge(sequences, 2).weight)


def test_before_the_first_state_there_are_zeros(sequences):
    ridge = fit_ridge(sequences, lags=3)
    first = ridge.predict(sequences.states)[:, 0]
    np.testing.assert_allclose(first, sequences.states[:, 0] @ ridge.weight[0] + ridge.bias, atol=1e-6)


def test_what_is_stored_comes_back(sequences):
    ridge = fit_ridge(sequences, lags=2)
    again = Ridge.from_tensors(ridge.tensors())
    assert np.array_equal(again.predict(sequences.states), ridge.predict(sequences.states))


def test_nothing_to_learn_from_is_refused(sequences):
    with pytest.raises(DataError, match="no step is scored"):
        fit_ridge(dataclasses.replace(sequences, scored=np.zeros_like(sequences.scored)), 1)
