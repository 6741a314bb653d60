"""The search for settings: that it goes on, finds the best, tells studies apart, and writes what training reads."""

from pathlib import Path

import pytest
from tests.forecast.walks import random_walk

from mambakit.errors import DataError, MambakitError
from mambakit.forecast.config import MambaConfig
from mambakit.forecast.tune import MODEL_SPACE, Tuned, load_settings, tune
from mambakit.training import TrainingConfig

optuna = pytest.importorskip("optuna")

SERIES = [random_walk(days=460, seed=3, symbol="AA")]
CONFIG = MambaConfig(d_model=16, d_state=8, num_layers=1, prediction_horizons=(1, 5))
TRAINING = TrainingConfig(epochs=1, batch_size=2)


@pytest.fixture(autouse=True)
def small_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that train at once."""
    small = {"d_model": (8, 16), "d_state": (4, 8), "num_layers": (1,)}
    for name, values in small.items():
        monkeypatch.setitem(MODEL_SPACE, name, values)


def search(tmp_path: Path, trials: int, **changes: object) -> tuple[Tuned, list[int]]:
    heard: list[int] = []
    arguments = {"series": SERIES, "config": CONFIG, "training": TRAINING} | changes
    best = tune(
        **arguments,  # type: ignore[arg-type]
        trials=trials,
        storage=f"sqlite:///{tmp_path / 'study.sqlite'}",
        on_trial=lambda number, loss, so_far: heard.append(number),
    )
    return best, heard


def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    first, heard = search(tmp_path, 2)
    assert heard == [0, 1]
    then, heard = search(tmp_path, 3)
    assert heard == [2]
    assert then.validation_loss <= first.validation_loss
    assert then.finished == 3
    again, heard = search(tmp_path, 3)
    assert heard == []
    assert again == then


def test_the_first_trial_is_the_settings_as_they_are(tmp_path: Path) -> None:
    best, _ = search(tmp_path, 1)
    assert best.trial == 0
    assert best.config == CONFIG
    assert best.training == TRAINING


def test_the_best_trial_is_the_one_of_the_lowest_loss_and_its_settings_come_back_from_a_file(tmp_path: Path) -> None:
    best, _ = search(tmp_path, 4, mixers=("mamba", "s4d"))
    study = optuna.load_study(study_name="forecast", storage=f"sqlite:///{tmp_path / 'study.sqlite'}")
    assert best.validation_loss == study.best_value
    assert best.config.dropout == study.best_params["dropout"]
    assert best.config.mixer == study.best_params.get("mixer", "mamba")
    best.save(tmp_path / "best.json")
    assert load_settings(tmp_path / "best.json") == (best.config, best.training)


def test_a_study_of_other_data_is_refused(tmp_path: Path) -> None:
    search(tmp_path, 1)
    with pytest.raises(MambakitError, match=r"the study 'forecast' in .* was made with other data"):
        search(tmp_path, 1, series=[random_walk(days=460, seed=4, symbol="AA")])


def test_a_trial_that_was_killed_is_tried_again(tmp_path: Path) -> None:
    search(tmp_path, 1)
    study = optuna.load_study(study_name="forecast", storage=f"sqlite:///{tmp_path / 'study.sqlite'}")
    study.ask()  # a trial that never ends
    best, heard = search(tmp_path, 2)
    assert len(heard) == 1
    assert best.finished == 2


def test_a_storage_that_cannot_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MambakitError, match="can't open the storage 'sqlite:///"):
        tune(SERIES, CONFIG, TRAINING, trials=1, storage=f"sqlite:///{tmp_path / 'no' / 'folder' / 'x.sqlite'}")


@pytest.mark.parametrize("content", ["", "[]", '{"model": {}}', '{"model": {"d_model": 0}, "training": {}}'])
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(DataError, match="as `mambakit forecast tune` writes it"):
        load_settings(tmp_path / "bad.json")
