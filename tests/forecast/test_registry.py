"""Versions appear whole, under a name of their own, and are checked when they are read."""

from pathlib import Path

import pytest

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.registry import ModelRegistry


def write_note(folder: Path, version: str) -> None:
    (folder / "note.txt").write_text(version)


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models")


def test_versions_count_up_and_the_newest_is_production(registry: ModelRegistry) -> None:
    assert [registry.store("AAPL", write_note) for _ in range(11)] == [f"v{number}" for number in range(1, 12)]
    assert registry.versions("AAPL")[-2:] == ["v10", "v11"]
    assert registry.aliases("AAPL") == {"production": "v11"}
    assert (registry.find("AAPL") / "note.txt").read_text() == "v11"


def test_a_version_is_found_by_its_name_or_an_alias(registry: ModelRegistry) -> None:
    for _ in range(2):
        registry.store("AAPL", write_note)
    registry.set_alias("AAPL", "challenger", "v1")
    assert registry.find("AAPL", "v1") == registry.find("AAPL", "challenger")
    assert registry.aliases("AAPL") == {"production": "v2", "challenger": "v1"}


def test_a_writer_that_comes_second_takes_the_next_name(registry: ModelRegistry) -> None:
    def fill_while_another_stores(folder: Path, version: str) -> None:
        write_note(folder, version)
        if version == "v1":
            registry.store("AAPL", write_note)

    assert registry.store("AAPL", fill_while_another_stores) == "v2"
    assert registry.versions("AAPL") == ["v1", "v2"]
    assert (registry.find("AAPL", "v2") / "note.txt").read_text() == "v2"


def test_a_slower_training_does_not_take_production_from_a_later_version(registry: ModelRegistry) -> None:
    registry.store("AAPL", write_note)
    registry.store("AAPL", write_note)
    (registry.folder("AAPL") / "v1").rename(registry.root / "aside")  # v1 is now free, as if its writer were slow
    assert registry.store("AAPL", write_note) == "v3"
    (registry.root / "aside").rename(registry.folder("AAPL") / "v1")
    assert registry.aliases("AAPL")["production"] == "v3"


def test_a_failure_while_writing_leaves_nothing(registry: ModelRegistry) -> None:
    def fail(folder: Path, version: str) -> None:
        write_note(folder, version)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        registry.store("AAPL", fail)
    assert registry.versions("AAPL") == []
    assert not [path for path in registry.root.rglob("*") if path.is_file()]


def test_without_an_alias_production_is_the_newest(registry: ModelRegistry) -> None:
    for _ in range(2):
        registry.store("AAPL", write_note)
    (registry.folder("AAPL") / "aliases.json").unlink()  # killed between storing and naming
    assert registry.find("AAPL").name == "v2"


def test_a_missing_model_comes_with_the_command_that_makes_it(registry: ModelRegistry) -> None:
    with pytest.raises(ArtefactError, match=r"no model of AAPL .* mambakit forecast train --symbols AAPL"):
        registry.find("aapl")


def test_a_missing_version_comes_with_those_that_exist(registry: ModelRegistry) -> None:
    registry.store("AAPL", write_note)
    with pytest.raises(ArtefactError, match="no version 'v7'; it has v1"):
        registry.find("AAPL", "v7")
    with pytest.raises(ArtefactError, match="has no version 'v7'; it has v1"):
        registry.set_alias("AAPL", "challenger", "v7")


def test_a_changed_file_is_found(registry: ModelRegistry) -> None:
    registry.store("AAPL", write_note)
    (registry.folder("AAPL") / "v1" / "note.txt").write_text("v2")
    with pytest.raises(ArtefactError, match=r"note\.txt"):
        registry.find("AAPL")


@pytest.mark.parametrize(
    "content",
    ["[]", '{"production": "../../etc"}', '{"production": 3}', '{"production": "v1", "history": ["v1"]}', "{"],
)
def test_a_damaged_alias_file_is_named(registry: ModelRegistry, content: str) -> None:
    registry.store("AAPL", write_note)
    (registry.folder("AAPL") / "aliases.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"aliases\.json"):
        registry.find("AAPL")


def test_no_symbol_leads_out_of_the_root(registry: ModelRegistry) -> None:
    for symbol in ("..", "../AAPL", "/etc", "A/../B"):
        with pytest.raises(DataError):
            registry.folder(symbol)


def test_a_root_below_a_file_is_not_writable_and_one_not_there_yet_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"cannot write models to .*choose another folder with --out"):
        ModelRegistry(tmp_path / "file" / "models").require_writable("AAPL")
    ModelRegistry(tmp_path / "new" / "models").require_writable("AAPL")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_trainings_of_one_symbol_have_run_folders_of_their_own(registry: ModelRegistry) -> None:
    with registry.run_folder("AAPL") as first, registry.run_folder("AAPL") as second:
        assert first != second
    assert not registry.folder("AAPL").exists()


def test_a_run_that_failed_keeps_its_checkpoints_for_the_next(registry: ModelRegistry) -> None:
    def fail() -> None:
        with registry.run_folder("AAPL") as run:
            (run / "checkpoints" / "000001").mkdir(parents=True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert registry.interrupted("AAPL")
    with registry.run_folder("AAPL") as run:
        assert (run / "checkpoints" / "000001").is_dir()
    assert not registry.interrupted("AAPL")


def test_a_run_that_failed_before_its_first_checkpoint_leaves_nothing(registry: ModelRegistry) -> None:
    def fail() -> None:
        with registry.run_folder("AAPL"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not registry.folder("AAPL").exists()
