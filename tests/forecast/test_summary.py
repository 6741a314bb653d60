"""What many symbols say together, on records whose truth is known."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from mambakit.forecast.evaluation import evaluate
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import normal_predictions
from mambakit.forecast.significance import overlapping_mean_test
from mambakit.forecast.summary import (
    ALL_HORIZONS,
    NONE,
    SKILL,
    WORSE,
    Summary,
    pooled_mean,
    success_criteria,
    summarise,
)
from mambakit.forecast.tables import baseline_name, criteria_lines, skill_verdict, summary_tables

SAMPLES = 400


def record(symbol: str, seed: int, width: float = 1.0, informed: float = 0.0, first: int = 0) -> OutOfSample:
    """Days of changing volatility; the model knows it up to a factor `width`, and a share of each return."""
    generator = np.random.default_rng(seed)
    volatility = 0.01 * np.exp(np.sin(np.arange(SAMPLES) / 25))[:, None]
    actual = volatility * generator.normal(size=(SAMPLES, 1))
    zero, flat = np.zeros_like(actual), np.full_like(actual, float(actual.std()))
    known = informed * actual
    return OutOfSample(
        symbol,
        (1,),
        np.arange(first, first + SAMPLES).astype("datetime64[D]"),
        np.zeros(SAMPLES, dtype=int),
        actual,
        volatility[:, 0],
        np.full_like(actual, 0.01),
        {
            "mamba": normal_predictions(known, width * (1 - informed) * volatility),
            "random walk": normal_predictions(zero, flat),
            "drift": normal_predictions(zero + 1e-4, flat),
            "ewma walk": normal_predictions(zero, 1.02 * volatility),
            "ewma": normal_predictions(zero + 1e-4, volatility),
        },
    )


def summary_of(*records: OutOfSample) -> Summary:
    return summarise(records, [evaluate(each) for each in records])


def pooled(figures, name: str, horizon: int = 1):
    return next(each for each in figures if (each.name, each.horizon) == (name, horizon))


def test_one_symbol_pooled_is_the_usual_test() -> None:
    one = record("A", 0)
    values = np.random.default_rng(1).normal(0.1, 1.0, SAMPLES)
    ours, usual = pooled_mean([one], [values], 5), overlapping_mean_test(values, 5)
    assert (ours.mean, ours.error, ours.p_value) == pytest.approx((usual.mean, usual.error, usual.p_value))


def test_a_symbol_counted_twice_is_no_further_evidence_and_another_one_is() -> None:
    records = [record("A", 0), record("B", 1)]
    generator = np.random.default_rng(2)
    values, others = (generator.normal(0.1, 1.0, SAMPLES) for _ in range(2))
    once = pooled_mean(records[:1], [values], 1).error
    assert pooled_mean(records, [values, values], 1).error == pytest.approx(once)
    assert pooled_mean(records, [values, others], 1).error == pytest.approx(once / np.sqrt(2), rel=0.1)


def test_symbols_of_different_years_are_pooled_by_their_days() -> None:
    records = [record("A", 0), record("B", 1, first=5000)]
    values = [np.full(SAMPLES, 1.0) + np.random.default_rng(s).normal(size=SAMPLES) for s in range(2)]
    test = pooled_mean(records, values, 1)
    assert test.mean == pytest.approx(np.concatenate(values).mean())
    assert test.error == pytest.approx(1 / np.sqrt(2 * SAMPLES), rel=0.1)


def test_symbols_that_move_together_seem_significant_about_as_often_as_it_says() -> None:
    records = [record(symbol, seed) for seed, symbol in enumerate("ABCDEF")]
    hits = []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        market = np.convolve(generator.normal(size=SAMPLES + 4), np.ones(5), "valid")
        own = [np.convolve(generator.normal(size=SAMPLES + 4), np.ones(5), "valid") for _ in records]
        hits.append(pooled_mean(records, [market + 0.5 * each for each in own], 5).p_value < 0.05)
    assert 0.02 < np.mean(hits) < 0.09  # as 2400 independent values it would be above 0.3


def test_a_model_that_knows_the_volatility_beats_the_constant_one() -> None:
    summary = summary_of(record("A", 0), record("B", 1))
    constant = pooled(summary.crps, "random walk")
    assert constant.value < 0.97
    assert constant.p_value < 0.001
    assert pooled(summary.crps, "ewma walk").value == pytest.approx(1.0, abs=0.01)


def test_the_ratio_is_that_of_the_mean_crps_of_every_symbol() -> None:
    records = [record("A", 0), record("B", 1, width=1.5)]
    evaluations = [evaluate(each) for each in records]
    ratios = []
    for evaluation in evaluations:
        crps = {score.forecaster: score.crps for score in evaluation.scores}
        ratios.append(crps["mamba"] / crps["random walk"])
    assert pooled(summarise(records, evaluations).crps, "random walk").value == pytest.approx(np.mean(ratios), abs=1e-4)


def test_a_baseline_made_for_some_symbols_is_pooled_over_those_and_says_so() -> None:
    with_garch = record("A", 0)
    with_garch = with_garch.with_predictions("garch walk", with_garch.predictions["random walk"])
    summary = summary_of(with_garch, record("B", 1, width=3.0))
    garch, alone = pooled(summary.crps, "garch walk"), pooled(summary_of(with_garch).crps, "garch walk")
    assert (garch.value, garch.error, garch.symbols) == (alone.value, alone.error, 1)
    assert baseline_name("garch walk", summary) == "garch walk (1 of 2 symbols)"
    sentence = next(each for each in success_criteria(summary) if "garch" in each.name)
    assert sentence.detail.endswith("over the 1 symbols for which it was made")


def test_r2_and_coverage_of_a_model_that_knows_half() -> None:
    summary = summary_of(record("A", 0, informed=0.5), record("B", 1, informed=0.5))
    assert pooled(summary.r2, "random walk").value == pytest.approx(0.75)
    assert pooled(summary.coverage, "80%").value == pytest.approx(0.8, abs=0.03)
    assert pooled(summary.coverage, "80%", ALL_HORIZONS).value == pooled(summary.coverage, "80%").value


def test_skill_is_found_where_it_is_and_nowhere_else() -> None:
    summary = summary_of(record("GOOD", 0, informed=0.3), record("NOT", 1, width=1.02), record("BAD", 2, width=3.0))
    words = {cell.symbol: (cell.distribution, cell.mean) for cell in summary.cells}
    assert words == {"GOOD": (SKILL, SKILL), "NOT": (NONE, NONE), "BAD": (WORSE, NONE)}


def test_cells_carry_both_corrections() -> None:
    cell = summary_of(record("A", 0, informed=0.1), *(record(f"B{n}", n) for n in range(1, 6))).cells[0]
    assert cell.crps_p_value <= cell.crps_benjamini_hochberg <= cell.crps_holm


def test_the_criteria_pass_for_a_right_model_and_fail_for_wrong_ones() -> None:
    def words(*records: OutOfSample) -> dict[str, bool | None]:
        return {each.name.split(",")[0]: each.passed for each in success_criteria(summary_of(*records))}

    right = words(record("A", 0), record("B", 1))
    assert right["CRPS clearly better than the constant-volatility random walk's"] is True
    assert right["CRPS no worse than the ewma walk's"] is True
    assert right["CRPS no worse than the garch walk's"] is None  # it was not made
    assert right["80% interval covers 77 to 83% at 1d"] is True
    wide = words(record("A", 0, width=2.0), record("B", 1, width=2.0))
    assert wide["CRPS no worse than the ewma walk's"] is False
    assert wide["80% interval covers 77 to 83% at 1d"] is False
    misled = words(record("A", 0, informed=-0.2), record("B", 1, informed=-0.2))
    assert misled["R² not below drift's by more than its standard error at 1d"] is False


def test_the_criteria_are_said_line_by_line() -> None:
    lines = criteria_lines(success_criteria(summary_of(record("A", 0))))
    assert lines[0].startswith("PASS     CRPS clearly better")
    assert any(line.startswith("UNKNOWN") and "was not made" in line for line in lines)


def test_the_tables_show_every_baseline_and_symbol() -> None:
    summary = summary_of(record("GOOD", 0, informed=0.3), record("BAD", 2, width=3.0))
    page = io.StringIO()
    for table in summary_tables(summary):
        Console(file=page, width=120).print(table)
    text = page.getvalue()
    for word in ("random walk", "ewma walk", "GOOD", "BAD", "better", "WORSE", "80% interval covers"):
        assert word in text
    assert "…" not in text
    assert "of the distribution beyond walks with moving volatility in 1 of 2" in skill_verdict(summary)


def test_a_summary_survives_json() -> None:
    summary = summary_of(record("A", 0), record("B", 1))
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
