"""The bootstrap against simulated truth, against a slow bootstrap written out, and against values worked out by hand."""


import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t, ttest_1samp, ttest_ind

from medqa_lib.evaluation import significance as statistics
from medqa_lib.metrics import METRICS, summarize_scores

PANEL = [name for name in METRICS if name not in ("bleu", "eos_rate")]


def make_frame(values, groups=None, **columns):
    """A score frame: values is {metric: (N,)}, groups (N,)."""
    n = len(next(iter(values.values())))
    groups = range(n) if groups is None else groups
    about = {"question_id": [f"q{row}" for row in range(n)], "group": [f"g{group}" for group in groups]}
    return pd.DataFrame({**about, "source": "medquad", "reference_words": 10, **values, **columns})


def make_runs(rng, n_groups, metrics, effects, correlation=0.5):
    """One frame an effect: true mean 5 + effect, skewed, groups of 1 to 4 questions that share an offset, metrics correlated."""
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 5, n_groups))

    def draw(k):
        return rng.normal(size=(n_groups, k))[groups] + rng.exponential(1, (len(groups), k)) - 1

    values = [
        5 + effect + np.sqrt(correlation) * draw(1) + np.sqrt(1 - correlation) * draw(len(metrics))
        for effect in effects
    ]
    return [make_frame(dict(zip(metrics, run.T, strict=True)), groups) for run in values]


def make_bleu_columns(rng, n):
    length = rng.integers(20, 60, n)
    totals = {f"bleu_total_{k}": length - k + 1 for k in (1, 2, 3, 4)}
    matches = {f"bleu_match_{k}": rng.integers(0, 16 // k, n) for k in (1, 2, 3, 4)}
    return {"bleu_hyp_len": length, "bleu_ref_len": rng.integers(20, 60, n), **matches, **totals}


def share_covered(n_sets, n_groups, n_resamples):
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(n_sets):
        base, tuned = make_runs(rng, n_groups, ["rouge1"], [0, 0.25])
        row = statistics.compare_runs(base, tuned, n_resamples=n_resamples).iloc[0]
        hits += row["ci_low"] <= 0.25 <= row["ci_high"]
    return hits / n_sets


def test_compare_runs_interval_covers_truth_fast():
    assert 0.88 <= share_covered(60, 60, 400) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("n_groups", [12, 60, 400])
def test_compare_runs_interval_covers_truth(n_groups):
    assert 0.93 <= share_covered(500, n_groups, 2000) <= 0.97


def make_recipes(rng, n_groups, effects, seed_sd, group_sd, n_seeds=3):
    """Per effect one frame a seed: a seed moves all its answers, a group answers one recipe better than another."""
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 4, n_groups))
    shared = rng.normal(size=n_groups)[groups]

    def draw(effect, group):
        luck = rng.normal() * seed_sd + rng.exponential(1, len(groups)) - 1
        return make_frame({"rouge1": 5 + effect + shared + group[groups] + luck}, groups)

    own = rng.normal(size=(len(effects), n_groups)) * group_sd
    return [[draw(effect, group) for _ in range(n_seeds)] for effect, group in zip(effects, own, strict=True)]


def share_covered_over_seeds(n_sets, n_groups, seed_sd, group_sd, n_resamples=1000):
    rng = np.random.default_rng(17)
    hits = 0
    for _ in range(n_sets):
        base, tuned = make_recipes(rng, n_groups, [0, 0.3], seed_sd, group_sd)
        row = statistics.compare_runs(base, tuned, n_resamples=n_resamples).iloc[0]
        hits += row["ci_low"] <= 0.3 <= row["ci_high"]
    return hits / n_sets


def test_interval_over_seeds_covers_truth_fast():
    assert share_covered_over_seeds(60, 60, seed_sd=0.3, group_sd=0.3, n_resamples=400) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("seed_sd", "group_sd"), [(0.5, 0.0), (0.2, 0.1), (0.1, 0.5), (0.05, 0.05)])
@pytest.mark.parametrize("n_groups", [20, 60])
def test_interval_over_seeds_covers_truth(n_groups, seed_sd, group_sd):
    """Seeds decide, both do, groups do, the luck of single answers does."""
    assert 0.91 <= share_covered_over_seeds(200, n_groups, seed_sd, group_sd, 400) <= 0.99


def test_one_seed_calls_the_luck_of_a_seed_better_three_do_not():
    base, tuned = make_recipes(np.random.default_rng(3), 300, [0, 0], 0.4, 0.0)
    gains = [abs(first["rouge1"].mean() - second["rouge1"].mean()) for first, second in zip(base, tuned, strict=True)]
    place = int(np.argmax(gains))
    alone = statistics.compare_runs(base[place], tuned[place], n_resamples=2000).iloc[0]
    together = statistics.compare_runs(base, tuned, n_resamples=2000).iloc[0]
    assert (alone["verdict"] != "no difference", together["verdict"]) == (True, "no difference")
    assert (alone["seeds"], together["seeds"]) == ("1 and 1", "3 and 3")


def test_interval_over_seeds_is_welchs_where_groups_say_nothing():
    """All groups alike: what is left is a t interval over seeds (ttest_ind is scipy's)."""
    base, tuned = ([make_frame({"rouge1": np.full(200, value)}) for value in means]
                   for means in ((1.0, 1.3, 1.1), (1.6, 1.5, 2.0)))
    row = statistics.compare_runs(base, tuned, n_resamples=50_000).iloc[0]
    test = ttest_ind([1.6, 1.5, 2.0], [1.0, 1.3, 1.1], equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert row["delta"] == pytest.approx(1.7 - 3.4 / 3)
    assert [row["ci_low"], row["ci_high"]] == pytest.approx([low, high], abs=0.03)
    assert row["p"] == pytest.approx(test.pvalue, rel=0.06)
    known = statistics.compare_runs(base[0], tuned, n_resamples=50_000).iloc[0]  # the untuned model has no seed
    low, high = ttest_1samp([0.6, 0.5, 1.0], 0).confidence_interval(0.95)
    assert [known["ci_low"], known["ci_high"]] == pytest.approx([low, high], abs=0.06)


def test_one_question_under_two_names_is_tested_once():
    frame = make_frame({"rouge1": np.linspace(0, 1, 30), "words": np.arange(30.0)})
    assert list(statistics.compare_runs(frame, frame, ["words", "length_ratio"])["metric"]) == ["length_ratio"]
    assert list(statistics.compare_runs(frame, frame, ["words"])["metric"]) == ["words"]


def share_of_false_families(n_families, correlation, n_resamples):
    """Share of families of a dozen metrics x 3 runs without any true difference in which something is called different."""
    rng = np.random.default_rng(11)
    false = 0
    for _ in range(n_families):
        base, *runs = make_runs(rng, 100, PANEL, [0, 0, 0, 0], correlation)
        table = statistics.compare_many(base, dict(zip("abc", runs, strict=True)), n_resamples=n_resamples)
        false += (table["verdict"] != "no difference").any()
    return false / n_families


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_compare_many_holds_family_error(correlation):
    assert share_of_false_families(1000, correlation, 10_000) < 0.05


def test_compare_many_holds_family_error_fast():
    assert share_of_false_families(6, 0.0, 2000) <= 0.34  # uncorrected, four families in five would be false


@pytest.mark.parametrize("name", ["rouge1", "bleu"])
def test_compare_runs_equals_bootstrap_written_out(name):
    """The same draws of groups, each resample gathered row by row."""
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 40, 90)
    values = {} if name == "bleu" else {"rouge1": np.zeros(90)}
    base, tuned = (
        make_frame({name: rng.random(90) + shift for name in values} or make_bleu_columns(rng, 90), groups)
        for shift in (0, 0.1)
    )
    labels = list(dict.fromkeys(base["group"]))
    members = [np.flatnonzero(base["group"] == label) for label in labels]
    deltas, percents = [], []
    for draw in np.random.default_rng(42).integers(len(labels), size=(200, len(labels))):
        rows = np.concatenate([members[group] for group in draw])
        low, high = (summarize_scores(frame.iloc[rows])[name] for frame in (base, tuned))
        deltas.append(high - low)
        percents.append(100 * (high - low) / low)
    row = statistics.compare_runs(base, tuned, [name], n_resamples=200).iloc[0]
    sizes = base["group"].value_counts()
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    level = norm.cdf(np.sqrt(effective / (effective - 1)) * t.ppf(0.025, effective - 1))
    assert 0.015 < level < 0.025
    assert row["delta"] == pytest.approx(summarize_scores(tuned)[name] - summarize_scores(base)[name])
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(list(np.quantile(deltas, [level, 1 - level])))
    assert [row["percent_low"], row["percent_high"]] == pytest.approx(
        list(np.quantile(percents, [level, 1 - level]))
    )
    assert (row["n"], row["groups"]) == (90, len(labels))


def test_compare_runs_p_agrees_with_interval():
    rng = np.random.default_rng(5)
    for effect in np.linspace(0, 0.5, 15):
        row = statistics.compare_runs(*make_runs(rng, 50, ["rouge1"], [0, effect]), n_resamples=2000).iloc[0]
        if abs(row["p"] - 0.05) > 0.005:
            assert (row["p"] < 0.05) == (row["ci_low"] > 0 or row["ci_high"] < 0)


def test_compare_runs_p_is_never_zero():
    base = make_frame({"rouge1": np.full(60, 0.1)})
    row = statistics.compare_runs(base, make_frame({"rouge1": np.full(60, 0.9)}), n_resamples=999).iloc[0]
    assert row["p"] == pytest.approx(2 / 1000)


def test_compare_runs_p_of_few_groups_is_that_of_a_t_test_past_the_resamples():
    gains = np.array([0.05, 0.1, 0.2, 0.3, 0.3, 0.5, 0.6, 0.7])  # none below 0, so no resample is
    base = make_frame({"rouge1": np.zeros(8)})
    row = statistics.compare_runs(base, base.assign(rouge1=gains)).iloc[0]
    assert row["p"] == pytest.approx(ttest_1samp(gains, 0).pvalue, rel=0.1)
    assert row["p"] > 20 / 10_001


def test_compare_runs_identical_runs_are_no_difference():
    frame = make_frame({"rouge1": np.linspace(0, 1, 30), "words": np.arange(30.0)})
    table = statistics.compare_runs(frame, frame)
    assert list(table["p"]) == [1, 1]  # words are not tested beside length_ratio
    assert set(table["verdict"]) == {"no difference"}
    assert (table[["delta", "ci_low", "ci_high", "percent_change"]] == 0).all(axis=None)


def test_compare_runs_grouped_questions_weigh_less():
    rng = np.random.default_rng(9)
    answers = rng.normal(size=20)
    repeated = make_frame({"rouge1": np.repeat(answers, 10)}, np.repeat(np.arange(20), 10))
    zeros = repeated.assign(rouge1=0.0)
    grouped = statistics.compare_runs(zeros, repeated).iloc[0]
    alone = statistics.compare_runs(
        zeros.assign(group=zeros["question_id"]), repeated.assign(group=repeated["question_id"])
    ).iloc[0]
    assert grouped["delta"] == pytest.approx(alone["delta"])
    assert grouped["ci_high"] - grouped["ci_low"] > 2.5 * (
        alone["ci_high"] - alone["ci_low"]
    )  # ten copies are one fact


def test_compare_runs_verdict_follows_the_metrics_direction():
    values = {name: np.full(200, 0.5) for name in ("rouge1", "repeated_4gram_share", "words", "smog")}
    base = make_frame(values)
    tuned = make_frame({name: column * (0.8 if name == "smog" else 1.2) for name, column in values.items()})
    verdicts = statistics.compare_runs(base, tuned).set_index("metric")["verdict"]
    assert verdicts.to_dict() == {
        "rouge1": "better",
        "repeated_4gram_share": "worse",
        "length_ratio": "higher",
        "smog": "lower",
    }
    assert statistics.compare_runs(tuned, base, ["rouge1"])["verdict"].item() == "worse"


def test_compare_runs_percent_change_of_zero_and_negative_base():
    base = make_frame({"rouge1": np.zeros(20), "flesch_kincaid": np.full(20, -2.0)})
    tuned = make_frame({"rouge1": np.ones(20), "flesch_kincaid": np.full(20, -1.0)})
    table = statistics.compare_runs(base, tuned).set_index("metric")
    assert table.loc["flesch_kincaid", "percent_change"] == 50
    assert table.loc["rouge1", ["percent_change", "percent_low", "percent_high"]].isna().all()
    assert table.loc["rouge1", "delta"] == 1
    tiny = statistics.compare_runs(base.assign(rouge1=[0.0] * 19 + [0.01]), tuned, ["rouge1"]).iloc[0]
    assert np.isnan(tiny["percent_change"]) and tiny["base"] == pytest.approx(5e-4)


@pytest.mark.parametrize("n_groups", [2, 4])
def test_compare_runs_of_few_groups_claims_nothing(n_groups):
    base = make_frame({"rouge1": np.linspace(0, 1, 40)}, np.arange(40) % n_groups)
    row = statistics.compare_runs(base, base.assign(rouge1=base["rouge1"] + np.linspace(1, 2, 40))).iloc[0]
    assert (row["p"], row["verdict"]) == (1, "no difference")
    assert np.isnan(row["ci_low"])


def test_compare_runs_names_a_column_without_a_number():
    base = make_frame({"rouge1": np.zeros(50), "rouge2": np.zeros(50)})
    with pytest.raises(ValueError, match="no score in rouge2"):
        statistics.compare_runs(base, base.assign(rouge2=[np.nan, *np.ones(49)]))


def test_compare_runs_length_ratio_is_that_of_the_sums():
    base = make_frame({"words": np.full(60, 10.0)}).assign(reference_words=[1, 39] * 30)
    row = statistics.compare_runs(base, base.assign(words=30.0), ["length_ratio"]).iloc[0]
    assert (row["base"], row["tuned"]) == (
        0.5,
        1.5,
    )  # 10 / 20 and 30 / 20; the mean of the ratios would be 5.1 and 15.4
    assert row["ci_low"] < 1 < row["ci_high"]


def test_compare_runs_multiple_choice_is_the_share_of_those_asked():
    base = make_frame({"mcq_correct": np.zeros(60)}).assign(mcq_asked=[1, 0, 0] * 20)
    tuned = base.assign(mcq_correct=[1, 0, 0] * 10 + [0] * 30)
    row = statistics.compare_runs(base, tuned).set_index("metric").loc["mcq_accuracy"]
    assert (row["base"], row["tuned"], row["verdict"]) == (0, 0.5, "better")


def test_compare_runs_counts_texts_on_free_questions_and_choices_on_the_others():
    rng = np.random.default_rng(12)
    free = np.array([True, True, False] * 40)
    base = make_frame({"rouge1": rng.random(120)}, np.arange(120) // 2).assign(
        kind=np.where(free, "free", "mcq"), mcq_asked=1 - free, mcq_correct=0)
    tuned = base.assign(rouge1=base["rouge1"] + np.where(free, 0.1, 0.9), mcq_correct=1 - free)
    table = statistics.compare_runs(base, tuned, n_resamples=500).set_index("metric")
    assert table.loc["rouge1", "delta"] == pytest.approx(0.1)
    assert table.loc["rouge1", ["n", "groups"]].tolist() == [80, 60]
    assert table.loc["mcq_accuracy", ["tuned", "n", "groups"]].tolist() == [1, 40, 40]
    assert summarize_scores(tuned)["rouge1"] == pytest.approx(table.loc["rouge1", "tuned"])
    choices = statistics.compare_runs(base[~free], tuned[~free], ["rouge1"], n_resamples=500)
    assert choices.loc[0, "delta"] == pytest.approx(0.9), "alone they are compared"


def test_compare_runs_single_group_shows_no_difference():
    base = make_frame({"rouge1": np.zeros(5)}, np.zeros(5, int))
    row = statistics.compare_runs(base, base.assign(rouge1=1.0)).iloc[0]
    assert (row["p"], row["verdict"], row["delta"]) == (1, "no difference", 1)
    assert np.isnan(row["ci_low"])


def test_compare_runs_is_seeded_and_pairs_questions_in_any_order():
    base, tuned = make_runs(np.random.default_rng(1), 50, ["rouge1"], [0, 0.1])
    table = statistics.compare_runs(base, tuned, n_resamples=500)
    pd.testing.assert_frame_equal(
        table, statistics.compare_runs(base, tuned.sample(frac=1, random_state=3), n_resamples=500)
    )
    assert not table.equals(statistics.compare_runs(base, tuned, n_resamples=500, seed=1))


def test_compare_runs_rejects_other_questions():
    frame = make_frame({"rouge1": np.zeros(4)})
    with pytest.raises(ValueError, match="4 and 3 rows, 3 in common"):
        statistics.compare_runs(frame, frame.iloc[:3])


def test_compare_runs_rejects_missing_metric():
    frame = make_frame({"rouge1": np.zeros(4)})
    with pytest.raises(ValueError, match=r"\['bertscore_f1'\]; they share \['rouge1'\]"):
        statistics.compare_runs(frame, frame, ["bertscore_f1", "rouge1"])


def test_compare_many_corrects_over_all_runs():
    base, *runs = make_runs(np.random.default_rng(2), 80, ["rouge1", "smog"], [0, 0.4, 0.5])
    table = statistics.compare_many(base, dict(zip("ab", runs, strict=True)), n_resamples=2000)
    assert list(table["run"]) == ["a", "a", "b", "b"]
    np.testing.assert_allclose(table["p_holm"], statistics.adjust_holm(table["p"]))
    assert set(table["family"]) == {4}
    single = statistics.compare_runs(base, runs[0], n_resamples=2000)
    np.testing.assert_allclose(table["p"][:2], single["p"])
    assert (table["p_holm"][:2].to_numpy() > single["p_holm"].to_numpy()).any()


def test_compare_pairs_measures_the_second_against_the_first():
    base, first = make_runs(np.random.default_rng(8), 60, ["rouge1"], [0, 0.3])
    second = first.assign(rouge1=first["rouge1"] + 0.6)
    table = statistics.compare_pairs(
        {"base": base, "a": first, "b": second}, [("a", "b"), ("b", "a")], n_resamples=2000
    )
    assert list(table["pair"]) == ["a -> b", "b -> a"]
    assert table["delta"].tolist() == pytest.approx([0.6, -0.6])
    assert table["base"][0] == pytest.approx(first["rouge1"].mean())
    assert list(table["verdict"]) == ["better", "worse"]
    np.testing.assert_allclose(table["p_holm"], statistics.adjust_holm(table["p"]))


def test_compare_many_rejects_no_runs():
    with pytest.raises(ValueError, match="nothing to compare"):
        statistics.compare_many(make_frame({"rouge1": np.zeros(4)}), {})


def test_compare_slices_by_kind_overlap_source_and_length():
    rng = np.random.default_rng(4)
    kind = ["free"] * 40 + ["mcq"] * 20
    base = make_frame({"rouge1": rng.random(60)}).assign(
        kind=kind,
        train_overlap=[0.0] * 30 + [0.1] * 30,
        source=["medquad"] * 30 + ["afrimedqa"] * 30,
        reference_words=[50] * 10 + [51] * 10 + [150] * 10 + [151] * 10 + [1] * 20,
    )
    gain = np.array([0.2] * 30 + [0.0] * 10 + [0.5] * 20)
    tuned = base.assign(rouge1=base["rouge1"] + gain)
    table = statistics.compare_slices(base, tuned, ["rouge1"]).set_index("slice")
    expected = {
        "free questions": (40, 0.15, "better"),
        "no text of train": (30, 0.2, "better"),
        "some text of train": (10, 0, "no difference"),  # of the free ones, as below
        "afrimedqa": (10, 0, "no difference"),
        "medquad": (30, 0.2, "better"),
        "up to 50 words": (10, 0.2, "better"),
        "51 to 150 words": (20, 0.2, "better"),
        "over 150 words": (10, 0, "no difference"),
    }
    assert list(table.index) == list(expected)
    assert table["n"].tolist() == [n for n, _, _ in expected.values()]
    assert table["delta"].tolist() == pytest.approx([delta for _, delta, _ in expected.values()])
    assert table["verdict"].tolist() == [verdict for _, _, verdict in expected.values()]
    seeds = statistics.compare_slices([base, base], [tuned, tuned.sample(frac=1, random_state=1)], ["rouge1"])
    assert seeds["delta"].tolist() == pytest.approx(table["delta"].tolist())


def test_adjust_holm_by_hand():
    # Sorted .01 .02 .03 .2 times 4 3 2 1 = .04 .06 .06 .2; the third may not fall below the second.
    np.testing.assert_allclose(statistics.adjust_holm([0.2, 0.01, 0.03, 0.02]), [0.2, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(statistics.adjust_holm([0.9, 0.6]), [1.0, 1.0])
    rows = pd.Series([0.2, 0.01, 0.03, 0.02], index=[1, 0, 1, 0])  # of a table whose rows were joined
    np.testing.assert_allclose(statistics.adjust_holm(rows), [0.2, 0.04, 0.06, 0.06])


@pytest.mark.parametrize(
    ("p", "text"), [(0.0, "< 0.0001"), (0.00012, "0.0001"), (0.0096, "0.010"), (0.5, "0.500"), (1, "1.000")]
)
def test_format_p_never_says_zero(p, text):
    assert statistics.format_p(p) == text


def test_compare_many_can_still_tell_differences_among_many_runs():
    """With 2 / 501 as the smallest p, Holm's correction over 30 tests would leave nothing below 0.05."""
    base, tuned = make_runs(np.random.default_rng(4), 30, ["rouge1", "rouge2", "smog"], [0, 3])
    table = statistics.compare_many(base, {f"run {i}": tuned for i in range(10)}, n_resamples=500)
    assert set(table["verdict"]) == {"better", "higher"}
