"""The sentences: what may be called skill, and how it is said."""

import io
import re

from rich.console import Console

from mambakit.forecast.baselines import BASELINES
from mambakit.forecast.evaluation import Against, Comparison, Evaluation
from mambakit.forecast.report import distribution_verdict, evaluation_table, model_card, skill_line, verdict


def judged(*p_values: float, lowest: bool = True, symbol: str = "X") -> Evaluation:
    """An evaluation with these p-values at horizons of 1, 2, .. days."""
    comparisons = tuple(Comparison(day, "drift", p_value, lowest, 1.0) for day, p_value in enumerate(p_values, start=1))
    return Evaluation(symbol, (), comparisons, {})


def test_skill_is_named_with_its_horizons() -> None:
    line = skill_line(judged(0.001, 0.6))
    assert line == "X: lower squared error than random walk and drift at 1d (p 0.002)"  # Holm: twice 0.001


def test_no_skill_is_said_plainly_with_the_smallest_p_value() -> None:
    assert skill_line(judged(0.5, 0.2)).endswith(
        "no skill beyond random walk and drift at any horizon (smallest p 0.20, at 2d)"
    )


def test_a_small_p_value_among_many_is_no_skill() -> None:
    assert "no skill" in skill_line(judged(0.02, 0.6, 0.7, 0.8))  # four times 0.02 is above 0.05


def test_a_model_that_stayed_the_drift_is_called_that() -> None:
    assert skill_line(judged(1.0, 1.0)).endswith("its mean is the drift")


def test_the_verdict_without_skill() -> None:
    line = verdict([judged(0.3, 0.4, lowest=False), judged(0.02, 0.9, symbol="Y")])
    assert "did not beat the baselines: 0 of 4" in line
    assert line.endswith("its squared error is the lowest in 2.")


def test_the_verdict_with_skill_everywhere() -> None:
    assert "the model beat the baselines: 2 of 2" in verdict([judged(1e-6), judged(1e-6, symbol="Y")])


def test_the_verdict_counts_what_was_tried_over_all_symbols() -> None:
    alone, with_others = judged(0.02), [judged(0.02), judged(0.5, 0.5, symbol="Y")]
    assert "beat the baselines: 1 of 1" in verdict([alone])
    assert "did not beat the baselines: 0 of 3" in verdict(with_others)


def test_significance_against_the_drift_is_no_victory_where_ridge_or_momentum_is_better() -> None:
    assert "did not beat the baselines" in verdict([judged(1e-6, lowest=False)])


def test_the_table_has_a_row_for_each_forecaster_and_horizon_on_one_line(trained) -> None:
    page = io.StringIO()
    Console(file=page, width=120).print(evaluation_table(trained.evaluation))
    lines = [line for line in page.getvalue().splitlines() if line.strip()]
    for name in ("mamba", *BASELINES):
        assert sum(bool(re.match(rf" \d+d +{name}  ", line)) for line in lines) == 4
    assert "…" not in page.getvalue()


def test_the_model_card_holds_the_skill_line_and_every_score(trained, saved) -> None:
    card = model_card(trained.evaluation, saved.metadata)
    assert skill_line(trained.evaluation) in card
    assert card.count("| mamba |") == 4
    assert saved.metadata["data_stats"]["sha256"] in card


def distributions(*against: Against) -> Evaluation:
    """An evaluation whose CRPS compares like this with a random walk's and with an ewma walk's, at one horizon each."""
    comparisons = tuple(
        Comparison(day, "drift", 0.5, False, 1.0, against={"random walk": each, "ewma walk": each})
        for day, each in enumerate(against, start=1)
    )
    return Evaluation("X", (), comparisons, {})


def test_distributions_are_counted_against_each_volatility_by_their_crps() -> None:
    better, unsure, worse = (Against(1.0, 0.5, ratio, p) for ratio, p in ((0.9, 1e-6), (0.99, 0.2), (1.1, 1 - 1e-6)))
    line = distribution_verdict([distributions(better, unsure, worse)])
    assert "random walk's in 2 of 3 (significantly in 1, significantly higher in 1)" in line
    assert "ewma walk's in 2 of 3" in line
    assert "garch" not in line  # it was not made


def test_distributions_of_the_trained_model_are_judged(trained) -> None:
    against = [comparison.against["ewma"] for comparison in trained.evaluation.comparisons]
    better = sum(each.crps_ratio < 1 for each in against)
    assert f"ewma's in {better} of 4" in distribution_verdict([trained.evaluation])


def test_the_same_distribution_is_neither_better_nor_worse() -> None:
    assert "(significantly in 0, significantly higher in 0)" in distribution_verdict(
        [distributions(Against(1.0, 1.0, 1.0, 1.0))]
    )
