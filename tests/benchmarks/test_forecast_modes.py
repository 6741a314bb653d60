"""The comparison of the ways to train a forecaster: its jobs, its scores, and one run of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.forecast_modes import Result, jobs, main, score, table
from benchmarks.prices import all_names

from mambakit.forecast import MambaConfig, fetch_historical_prices
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.dataset import prepare_series


def test_symbols_of_the_two_sources_are_pooled_apart() -> None:
    symbols = ["AAPL", "IBM", "AAPL-SKF", "XOM-SKF"]
    made = jobs(symbols, ("pooled", "unseen", "sequence"), "validation", None, "default")
    assert [job[1] for job in made if job[0] == "pooled"] == [symbols[:2], symbols[2:]]
    for _, known, judged, *_ in (job for job in made if job[0] == "unseen"):
        assert not set(known) & set(judged)
    assert [job[1] for job in made if job[0] == "sequence"] == [[symbol] for symbol in symbols]


def test_the_random_walk_scores_one_and_the_truth_nothing() -> None:
    from scipy.stats import norm

    prepared = prepare_series(fetch_historical_prices(["IBM"], 600)["IBM"], MambaConfig())
    part = prepared.split.test
    deviation = prepared.returns[prepared.split.training].std(axis=0)
    walk = np.tile(deviation[:, None] * norm.ppf(QUANTILES), (len(part), 1, 1))
    assert score(prepared, part, walk)[0] == pytest.approx([1, 1, 1, 1])
    truth = np.repeat(prepared.returns[part][..., None], len(QUANTILES), axis=-1)
    assert score(prepared, part, truth) == ([0, 0, 0, 0], [1, 1, 1, 1])


def test_the_table_shows_means_over_symbols() -> None:
    results = [Result(symbol, "ewma", [value] * 4, [0.8] * 4, 1.0) for symbol, value in (("A", 0.5), ("B", 0.7))]
    assert "0.6000" in table(results, ["ewma"])


def test_it_runs_on_a_built_in_symbol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--symbols",
        "IBM",
        "--methods",
        "ewma,untrained",
        "--workers",
        "1",
        "--json",
        str(tmp_path / "x.json"),
    ]
    main(arguments)
    assert "untrained" in capsys.readouterr().out
    stored = json.loads((tmp_path / "x.json").read_text())
    assert {result["method"] for result in stored["results"]} == {"ewma", "untrained"}
    assert all(0.5 < value < 1.2 for result in stored["results"] for value in result["crps"])


def test_unknown_symbols_are_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "AAPL" in all_names()
    with pytest.raises(SystemExit):
        main(["--symbols", "ZZZZ"])
    assert "unknown: ZZZZ; symbols are AAPL" in capsys.readouterr().err
