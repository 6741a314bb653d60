"""The order of samples, the shares of processes, and means over samples."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from mambakit.training.batches import SampleMeans, derived_seed, epoch_order, process_share


def test_an_epoch_takes_every_sample_once():
    assert sorted(epoch_order(100, seed=3, epoch=7).tolist()) == list(range(100))


def test_the_order_follows_from_seed_and_epoch_alone():
    first = epoch_order(100, seed=3, epoch=7)
    torch.manual_seed(12345)
    assert torch.equal(epoch_order(100, seed=3, epoch=7), first)


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [epoch_order(100, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_seeds_derived_from_exchanged_numbers_differ():
    assert derived_seed(1, 0) != derived_seed(0, 1)


@given(samples=st.integers(1, 20), processes=st.integers(1, 8))
def test_the_shares_of_the_processes_count_every_sample_once(samples, processes):
    shares = [process_share(torch.arange(samples), processes, rank) for rank in range(processes)]
    counted = [index for share, count in shares for index in share[:count].tolist()]
    assert counted == list(range(samples))
    assert all(len(share) > 0 for share, _ in shares)


@pytest.mark.parametrize("batches", [1, 256, 300])  # fewer than wait on the device, as many, and more
def test_means_weigh_each_sample_equally(batches):
    means = SampleMeans()
    for batch in range(batches):
        means.add(torch.tensor(1.0), {"metric": torch.tensor(float(batch))}, samples=3)
    means.add(torch.tensor(5.0), {"metric": torch.tensor(0.0)}, samples=1)
    samples = 3 * batches + 1
    expected = {"loss": (3 * batches + 5) / samples, "metric": 3 * sum(range(batches)) / samples}
    assert means.over_all_processes(Accelerator()) == pytest.approx(expected)


def test_metrics_that_change_from_batch_to_batch_are_refused():
    means = SampleMeans()
    means.add(torch.tensor(1.0), {"error": torch.tensor(1.0)}, samples=1)
    with pytest.raises(ValueError, match="same metrics for each batch"):
        means.add(torch.tensor(1.0), {}, samples=1)
