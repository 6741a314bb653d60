"""Tables become arrays, or are refused in one line that names the row."""

import numpy as np
import pandas as pd
import pytest

from mambakit.errors import DataError
from mambakit.stream.data import check_table, read_sequences, split_sequences


def changed(table, row, column, value):
    copy = table.copy()
    copy[column] = copy[column].astype(object) if isinstance(value, str) else copy[column]
    copy.iloc[row, copy.columns.get_loc(column)] = value
    return copy


def test_states_and_next_states_are_where_they_belong(table, sequences):
    assert sequences.states.shape == (6, 120, 8)
    for position, seq_ix in enumerate(sequences.seq_ix):
        rows = table[table.seq_ix == seq_ix].drop(columns=["seq_ix", "step_in_seq", "need_prediction"]).to_numpy()
        assert np.array_equal(sequences.states[position], rows)
        assert np.array_equal(sequences.targets[position, :-1], rows[1:])
    assert np.array_equal(sequences.scored[0], (np.arange(120) >= 100) & (np.arange(120) < 119))


def test_names_and_number_of_the_features_come_from_the_table(table):
    renamed = table.rename(columns={"0": "p0", "7": "dv3"})
    assert read_sequences(renamed).layout.features == ("p0", "1", "2", "3", "4", "5", "6", "dv3")
    assert read_sequences(table.drop(columns=["7"])).states.shape[-1] == 7


def test_shorter_sequences_are_padded_and_the_padding_is_not_scored(table):
    first = table.seq_ix.iloc[0]
    short = table[(table.seq_ix != first) | (table.step_in_seq < 110)].copy()
    short.loc[(short.seq_ix == first) & (short.step_in_seq == 109), "need_prediction"] = False
    found = read_sequences(short)
    assert found.lengths.tolist() == [110, 120, 120, 120, 120, 120]
    assert not found.scored[0, 109:].any()
    assert found.scored[0].sum() == 9
    assert np.array_equal(found.states[0, 110:], np.zeros((10, 8)))


def test_target_columns_are_targets_and_no_features(table):
    labelled = table.assign(t0=np.arange(len(table)), t1=1.5)
    found = read_sequences(labelled, ("t0", "t1"))
    assert found.layout.features == tuple(map(str, range(8)))
    assert found.targets.shape == (6, 120, 2)
    assert found.targets[0, 3].tolist() == [3.0, 1.5]


def test_a_row_that_asks_for_its_own_target_may_be_the_last(table):
    labelled = table.assign(t0=1.0, need_prediction=True)
    assert read_sequences(labelled, ("t0",)).scored.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_state_that_is_not_finite_in_float32_is_refused_and_found(table, bad):
    wide = table.astype({"3": np.float64})
    with pytest.raises(DataError, match=r"column '3' is .* in row 130 \(sequence \d+, step 10\)"):
        check_table(changed(wide, 130, "3", bad))


def test_a_row_that_is_missing_is_found(table):
    with pytest.raises(DataError, match="has step 8 in row 7 where step 7 is expected"):
        check_table(table.drop(index=7))


def test_rows_out_of_order_are_refused(table):
    order = np.arange(len(table))
    order[[20, 21]] = [21, 20]
    with pytest.raises(DataError, match="has step 21 in row 20 where step 20 is expected"):
        check_table(table.iloc[order])


def test_a_sequence_in_two_pieces_is_refused(table):
    pieces = pd.concat([table.iloc[:60], table.iloc[120:], table.iloc[60:120]])
    with pytest.raises(DataError, match="are not one run"):
        check_table(pieces)


def test_a_sequence_cut_off_where_a_prediction_is_asked_for_is_refused(table):
    with pytest.raises(DataError, match="ends at step 109 with a row that asks for a prediction"):
        check_table(table.iloc[:110])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.iloc[:0], "has no rows"),
        (lambda table: table.iloc[:, :3], "has no feature"),
        (lambda table: table.rename(columns={"seq_ix": "sequence"}), "first columns must be seq_ix, step_in_seq"),
        (lambda table: table.assign(**{"3": "high"}), "column '3' must hold numbers"),
        (lambda table: changed(table.astype({"step_in_seq": float}), 5, "step_in_seq", 5.5), "must hold whole numbers"),
        (lambda table: table.assign(need_prediction=2), "need_prediction must hold True or False, got .* in row 0"),
        (lambda table: table.rename(columns={"1": "0"}), "two columns of the same name"),
    ],
)
def test_a_table_of_another_form_is_refused(table, change, words):
    with pytest.raises(DataError, match=words):
        check_table(change(table))


def test_a_target_that_is_not_there_is_refused(table):
    with pytest.raises(DataError, match="has no column 't0' to predict; it has 0, 1, 2"):
        check_table(table, ("t0",))


@pytest.mark.parametrize("content", [None, b"", b"not parquet"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path, content):
    path = tmp_path / "data.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.parquet.*parquet file"):
        read_sequences(path)


def test_the_split_keeps_sequences_whole_and_depends_on_the_seed(sequences):
    learnt, held_out = split_sequences(sequences, 0.34, seed=0)
    assert (len(learnt), len(held_out)) == (4, 2)
    assert sorted([*learnt.seq_ix, *held_out.seq_ix]) == sorted(sequences.seq_ix)
    again = split_sequences(sequences, 0.34, seed=0)[1].seq_ix
    assert again.tolist() == held_out.seq_ix.tolist()
    others = {tuple(split_sequences(sequences, 0.34, seed=seed)[1].seq_ix) for seed in range(10)}
    assert len(others) > 1


def test_one_sequence_cannot_be_split(sequences):
    with pytest.raises(DataError, match="too few"):
        split_sequences(sequences.take(np.array([0])), 0.2, 0)
