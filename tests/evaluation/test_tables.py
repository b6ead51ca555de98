"""Tables to be read: three digits, at most seven columns, the verdict among them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from medqa_lib.evaluation import tables


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.10447, "0.104"), (3.556, "3.56"), (1747, "1,747"), (0, "0.000"), (0.00012345, "0.00012"), (float("nan"), "-")],
)
def test_format_number_shows_three_digits(value, text):
    assert tables.format_number(value) == text


def make_comparison():
    row = {"metric": "rouge2", "base": 0.0381, "tuned": 0.1045, "delta": 0.0664, "p": 1e-5, "p_holm": 2e-5, "family": 2,
           "percent_change": 174.2, "percent_low": 145.1, "percent_high": 206.0, "verdict": "better"}
    nothing = row | {"metric": "bleu", "base": 0.0, "percent_change": np.nan, "p_holm": 0.5, "verdict": "no difference"}
    return pd.DataFrame([row, nothing])


def test_results_table_shows_interval_p_and_verdict_in_words():
    table = tables.results_table(make_comparison())
    assert len(table.columns) <= 6
    assert list(table.loc["ROUGE-2 F1"]) == ["0.0381", "0.104", "+174.2% [+145.1, +206.0]", "< 0.0001", "better (Holm over 2)"]
    assert table.loc["BLEU (0-100)", "change [95% interval]"] == "-"
    by_run = tables.results_table(make_comparison().assign(run=["exp_004", "exp_005"]))
    assert by_run.loc[("exp_005", "BLEU (0-100)"), "p (Holm)"] == "0.500"


def test_summary_table_holds_numbers_and_calls_the_base_untuned():
    runs = {
        "base": SimpleNamespace(metrics={"rouge2": 0.123456, "perplexity": 13.5, "n_test": 3}),
        "baseline_nearest_answer": SimpleNamespace(metrics={"rouge2": 0.2, "n_test": 3}),
    }
    table = tables.summary_table(runs)
    assert table.loc["untuned", "rouge2"] == 0.123456 and np.isnan(table["perplexity"].iloc[1])
    assert list(table.columns) == ["perplexity", "rouge2"]


def test_pairs_table_has_a_row_per_pair_and_a_cell_per_metric():
    comparison = pd.DataFrame(
        [("base -> exp_004", "rouge2", 0.0312, 0.02, 0.0404, "better"),
         ("base -> exp_004", "bleu", -1.5, -2.0, -1.0, "worse"),
         ("exp_004 -> exp_005", "rouge2", 1.4e-6, np.nan, np.nan, "no difference"),
         ("exp_004 -> exp_005", "bleu", 0.25, -0.5, 1.0, "no difference")],
        columns=["pair", "metric", "delta", "ci_low", "ci_high", "verdict"],
    )
    table = tables.pairs_table(comparison)
    assert list(table.index) == ["untuned -> exp_004", "exp_004 -> exp_005"]
    assert list(table["ROUGE-2 F1"]) == ["+0.031 [+0.020, +0.040] better", "+0.000 no difference"]
    assert list(table["BLEU (0-100)"]) == ["-1.50 [-2.00, -1.00] worse", "+0.25 [-0.50, +1.00] no difference"]


def make_run(name, policy, shift, loss):
    rng = np.random.default_rng(0)
    scores = pd.DataFrame({"question_id": [f"q{row}" for row in range(80)], "group": range(80),
                           "rouge2": rng.random(80) / 4 + shift})
    recipe = {"label_policy": policy} if policy else None
    return SimpleNamespace(name=name, scores=scores, metrics={"validation_loss": loss, "rouge2": scores["rouge2"].mean()},
                           config={"identity": {"experiment": recipe}})


def test_expectation_table_sets_found_beside_expected_and_reported():
    base, run = make_run("base", None, 0.1, 2.6), make_run("exp_003", "preshifted", 0.0, 4.3)
    table = tables.expectation_table(run, base)
    assert set(table["expected"]) == {"worse"} == {found.partition(" (")[0] for found in table["found"]}
    assert table.loc["ROUGE-2 F1", "original report"] == "+0.21%"
    assert len(table.columns) <= 6
    fixed = tables.expectation_table(make_run("mine", "aligned", 0.1, 2.2), base)
    assert list(fixed["found"]) == ["better", "no difference (Holm over 1)"] and set(fixed["original report"]) == {"-"}
