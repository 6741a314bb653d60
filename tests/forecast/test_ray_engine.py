"""The Ray engine on a cluster of two nodes, one of which is lost while it trains."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mambakit.errors import DataError, MambakitError
from mambakit.forecast.config import MambaConfig
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.engines import Failure, HereEngine, Report, Success
from mambakit.forecast.prices import fetch_historical_prices
from mambakit.forecast.ray_engine import RayEngine
from mambakit.forecast.registry import ModelRegistry
from mambakit.forecast.workflow import Outcome, train_all
from mambakit.training import TrainingConfig

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

SYMBOLS = ("AAPL", "IBM", "MSFT", "GOOG")


class Cluster:
    """Two nodes with one core each, of which the second can be lost; the first has none but to drive."""

    def __init__(self) -> None:
        here = str(Path(__file__).parents[2])  # nodes import this file's jobs by name
        os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        self.cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.second = self.cluster.add_node(num_cpus=1)
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error")

    def lose_a_node(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # put back at the end
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    made = Cluster()
    yield made
    ray.shutdown()
    made.cluster.shutdown()


@dataclass(frozen=True)
class Node:
    """Tells the node that it runs on, after a while; fails where its symbol asks for it."""

    symbol: str
    seconds: float
    notes: Path

    def run(self, report: Report | None, quiet: bool) -> str:
        if self.symbol == "BAD":
            raise DataError("no prices")
        node = ray.get_runtime_context().get_node_id()
        with (self.notes / self.symbol).open("a") as file:
            file.write(f"{node}\n")
        time.sleep(self.seconds)
        return node


@pytest.mark.slow
def test_a_lost_node_loses_no_symbol(cluster: Cluster, tmp_path: Path) -> None:
    jobs = [Node(symbol, 6.0, tmp_path) for symbol in ("A", "B", "C")] + [Node("BAD", 0.0, tmp_path)]

    def lose_once_both_work() -> None:
        patience = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < patience:
            time.sleep(0.1)
        cluster.lose_a_node()

    loser = threading.Thread(target=lose_once_both_work)
    loser.start()
    events = {event.symbol: event for event in RayEngine().run(jobs, lambda symbol, entry: None)}
    loser.join()
    assert isinstance(events["BAD"], Failure)
    assert events["BAD"].reason == "no prices"
    assert all(isinstance(events[symbol], Success) for symbol in "ABC")
    starts = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert any(len(nodes) == 2 for nodes in starts.values())  # one was started again, elsewhere
    assert {nodes[-1] for nodes in starts.values()} == {ray.get_runtime_context().get_node_id()}


@pytest.mark.slow
def test_a_cluster_trains_what_this_process_trains(cluster: Cluster, tmp_path: Path) -> None:
    config = MambaConfig(d_model=8, d_state=4, num_layers=1, prediction_horizons=(1, 5))
    training = TrainingConfig(epochs=1, batch_size=2)
    prepared = [prepare_series(each, config) for each in fetch_historical_prices(SYMBOLS[:2], 600).values()]
    stored = {}
    for name, engine in (("here", HereEngine(quiet=True)), ("ray", RayEngine())):
        registry = ModelRegistry(tmp_path / name)
        events = list(train_all(prepared, training, registry, engine))
        assert all(isinstance(event, Success) and isinstance(event.result, Outcome) for event in events), events
        stored[name] = [(registry.find(symbol) / "model.safetensors").read_bytes() for symbol in SYMBOLS[:2]]
    assert stored["here"] == stored["ray"]


def test_no_cluster_at_an_address_is_one_clear_error() -> None:
    with pytest.raises(MambakitError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        list(RayEngine(address="127.0.0.1:1").run([], lambda symbol, entry: None))
