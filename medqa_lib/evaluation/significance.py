"""Is a difference between two runs more than luck? Paired bootstrap over test questions, Welch's test over seeds, Holm's correction.

Questions about one disease share answers, so whole groups are resampled, not questions. Both runs answer the same
questions, so both get the same resample and only their difference is judged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medqa_lib.metrics import METRICS, columns_of, evaluate_sums

ALPHA = 0.05
DIRECTIONS = {"validation_loss": -1} | {name: direction for name, (_, direction) in METRICS.items()}  # 1: higher is better
FEWEST_GROUPS = 5  # effective ones; with fewer the interval left 0 out in 16% to 49% of 150 simulated pairs without a difference
CHUNK = 500  # resamples at a time: 500 x 1,800 groups take 7 MB
LENGTH_EDGES = (0, 50, 100, 200, np.inf)
LENGTH_LABELS = ("under 50 words", "50-99 words", "100-199 words", "200 words or more")


def compare_runs(base_scores: pd.DataFrame, tuned_scores: pd.DataFrame, metrics: Sequence[str] | None = None,
                 n_resamples: int = 50_000, seed: int = 42) -> pd.DataFrame:
    """Every metric of a run against the base run on the same questions.

    The interval is the percentile interval of the paired difference, its levels expanded for a small number of groups
    as a t interval is (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). Groups of unequal size count as
    Kish's effective number of equal ones; below FEWEST_GROUPS of them there is no interval and p is 1. p is two-sided and
    inverts that interval: twice the share of resamples on the other side of 0, so it is below 0.05 where the interval leaves
    0 out. If no resample is there, their standard deviation tells how far off 0 is. p is at least 2 / (n_resamples + 1).
    `percent_change` is 100 * delta / |base| and has an interval of its own.

    Args:
        base_scores, tuned_scores: rows of `metrics.score_answers` with `question_id` and `group`.
        metrics: names out of METRICS; None takes all that both frames have.
    Returns:
        One row a metric: metric, base, tuned, delta, percent_change, ci_low, ci_high, percent_low, percent_high, p, p_holm,
        verdict ("better", "worse" or "no difference"; "higher" or "lower" for metrics that only describe), n, groups.
    Raises:
        ValueError: the frames hold different questions, a metric is not in both, or a score is no number.
    """
    tuned_scores = _align_questions(base_scores, tuned_scores)
    metrics = _choose_metrics(base_scores, tuned_scores, metrics)
    codes, groups = pd.factorize(base_scores["group"])
    columns = [column for name in metrics for column in columns_of(name)]
    for scores in (base_scores, tuned_scores):
        if missing := [column for column in dict.fromkeys(columns) if scores[column].isna().any()]:
            raise ValueError(f"Some answers have no score in {', '.join(missing)}; expected a number for each. Score the run again.")
    values = np.hstack([base_scores[columns], tuned_scores[columns], np.ones((len(codes), 1))]).astype(float)
    sums = np.zeros((len(groups), values.shape[1]))
    np.add.at(sums, codes, values)
    sums = np.vstack([sums.sum(axis=0), _resample_sums(sums, n_resamples, seed)])  # the observed data first
    effective_groups = len(codes) ** 2 / (np.bincount(codes) ** 2).sum()  # Kish: fewer than there are, where sizes differ
    base_sums, tuned_sums, examples = np.split(sums, [len(columns), 2 * len(columns)], axis=1)
    rows = []
    for name in metrics:
        spots = [columns.index(column) for column in columns_of(name)]
        base, tuned = (evaluate_sums(name, run_sums[:, spots], examples[:, 0]) for run_sums in (base_sums, tuned_sums))
        rows.append({"metric": name, **_judge(base, tuned, effective_groups), "n": len(codes), "groups": len(groups)})
    return _correct_holm(pd.DataFrame(rows))


def compare_many(base_scores: pd.DataFrame, runs: dict[str, pd.DataFrame], metrics: Sequence[str] | None = None,
                 n_resamples: int = 50_000, seed: int = 42) -> pd.DataFrame:
    """`compare_runs` for several runs, with a column `run` in front and Holm's correction over all metrics of all runs.

    Many tests need fine p-values: there are at least 10 / ALPHA resamples a test, so that p_holm can fall to ALPHA / 5.
    """
    return _compare_all("run", {name: (base_scores, scores) for name, scores in runs.items()}, metrics, n_resamples, seed)


def compare_pairs(runs: dict[str, pd.DataFrame], pairs: Sequence[tuple[str, str]], metrics: Sequence[str] | None = None,
                  n_resamples: int = 50_000, seed: int = 42) -> pd.DataFrame:
    """`compare_runs` of the second run of each pair against the first; a column `pair` in front, Holm over all. `base` is the first."""
    named = {f"{first} -> {second}": (runs[first], runs[second]) for first, second in pairs}
    return _compare_all("pair", named, metrics, n_resamples, seed)


def compare_slices(base_scores: pd.DataFrame, tuned_scores: pd.DataFrame, metrics: Sequence[str] | None = None,
                   n_resamples: int = 50_000, seed: int = 42) -> pd.DataFrame:
    """`compare_runs` within each source and each length of the reference answer; a column `slice` in front, Holm over all."""
    tuned_scores = _align_questions(base_scores, tuned_scores)
    lengths = pd.cut(base_scores["reference_words"], LENGTH_EDGES, right=False, labels=LENGTH_LABELS)
    masks = {name: base_scores["source"] == name for name in sorted(base_scores["source"].unique())}
    masks |= {name: lengths == name for name in LENGTH_LABELS}
    named = {name: (base_scores[mask.to_numpy()], tuned_scores[mask.to_numpy()]) for name, mask in masks.items() if mask.any()}
    return _compare_all("slice", named, metrics, n_resamples, seed)


def compare_seeds(recipes: dict[str, Sequence[dict]], pairs: Sequence[tuple[str, str]], metrics: Sequence[str]) -> pd.DataFrame:
    """Two recipes that were each trained with several seeds: Welch's t test on the runs' scores, Holm over all.

    `compare_runs` says whether other test questions would change the verdict, this whether other seeds would.

    Args:
        recipes: name -> the `metrics` of one run a seed.
        pairs: (first, second), names out of `recipes`.
        metrics: names out of METRICS, or "validation_loss".
    Returns:
        One row a pair and metric: pair, metric, first, first_sd, second, second_sd, delta, ci_low, ci_high, seeds, p, p_holm, verdict.
    Raises:
        ValueError: a recipe has fewer than two seeds, so there is no spread to judge by.
    """
    from scipy.stats import ttest_ind

    if single := [name for name in dict.fromkeys(name for pair in pairs for name in pair) if len(recipes[name]) < 2]:
        raise ValueError(f"{', '.join(single)}: one seed each; expected at least 2. Train the runs named ..._seed43 and ..._seed44.")
    rows = []
    for pair, metric in [(pair, metric) for pair in pairs for metric in metrics]:
        first, second = ([run[metric] for run in recipes[name]] for name in pair)
        test = ttest_ind(second, first, equal_var=False)
        low, high = test.confidence_interval(1 - ALPHA)
        rows.append({"pair": " -> ".join(pair), "metric": metric, "first": np.mean(first), "first_sd": np.std(first, ddof=1),
                     "second": np.mean(second), "second_sd": np.std(second, ddof=1), "delta": np.mean(second) - np.mean(first),
                     "ci_low": low, "ci_high": high, "seeds": f"{len(first)} and {len(second)}",
                     "p": np.nan_to_num(test.pvalue, nan=1.0)})  # no spread and no difference
    return _correct_holm(pd.DataFrame(rows))


def adjust_holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm (1979): the k-th smallest of m p-values times m - k + 1, made monotone, at most 1.

    Example:
        >>> adjust_holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def _compare_all(column: str, named: dict[str, tuple[pd.DataFrame, pd.DataFrame]], metrics: Sequence[str] | None,
                 n_resamples: int, seed: int) -> pd.DataFrame:
    """The tables of several comparisons in one, their names in `column`, corrected together."""
    tests = sum(len(_choose_metrics(base, tuned, metrics)) for base, tuned in named.values())
    n_resamples, tables = max(n_resamples, round(10 * tests / ALPHA)), []
    for name, (base, tuned) in named.items():
        table = compare_runs(base, tuned, metrics, n_resamples, seed)
        table.insert(0, column, name)
        tables.append(table)
    if not tables:
        raise ValueError("There is nothing to compare: give at least one run beside the base.")
    return _correct_holm(pd.concat(tables, ignore_index=True))


def _align_questions(base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """The tuned run's rows in the base run's order."""
    ids, tuned_ids = list(base["question_id"]), list(tuned["question_id"])
    if ids == tuned_ids:
        return tuned
    if sorted(ids) != sorted(tuned_ids) or len(set(ids)) < len(ids):
        raise ValueError(f"The runs answered different questions: {len(ids)} and {len(tuned_ids)} rows, {len(set(ids) & set(tuned_ids))} "
                         "questions in common. Evaluate both with the same split and the same number of test questions.")
    return tuned.set_index("question_id").loc[ids].reset_index()


def _choose_metrics(base: pd.DataFrame, tuned: pd.DataFrame, metrics: Sequence[str] | None) -> list[str]:
    both = {*base.columns} & {*tuned.columns}
    present = [name for name in METRICS if {*columns_of(name)} <= both]
    missing = [name for name in metrics or () if name not in present]
    if missing or not present:
        raise ValueError(f"Both runs must have the metrics {missing or list(METRICS)}; they share {present}. "
                         "Score both with the same settings.")
    return list(metrics or present)


def _resample_sums(sums: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """(R, K) column sums over G groups drawn with replacement, for sums (G, K) of the groups."""
    rng = np.random.default_rng(seed)
    groups = len(sums)
    parts = []
    for start in range(0, n_resamples, CHUNK):
        size = min(CHUNK, n_resamples - start)
        drawn = rng.integers(groups, size=(size, groups)) + np.arange(size)[:, None] * groups
        weights = np.bincount(drawn.ravel(), minlength=size * groups).reshape(size, groups)
        parts.append(weights.astype(float) @ sums)
    return np.vstack(parts)


def _judge(base: np.ndarray, tuned: np.ndarray, groups: float) -> dict[str, float]:
    """Differences, intervals and p from (1 + R,) values, the observed ones first."""
    from scipy.stats import norm, t

    delta = tuned - base
    with np.errstate(divide="ignore", invalid="ignore"):
        percent = 100 * delta / np.abs(base)
    percent[~np.isfinite(percent)] = np.nan
    found = {"base": base[0], "tuned": tuned[0], "delta": delta[0], "percent_change": percent[0]}
    if groups < FEWEST_GROUPS:
        return found | dict.fromkeys(("ci_low", "ci_high", "percent_low", "percent_high"), np.nan) | {"p": 1.0}
    expansion = np.sqrt(groups / (groups - 1))
    level = norm.cdf(expansion * t.ppf(ALPHA / 2, groups - 1))
    found["ci_low"], found["ci_high"] = np.quantile(delta[1:], [level, 1 - level])
    found["percent_low"], found["percent_high"] = np.quantile(percent[1:], [level, 1 - level])
    beyond = min((delta[1:] <= 0).sum(), (delta[1:] >= 0).sum())
    score = norm.ppf((1 + beyond) / len(delta))
    if beyond == 0:  # past what resampling can resolve: the tail of a normal curve with the resamples' spread
        score = min(score, -abs(delta[0]) / max(delta[1:].std(), 1e-12))
    return found | {"p": np.clip(2 * t.cdf(score / expansion, groups - 1), 2 / len(delta), 1)}


def _correct_holm(table: pd.DataFrame) -> pd.DataFrame:
    """Fill p_holm and verdict over the whole table."""
    table["p_holm"] = adjust_holm(table["p"])
    words = {1: ("better", "worse"), -1: ("worse", "better"), 0: ("higher", "lower")}
    up, down = zip(*(words[DIRECTIONS[name]] for name in table["metric"]), strict=True)
    table["verdict"] = np.where(~(table["p_holm"] < ALPHA), "no difference", np.where(table["delta"] > 0, up, down))
    ends = [name for name in ("p", "p_holm", "verdict", "n", "groups") if name in table]
    return table[[*(column for column in table if column not in ends), *ends]]
