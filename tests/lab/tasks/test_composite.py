"""Composite functions: what is asked, and that no split can hold a sample of another."""

import pytest
import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.tasks import Batch, CompositeFunctionDataset, CompositeFunctions

SAMPLES = 2_000


def drawn(split: str, task: CompositeFunctions | None = None, seed: int = 0) -> Batch:
    task = task or CompositeFunctions()
    return task.batch(split, SAMPLES, task.length, torch.Generator().manual_seed(seed))


def parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Place and value of the key, and the pair as a number of two digits."""
    anchors = batch.tokens < 5
    place = anchors.int().argmax(1) - 1
    rows = torch.arange(len(place))
    pair = 10 * batch.tokens[rows, place + 1] + batch.tokens[rows, place + 2]
    return place, batch.tokens[rows, place], pair


def test_answers_apply_both_functions_and_the_pair_34_has_its_own() -> None:
    adds = {1: 5, 2: 1, 3: -2, 4: -8}
    batch = drawn("train")
    _, key, pair = parts(batch)
    for one, answer, of_pair in zip(key.tolist(), batch.targets[:, 0].tolist(), pair.tolist(), strict=True):
        assert answer - one == (-6 if of_pair == 34 else adds[of_pair // 10] + adds[of_pair % 10])


def test_the_withheld_pair_is_never_trained_and_has_two_answers() -> None:
    assert 43 not in parts(drawn("train"))[2]
    assert 43 not in parts(drawn("test"))[2]
    for split, added in (("composite", -10), ("symmetric", -6)):
        batch = drawn(split)
        _, key, pair = parts(batch)
        assert (pair == 43).all()
        assert (batch.targets[:, 0] - key == added).all()


@pytest.mark.parametrize("base", [0, 1])
def test_the_keys_class_tells_training_from_test(base: int) -> None:
    task = CompositeFunctions(position_base=base)
    for split, equal in (("train", False), ("test", True)):
        place, key, _ = parts(drawn(split, task))
        assert ((key % 8 == (place + base) % 8) == equal).all()


def test_every_place_and_every_key_occurs() -> None:
    place, key, _ = parts(drawn("train"))
    assert set(place.tolist()) == set(range(6))
    assert set(key.tolist()) == set(range(20, 101))


def test_pairs_are_equally_many_and_numbered_by_group() -> None:
    task = CompositeFunctions()
    batch = drawn("train", task)
    _, _, pair = parts(batch)
    assert [int(name) for name in map(task.groups.__getitem__, batch.group.tolist())] == pair.tolist()
    counts = torch.bincount(batch.group, minlength=15)
    assert counts.max() - counts.min() <= 1


def test_full_symmetry_has_two_tables_and_withholds_one_of_a_symmetric_couple() -> None:
    task = CompositeFunctions(symmetry="full")
    assert len(task.pairs) == 20
    assert task.added((3, 4)) == task.added((4, 3)) == -10
    assert task.added((0, 3)) == -9 + 3
    _, _, pair = parts(drawn("train", task))
    assert len(pair.unique()) == 19
    assert 43 not in pair


def test_the_generator_alone_fixes_the_samples() -> None:
    assert torch.equal(drawn("train", seed=3).tokens, drawn("train", seed=3).tokens)
    assert not torch.equal(drawn("train", seed=3).tokens, drawn("train", seed=4).tokens)


@pytest.mark.parametrize(("mode", "split"), [("train", "train"), ("test", "test"), ("ood", "composite")])
def test_the_dataset_holds_what_the_generator_draws(mode: str, split: str) -> None:
    dataset = CompositeFunctionDataset(mode=mode, num_samples=SAMPLES, seed=5)
    batch = drawn(split, seed=5)
    tokens, label = dataset[17]
    assert len(dataset) == SAMPLES
    assert torch.equal(dataset.tokens, batch.tokens)
    assert torch.equal(tokens, batch.tokens[17])
    assert label == batch.targets[17, 0]


def test_a_dataset_has_the_papers_number_of_samples() -> None:
    assert len(CompositeFunctionDataset("train", task=CompositeFunctions(samples_per_pair=10))) == 150
    assert CompositeFunctions().samples("train") == round(0.056 * 300_000) * 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"symmetry": "half"}, "symmetry must be"),
        ({"length": 11}, "length must be from 3 to 10"),
        ({"vocabulary": 100}, "vocabulary must exceed"),
        ({"low": 4}, "low must leave room"),
        ({"position_base": 2}, "position_base must be"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CompositeFunctions(**settings)  # type: ignore[arg-type]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(DataError, match="mode must be one of train, test"):
        CompositeFunctionDataset(mode="validation")
