"""The other tasks: each answer is what a plain reading of the sequence gives."""

import pytest
import torch

from mambakit.errors import DataError
from mambakit.lab.tasks import (
    IGNORED,
    TASKS,
    AssociativeRecall,
    Batch,
    InductionHeads,
    InverseMatching,
    ModularArithmetic,
    Parity,
    SelectiveCopying,
    Task,
    accuracy,
)

SAMPLES = 300


def drawn(task: Task, split: str = "train", size: int = SAMPLES, length: int | None = None) -> Batch:
    return task.batch(split, size, length or task.length_at(0, split), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TASKS)
def test_tokens_and_answers_lie_in_the_vocabulary(name: str) -> None:
    task: Task = TASKS[name]()
    for split in task.splits:
        batch = drawn(task, split, 20)
        answers = batch.targets[batch.targets != IGNORED]
        assert batch.tokens.min() >= 0
        assert batch.tokens.max() < task.vocabulary
        assert answers.min() >= 0
        assert answers.max() < task.vocabulary
        assert len(answers) > 0


@pytest.mark.parametrize("name", TASKS)
def test_a_split_that_there_is_not_is_refused(name: str) -> None:
    task: Task = TASKS[name]()
    with pytest.raises(DataError, match="split must be one of train"):
        drawn(task, "dev", length=40)


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_inverse_matching_asks_for_the_order_whose_reversal_ends_the_sequence(split: str, layers: int) -> None:
    batch = drawn(InverseMatching(layers=layers), split)
    assert batch.tokens.shape[1] == 5 * 4 + 3 * layers + 3
    for tokens, (answer,) in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        orders = [tuple(tokens[start : start + 3]) for start in range(0, 20, 4)]
        three = set(orders[0])
        assert len(set(orders)) == 5
        assert all(set(order) == three for order in orders)
        assert orders[answer - 1] == tuple(reversed(tokens[-3:]))
        assert not three & set(tokens[3:20:4])


def test_inverse_matching_keeps_its_splits_apart() -> None:
    for split, one_class, low, high in (("train", False, 20, 100), ("test", True, 20, 100), ("ood", False, 101, 200)):
        three = drawn(InverseMatching(), split).tokens[:, :3]
        assert ((three % 3 == three[:, :1] % 3).all(1) == one_class).all()
        assert three.min() == low
        assert three.max() == high


def test_selective_copying_asks_for_the_data_in_its_order() -> None:
    task = SelectiveCopying(length=60, data_tokens=5)
    batch = drawn(task)
    for tokens, answers in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert [token for token in tokens[:60] if token != 0] == answers
        assert tokens[60:] == [15] * 5


def test_selective_copying_scatters_its_data() -> None:
    task = SelectiveCopying(length=60, data_tokens=5)
    assert (drawn(task).tokens[:, :60] != 0).any(0).all()


@pytest.mark.parametrize("length", [64, 256])
def test_induction_asks_for_what_followed_the_special_token(length: int) -> None:
    batch = drawn(InductionHeads(), length=length)
    for tokens, (answer,) in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert tokens.count(15) == 2
        assert tokens[-1] == 15
        assert tokens[tokens.index(15) + 1] == answer


def test_induction_is_judged_at_powers_of_two() -> None:
    assert InductionHeads(longest=1 << 20).lengths == tuple(2**power for power in range(6, 21))


def test_recall_asks_once_for_the_value_of_every_key() -> None:
    task = AssociativeRecall(length=64, pairs=4)
    batch = drawn(task)
    for tokens, answers in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        values = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        asked = {tokens[8 + place]: answer for place, answer in enumerate(answers) if answer != IGNORED}
        assert asked == values
        assert max(values) < 4096 <= min(values.values())


def test_recall_asks_sooner_rather_than_later_unless_the_law_is_uniform() -> None:
    def mean_gap(power: float) -> float:
        targets = drawn(AssociativeRecall(length=256, pairs=4, power=power)).targets
        return float((targets != IGNORED).nonzero()[:, 1].float().mean())

    assert mean_gap(0.01) < 0.6 * mean_gap(1.0)


def test_parity_is_the_sum_of_bits() -> None:
    batch = drawn(Parity(), length=17)
    assert torch.equal(batch.targets[:, 0], batch.tokens.sum(1) % 2)
    every = drawn(Parity(supervise="every"), length=17)
    assert torch.equal(every.targets, every.tokens.cumsum(1) % 2)


def test_the_curriculum_lengthens_training_and_leaves_evaluation() -> None:
    task = Parity(shortest=3, longest=40, stages=2, stage_steps=100)
    first = {task.length_at(step, "train") for step in range(100)}
    last = {task.length_at(step, "train") for step in range(100, 1000)}
    assert min(first | last) >= 3
    assert max(first) == 21
    assert max(last) == 40
    assert (task.length_at(0, "test"), task.length_at(0, "ood")) == (40, 160)


def expressions(batch: Batch, modulus: int) -> list[tuple[str, int]]:
    signs = [*map(str, range(modulus)), *"+-*()="]
    texts = ["".join(signs[token] for token in tokens) for tokens in batch.tokens.tolist()]
    return list(zip(texts, batch.targets[:, 0].tolist(), strict=True))


@pytest.mark.parametrize(("brackets", "length"), [(False, 3), (False, 14), (True, 3), (True, 6), (True, 23)])
def test_arithmetic_gives_what_python_does(brackets: bool, length: int) -> None:
    for text, answer in expressions(drawn(ModularArithmetic(brackets=brackets), length=length), 5):
        assert text.endswith("=")
        assert eval(text[:-1]) % 5 == answer


def test_arithmetic_without_precedence_goes_from_left_to_right() -> None:
    for text, answer in expressions(drawn(ModularArithmetic(modulus=3, precedence=False), length=9), 3):
        value = int(text[0])
        for sign, number in zip(text[1:-1:2], text[2:-1:2], strict=True):
            value = eval(f"{value}{sign}{number}")
        assert value % 3 == answer


def test_accuracies_count_tokens_and_whole_sequences() -> None:
    targets = torch.tensor([[1, IGNORED, 2], [0, 1, 2]])
    answers = torch.tensor([[1, 0, 2], [0, 2, 2]])
    found = accuracy(torch.nn.functional.one_hot(answers, 3).float(), targets)
    assert found.token == pytest.approx(4 / 5)
    assert found.sequence == pytest.approx(1 / 2)
