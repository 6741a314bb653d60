"""Which version serves: promoted, taken back, challenged, deleted, and never lost between two processes."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.registry import ModelRegistry
from mambakit.training import artefacts
from mambakit.training.artefacts import exclusive, write_json


def write_note(folder: Path, version: str) -> None:
    (folder / "note.txt").write_text(version)


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    """Three versions of AAPL, v3 being production after v1 and v2."""
    registry = ModelRegistry(tmp_path / "models")
    for _ in range(3):
        registry.store("AAPL", write_note)
    return registry


def test_the_challenger_is_promoted_and_stops_being_one(registry: ModelRegistry) -> None:
    registry.challenge("AAPL", "v1")
    assert registry.promote("AAPL") == ("v3", "v1")
    assert registry.aliases("AAPL") == {"production": "v1"}


def test_rolling_back_walks_through_what_was_production_and_stops_at_the_first(registry: ModelRegistry) -> None:
    registry.promote("AAPL", "v1")
    assert [registry.roll_back("AAPL")[1] for _ in range(3)] == ["v3", "v2", "v1"]
    with pytest.raises(ArtefactError, match=r"AAPL has no earlier production .* models promote AAPL VERSION"):
        registry.roll_back("AAPL")
    assert registry.aliases("AAPL") == {"production": "v1"}


def test_promoting_what_is_production_leaves_the_history_alone(registry: ModelRegistry) -> None:
    before = registry.history("AAPL")
    assert registry.promote("AAPL", "v3") == ("v3", "v3")
    assert registry.history("AAPL") == before
    assert [entry["version"] for entry in before] == ["v1", "v2"]


def test_a_damaged_version_is_neither_promoted_nor_rolled_back_to(registry: ModelRegistry) -> None:
    (registry.folder("AAPL") / "v2" / "note.txt").write_text("changed")
    for change in (lambda: registry.promote("AAPL", "v2"), lambda: registry.roll_back("AAPL")):
        with pytest.raises(ArtefactError, match=r"note\.txt"):
            change()
    assert registry.aliases("AAPL") == {"production": "v3"}
    assert registry.history("AAPL")[-1]["version"] == "v2"


def test_production_cannot_challenge_itself(registry: ModelRegistry) -> None:
    with pytest.raises(ArtefactError, match="AAPL v3 is production and can't challenge itself"):
        registry.challenge("AAPL", "v3")


def test_a_challenger_is_withdrawn_and_missed(registry: ModelRegistry) -> None:
    registry.challenge("AAPL", "v2")
    registry.challenge("AAPL", None)
    assert registry.aliases("AAPL") == {"production": "v3"}
    with pytest.raises(ArtefactError, match="no challenger; choose one with: mambakit forecast models challenge AAPL"):
        registry.find("AAPL", "challenger")


def test_an_alias_of_another_name_is_refused(registry: ModelRegistry) -> None:
    with pytest.raises(DataError, match="'history' is not an alias: expected production or challenger"):
        registry.set_alias("AAPL", "history", "v1")
    with pytest.raises(DataError, match="'staging' is not an alias"):
        registry.store("AAPL", write_note, alias="staging")
    assert registry.versions("AAPL") == ["v1", "v2", "v3"]


def test_a_version_can_be_stored_as_the_challenger_or_as_neither(registry: ModelRegistry) -> None:
    registry.store("AAPL", write_note, alias="challenger")
    registry.store("AAPL", write_note, alias=None)
    assert registry.aliases("AAPL") == {"production": "v3", "challenger": "v4"}


def test_the_first_version_is_production_whatever_it_was_stored_as(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    registry.store("IBM", write_note, alias="challenger")
    assert registry.aliases("IBM") == {"production": "v1"}


def test_a_version_in_use_is_not_deleted(registry: ModelRegistry) -> None:
    with pytest.raises(ArtefactError, match="AAPL v3 is production; promote another version first, or say --force"):
        registry.delete("AAPL", "v3")
    assert registry.versions("AAPL") == ["v1", "v2", "v3"]


def test_deleting_production_by_force_goes_back_to_what_was_before(registry: ModelRegistry) -> None:
    assert registry.delete("AAPL", "v2") == "v3"
    assert registry.delete("AAPL", "v3", even_if_used=True) == "v1"
    assert registry.aliases("AAPL") == {"production": "v1"}
    assert [path.name for path in registry.folder("AAPL").iterdir() if path.name.startswith(".")] == []


def test_the_name_of_a_deleted_version_is_never_given_again(registry: ModelRegistry) -> None:
    registry.promote("AAPL", "v1")
    registry.delete("AAPL", "v3")
    assert registry.store("AAPL", write_note) == "v4"
    for version in ("v1", "v2", "v4"):
        registry.delete("AAPL", version, even_if_used=True)
    assert registry.store("AAPL", write_note) == "v5"


def test_versions_are_listed_with_their_state(registry: ModelRegistry) -> None:
    def fill(folder: Path, version: str) -> None:
        write_json(
            folder / "metadata.json",
            {
                "training_date": "2026-01-02T03:04:05+00:00",
                "data_stats": {"last_day": "2013-03-01"},
                "performance_metrics": {"best_val_loss": 0.5},
            },
        )

    registry.store("IBM", fill)
    (registry.folder("AAPL") / "v2" / "note.txt").unlink()
    (registry.root / "not a symbol").mkdir()
    rows = registry.stored()
    assert [(row.symbol, row.version, row.aliases) for row in rows] == [
        ("AAPL", "v1", ()),
        ("AAPL", "v2", ()),
        ("AAPL", "v3", ("production",)),
        ("IBM", "v1", ("production",)),
    ]
    assert rows[0].problem is None
    assert rows[0].trained is None
    assert "note.txt is missing" in str(rows[1].problem)
    assert (rows[3].trained, rows[3].data_until, rows[3].validation_loss) == (
        "2026-01-02T03:04:05+00:00",
        "2013-03-01",
        0.5,
    )


def test_verifying_names_every_damaged_file_and_every_alias_that_leads_nowhere(registry: ModelRegistry) -> None:
    assert registry.verify() == []
    (registry.folder("AAPL") / "v1" / "note.txt").write_text("changed")
    write_json(registry.folder("AAPL") / "aliases.json", {"production": "v3", "challenger": "v9"})
    problems = registry.verify("AAPL")
    assert len(problems) == 2
    assert "note.txt is not what was written" in problems[0]
    assert "challenger is v9, which is not stored" in problems[1]
    with pytest.raises(ArtefactError, match="no model of IBM"):
        registry.verify("IBM")


def _promote_often(root: Path, version: str, times: int) -> None:
    registry = ModelRegistry(root)
    for _ in range(times):
        registry.set_alias("AAPL", "production", version)
        registry.set_alias("AAPL", "production", "v3")


def test_two_processes_that_promote_at_once_lose_nothing(registry: ModelRegistry) -> None:
    times = 20
    before = len(registry.history("AAPL"))
    processes = multiprocessing.get_context("spawn")
    writers = [processes.Process(target=_promote_often, args=(registry.root, each, times)) for each in ("v1", "v2")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    # Every entry left production just before the next came: a lost update would break the chain of turns.
    history = [entry["version"] for entry in registry.history("AAPL")[before:]]
    assert history.count("v1") == history.count("v2") == times
    assert all(left != right for left, right in itertools.pairwise(history))


def test_while_one_changes_aliases_another_must_wait(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModelRegistry(registry.root)
    original = ModelRegistry._state
    entered = []

    def read_while_another_writes(self: ModelRegistry, symbol: str):
        state = original(self, symbol)
        if not entered:
            entered.append(True)
            with pytest.raises(ArtefactError, match="in use by another run"):
                other.challenge(symbol, "v1")
        return state

    monkeypatch.setattr("mambakit.forecast.registry._PATIENCE", 0.1)
    monkeypatch.setattr(ModelRegistry, "_state", read_while_another_writes)
    with registry._changing("AAPL") as state:
        state.aliases["challenger"] = "v2"
    assert registry.aliases("AAPL") == {"production": "v3", "challenger": "v2"}


def test_a_writer_killed_while_it_holds_the_aliases_blocks_nobody(registry: ModelRegistry) -> None:
    code = (
        "import sys, time\n"
        "from mambakit.forecast.registry import ModelRegistry\n"
        "with ModelRegistry(sys.argv[1])._changing('AAPL') as state:\n"
        "    state.aliases['production'] = 'v1'\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(registry.root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert registry.aliases("AAPL") == {"production": "v3"}
    registry.promote("AAPL", "v2")
    assert registry.aliases("AAPL") == {"production": "v2"}


def test_a_failed_change_leaves_the_aliases_as_they_were(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, content: bytes) -> None:
        path.write_bytes(content[:5])
        raise OSError(28, "No space left on device")

    before = (registry.folder("AAPL") / "aliases.json").read_bytes()
    monkeypatch.setattr(artefacts, "_write_through", full_disk)
    with pytest.raises(ArtefactError, match=r"cannot write .*aliases\.json: No space left on device"):
        registry.promote("AAPL", "v1")
    assert (registry.folder("AAPL") / "aliases.json").read_bytes() == before
    assert json.loads(before)["production"] == "v3"


def test_where_a_folder_cannot_be_locked_a_file_beside_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "_lock_folder", artefacts._lock_beside)  # what Windows does
    with (
        exclusive(tmp_path / "run"),
        pytest.raises(ArtefactError, match="in use by another run"),
        exclusive(tmp_path / "run"),
    ):
        pass
    with exclusive(tmp_path / "run"):
        pass


def test_waiting_for_a_folder_ends_when_it_is_let_go(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mambakit.training.artefacts import exclusive\n"
        "with exclusive(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ArtefactError, match="in use by another run"), exclusive(tmp_path, wait=0.1):
        pass
    holder.communicate("go\n", timeout=60)
    started = time.monotonic()
    with exclusive(tmp_path, wait=60):
        assert time.monotonic() - started < 60
