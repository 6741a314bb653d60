"""The report page: whole in one file, the same figures as stored, and words where a figure would be empty."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tests.forecast.walks import random_walk

from mambakit.errors import ArtefactError
from mambakit.forecast import charts
from mambakit.forecast.artefact import save_forecaster
from mambakit.forecast.backtest import Backtest, WalkForward, backtest
from mambakit.forecast.baselines import BASELINES
from mambakit.forecast.config import SEQUENCE_TRAINING, MambaConfig
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.evaluation import MODEL
from mambakit.forecast.page import plain_verdict, read_run, render, write_page
from mambakit.forecast.predictions import Predictions
from mambakit.forecast.prices import fetch_historical_prices
from mambakit.forecast.registry import ModelRegistry
from mambakit.forecast.train import train_prepared

CONFIG = MambaConfig(d_model=4, d_state=2, num_layers=1, sequence_length=10, prediction_horizons=(1, 5))
TRAINING = SEQUENCE_TRAINING.model_copy(update={"epochs": 2, "learning_rate": 1e-2})


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backtest, Path]:
    series = [random_walk(days=420, memory=0.5, symbol="AAA"), random_walk(days=50, symbol="SHORT")]
    result = backtest(series, CONFIG, TRAINING, WalkForward(folds=2, step=30), baselines=BASELINES)
    folder = tmp_path_factory.mktemp("page") / "run"
    result.save(folder)
    return result, folder


@pytest.fixture(scope="module")
def page(tested) -> str:
    return render(read_run(tested[1]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    series = fetch_historical_prices(["AAPL"], 430)["AAPL"]
    trained = train_prepared(prepare_series(series, CONFIG), TRAINING, quiet=True)
    ModelRegistry(root).store("AAPL", lambda folder, name: save_forecaster(folder, trained, name))
    return root


class Tags(HTMLParser):
    """Every tag with its attributes, and a complaint about any that is closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_asks_nobody_for_anything(page) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    for _, attributes in tags.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)


def test_an_id_appears_once(page) -> None:
    tags = Tags()
    tags.feed(page)
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0


def test_figures_take_their_colours_from_the_page(page) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 5  # a fan, two courses, PIT, reliability
    for figure in figures:
        assert 'role="img"' in figure
        assert "var(--ink)" in figure
        assert not re.search(r"#0102\d\d", figure)
        # White and black are matplotlib's own; no figure may carry them into the other theme.
        assert not re.search(r"#ffffff|#000000", figure)
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", page)):
        assert page.count(f"{variable}:") == 2  # once in light, once in dark


def test_the_page_shows_the_stored_figures(tested, page) -> None:
    result, _ = tested
    score = next(each for each in result.evaluations[0].scores if each.forecaster == "ridge" and each.horizon == 5)
    row = re.search(r"<td class=\"\">5d</td><th class=\"left\">ridge</th>(.*?)</tr>", page, re.DOTALL)
    assert row is not None
    cells = re.findall(r"<td class=\"[a-z]*\">(.*?)</td>", row.group(1))
    assert cells[:3] == [f"{score.r2_random_walk:.4f}", f"{score.r2_drift:.4f}", f"{score.mase:.3f}"]
    pooled = next(each for each in result.summary.crps if (each.name, each.horizon) == ("random walk", 1))
    assert f"{pooled.value:.4f}" in page


def test_the_page_warns_of_what_failed_and_says_the_verdict(tested, page) -> None:
    result, _ = tested
    assert "SHORT failed: SHORT: 50 days" in page
    for sentence in plain_verdict(result.summary):
        assert sentence.replace("'", "&#39;") in page
    assert result.data["AAA"]["sha256"][:12] in page


def test_a_symbol_cannot_smuggle_in_markup() -> None:
    fan = charts.Fan(
        "<b>&",
        np.arange(20).astype("datetime64[D]"),
        np.linspace(10, 11, 20),
        (1, 5),
        np.zeros(2),
        np.tile(np.linspace(-0.1, 0.1, 21), (2, 1)),
    )
    assert "<b>" not in charts.fan_chart(fan)


def test_where_the_mean_is_the_drift_words_take_the_place_of_the_curve(tested) -> None:
    record = tested[0].records[0]
    drift = record.predictions["drift"].mean
    still = record.with_predictions(MODEL, Predictions(drift, record.predictions[MODEL].quantiles))
    assert charts.squared_course([still]) == (None, [1, 5])
    moved = drift.copy()
    moved[:, 1] += 0.01
    figure, horizons = charts.squared_course(
        [record.with_predictions(MODEL, Predictions(moved, record.predictions[MODEL].quantiles))]
    )
    assert figure is not None
    assert horizons == [1]


def test_the_course_ends_at_the_pooled_gain(tested) -> None:
    result, _ = tested
    gains = [charts._crps_gains(record, "random walk") for record in result.records]
    _, saved = charts._course(result.records, gains)
    pooled = next(each for each in result.summary.crps if (each.name, each.horizon) == ("random walk", 0))
    assert saved[-1] == pytest.approx(1 - pooled.value, abs=1e-4)


def test_no_line_is_drawn_through_years_without_forecasts(tested) -> None:
    record = tested[0].records[0]
    later = replace(record, symbol="LATER", dates=record.dates + np.timedelta64(3000, "D"))
    days, saved = charts._course([record, later], [charts._crps_gains(each, "drift") for each in (record, later)])
    assert np.isnan(saved).sum() == 1
    assert len(days) == 2 * len(record.dates) + 1


def test_a_page_of_models_of_one_symbol_and_of_one_version(models: Path, tmp_path: Path) -> None:
    for run in (models, models / "AAPL", models / "AAPL" / "v1"):
        write_page(run, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        assert "AAPL v1" in text
        assert "AAPL: forecast from 2013-03-01" in text  # the fan starts at the end of the prices
        assert "no fan chart" not in text


def test_a_folder_that_is_no_run_is_named_with_the_way_out(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ArtefactError, match=f"{path} holds neither models nor a backtest; make one with"):
            read_run(path)


def test_a_changed_version_is_refused(models: Path, tmp_path: Path) -> None:
    copy = tmp_path / "v1"
    copy.mkdir()
    for file in (models / "AAPL" / "v1").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "metrics.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"metrics\.json"):
        read_run(copy)
