"""Tick by tick and whole sequences give one prediction; rows that can't be right are refused before anything moves."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.stream.networks import EVERYTHING, KINDS, random_ensemble

from mambakit.errors import DataError
from mambakit.ops import cpu
from mambakit.stream import PredictionModel, Scorer
from mambakit.stream.contest import DataPoint

STATE = np.random.default_rng(0).standard_normal(8)


def point(step=0, seq_ix=0, state=STATE, need_prediction=True):
    return DataPoint(seq_ix, step, need_prediction, state)


def run(model, states, seq_ix=0):
    return np.stack([model.predict(point(step, seq_ix, state)) for step, state in enumerate(states)])


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["raw", "everything"])
@pytest.mark.parametrize("kind", KINDS)
def test_stepped_and_whole_predictions_agree(table, sequences, kind, settings):
    ensemble = random_ensemble(sequences, kind=kind, **settings)
    _, stepped = Scorer(table).collect(PredictionModel(ensemble))
    whole = ensemble.predict(sequences.states)[sequences.scored]
    assert np.abs(whole).max() > 0.5, "large enough for the bound to mean something"
    np.testing.assert_allclose(stepped, whole, atol=1e-5 * max(1.0, np.abs(whole).max()))


@pytest.mark.skipif(not cpu.AVAILABLE, reason="the extension is not built")
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba3"])
def test_one_native_call_takes_the_tick(sequences, kind):
    assert PredictionModel(random_ensemble(sequences, kind=kind)).stepper.backend == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_seq_ix_forgets_everything(sequences, kind):
    ensemble = random_ensemble(sequences, kind=kind, **EVERYTHING)
    used = PredictionModel(ensemble)
    run(used, sequences.states[0], seq_ix=3)
    again = run(used, sequences.states[1], seq_ix=1)
    np.testing.assert_array_equal(again, run(PredictionModel(ensemble), sequences.states[1], seq_ix=9))


def test_rows_that_ask_for_nothing_return_none_and_move_the_state(sequences):
    ensemble = random_ensemble(sequences)
    asked = run(PredictionModel(ensemble), sequences.states[0])
    model = PredictionModel(ensemble)
    for step, state in enumerate(sequences.states[0, :-1]):
        assert model.predict(point(step, state=state, need_prediction=False)) is None
    last = model.predict(point(119, state=sequences.states[0, -1]))
    np.testing.assert_array_equal(last, asked[-1])


def test_bfloat16_weights_agree_to_a_hundredth(sequences):
    ensemble = random_ensemble(sequences)
    exact = run(PredictionModel(ensemble), sequences.states[0])
    half = run(PredictionModel(ensemble, precision="bfloat16"), sequences.states[0])
    error = np.linalg.norm(half - exact) / np.linalg.norm(exact)
    assert 0 < error < 1e-2
    assert ensemble.models[0].embed.weight.dtype == torch.float32, "a copy was converted"


def test_an_array_of_objects_is_a_state(sequences):
    ensemble = random_ensemble(sequences)
    expected = PredictionModel(ensemble).predict(point(state=STATE))
    found = PredictionModel(ensemble).predict(point(state=STATE.astype(object)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (point(step=2), "step 2 came where step 1 was expected"),
        (point(step=0), "step 0 came where step 1 was expected"),
        (point(step=5, seq_ix=1), "sequence 1: step 5 came where step 0 was expected"),
        (point(step=1, state=STATE[:7]), r"expected a state of shape \(8,\), got \(7,\)"),
        (point(step=1, state=STATE[None]), r"got \(1, 8\)"),
        (point(step=1, state=np.where(np.arange(8) == 3, np.nan, STATE)), "NaN or infinite"),
        (point(step=1, state=np.where(np.arange(8) == 3, np.inf, STATE)), "NaN or infinite"),
        (point(step=1, state=np.where(np.arange(8) == 3, 1e300, STATE)), "NaN or infinite"),
        (point(step=1, state=np.array([None] * 8)), "must hold numbers|NaN or infinite"),
        (point(step=1, state=np.array(["high"] * 8, dtype=object)), "must hold numbers"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_and_changes_nothing(sequences, bad, words):
    ensemble = random_ensemble(sequences, **EVERYTHING)
    model, untouched = PredictionModel(ensemble), PredictionModel(ensemble)
    for each in (model, untouched):
        each.predict(point())
    with pytest.raises(DataError, match=words):
        model.predict(bad)
    np.testing.assert_array_equal(model.predict(point(step=1)), untouched.predict(point(step=1)))


def test_an_unknown_precision_is_refused(sequences):
    with pytest.raises(DataError, match="precision must be"):
        PredictionModel(random_ensemble(sequences), precision="int8")


_MEMORY = """
import resource, sys
import numpy as np
sys.path[:0] = sys.argv[1:]
from tests.stream.networks import EVERYTHING, random_ensemble
from mambakit.stream import PredictionModel, generate, read_sequences
from mambakit.stream.contest import DataPoint
model = PredictionModel(random_ensemble(read_sequences(generate.generate(2, 120, 8)), **EVERYTHING))
states = np.random.default_rng(0).standard_normal((1000, 8))
def ticks(count):
    for tick in range(count):
        model.predict(DataPoint(tick // 1000, tick % 1000, True, states[tick % 1000]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = ticks(3_000)
print(ticks(20_000) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is in kilobytes on Linux alone")
def test_memory_is_flat_over_tens_of_thousands_of_ticks(request):
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(request.path.parent)], capture_output=True, text=True, check=True
    )
    # One state kept for each tick would be 1,300 kilobytes more, and an array around it twice that.
    assert int(done.stdout) < 500
