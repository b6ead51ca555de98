"""Is a difference more than luck? Paired bootstrap over questions and seeds, and Holm's correction.

Questions about one disease share answers, so whole groups are resampled, not questions. All runs answer the
same questions, so all get the same resamples and only their differences are judged. A recipe is judged by
runs with several seeds: then a verdict covers other questions and other seeds together.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medqa_lib.metrics import METRICS, columns_of, count_rows, evaluate_sums

ALPHA = 0.05
DIRECTIONS = {"validation_loss": -1} | {name: direction for name, (_, direction) in METRICS.items()}
# Of two names for one question the second is tested.
SAME = dict.fromkeys(("words", "bleu_brevity_penalty"), "length_ratio")
PERCENT = dict.fromkeys(("bleu", "sentence_bleu", "chrf"), 100)  # their largest value
FEWEST_GROUPS = 5  # effective ones; with fewer 16% to 49% of 150 simulated null differences left 0 out
CHUNK = 500  # resamples at a time: 500 x 1,800 groups take 7 MB
LENGTHS = {"up to 50 words": (-1, 50), "51 to 150 words": (50, 150), "over 150 words": (150, np.inf)}
Scores = pd.DataFrame | Sequence[pd.DataFrame]  # of one run, or of one per seed


def compare_pairs(runs: dict[str, Scores], pairs: Sequence[tuple[str, str]],
                  metrics: Sequence[str] | None = None, n_resamples: int = 50_000, seed: int = 42):
    """The second run of each pair against the first, question by question, with Holm's correction over all.

    The interval is the percentile interval of the paired difference, widened for few groups as a t interval
    is (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). Groups of unequal size count as
    Kish's effective number of equal ones; below FEWEST_GROUPS there is no interval and p is 1. p is two-sided
    and inverts that interval: it is below 0.05 where the interval leaves 0 out. Of several seeds the mean is
    taken, and the seeds' spread is added (`_join_seeds`).

    Args:
        runs: run name -> rows of `metrics.score_answers` with `question_id` and `group`; of a recipe a list,
            one per seed. What has no seed, such as the untuned model, is one run.
        metrics: names out of METRICS; None takes all that both runs of a pair have. One question under two
            names (SAME) is asked once.
    Returns:
        One row per pair and metric: pair, metric, base, tuned (the first and the second run), delta,
        percent_change (of |base|; nan where the base is about 0), ci_low, ci_high, percent_low, percent_high,
        p, p_holm, family (how many rows are corrected together), verdict ("better", "worse" or "no
        difference"; "higher" or "lower" for metrics that only describe), n, groups, seeds ("1 and 3").
    Raises:
        ValueError: the runs answered different questions, or lack a metric or a score.
    """
    seeds = {name: _list_seeds(runs[name]) for pair in pairs for name in pair}
    tests = [(first, second, metric) for first, second in pairs
             for metric in _choose_metrics(seeds[first] + seeds[second], metrics)]
    if not tests:
        raise ValueError("There is nothing to compare: give at least one run beside the untuned model's.")
    base = seeds[pairs[0][0]][0]
    aligned = {(name, place): _align_questions(base, scores)
               for name in seeds for place, scores in enumerate(seeds[name])}
    codes = pd.factorize(base["group"])[0]
    needed = dict.fromkeys(((name, place), metric) for first, second, metric in tests
                           for name in (first, second) for place in range(len(seeds[name])))
    n_resamples = max(n_resamples, round(10 * len(tests) / ALPHA))  # so that p_holm can fall to ALPHA / 5
    values = _resample(aligned, list(needed), codes, n_resamples, seed)
    sizes = {metric: np.bincount(codes, count_rows(metric, base)) for _, _, metric in tests}
    return _correct_holm(pd.DataFrame([
        {"pair": f"{first} -> {second}", "metric": metric,
         **_judge(*_join_seeds(*([values[(name, place), metric] for place in range(len(seeds[name]))]
                                 for name in (first, second))), sizes[metric], PERCENT.get(metric, 1)),
         "n": int(sizes[metric].sum()), "groups": np.count_nonzero(sizes[metric]),
         "seeds": f"{len(seeds[first])} and {len(seeds[second])}"} for first, second, metric in tests]))


def compare_runs(base_scores: Scores, tuned_scores: Scores, metrics: Sequence[str] | None = None,
                 n_resamples: int = 50_000, seed: int = 42) -> pd.DataFrame:
    """`compare_pairs` of one run against another, without the column `pair`."""
    return compare_many(base_scores, {"tuned": tuned_scores}, metrics, n_resamples, seed).drop(columns="run")


def compare_many(base_scores: Scores, runs: dict[str, Scores],
                 metrics: Sequence[str] | None = None, n_resamples: int = 50_000, seed: int = 42):
    """`compare_pairs` of several runs against one, with a column `run` instead of `pair`."""
    table = compare_pairs({"": base_scores, **runs}, [("", run) for run in runs], metrics, n_resamples, seed)
    table["pair"] = table["pair"].str.removeprefix(" -> ")
    return table.rename(columns={"pair": "run"})


def compare_slices(base_scores: Scores, tuned_scores: Scores,
                   metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """`compare_runs` of free questions and parts of them (column `slice`); Holm over all."""
    about = _list_seeds(base_scores)[0]
    runs = [[_align_questions(about, scores) for scores in _list_seeds(each)]
            for each in (base_scores, tuned_scores)]
    words, overlap = about["reference_words"], about["train_overlap"]
    masks = {"free questions": about["kind"] == "free", "no text of train": overlap == 0,
             "some text of train": overlap > 0}
    masks |= {name: about["source"] == name for name in sorted(about["source"].unique())}
    masks |= {name: words.between(low, high, inclusive="right") for name, (low, high) in LENGTHS.items()}
    tables = {name: compare_runs(*([scores[mask.to_numpy()] for scores in each] for each in runs), metrics)
              for name, mask in masks.items() if mask.any()}
    return _correct_holm(pd.concat(tables, names=["slice"]).reset_index("slice").reset_index(drop=True))


def adjust_holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm (1979): the k-th smallest of m p-values times m - k + 1, made monotone, at most 1.

    Example:
        >>> adjust_holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p = pd.Series(np.asarray(p_values, float)).sort_values()
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1).sort_index().to_numpy()


def format_p(p: float) -> str:
    """A p-value with three decimals, with four below 0.001, and never "0.0000"."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def _align_questions(base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """The tuned run's rows in the base run's order."""
    ids, tuned_ids = list(base["question_id"]), list(tuned["question_id"])
    if sorted(ids) != sorted(tuned_ids):
        raise ValueError(f"The runs answered different questions: {len(ids)} and {len(tuned_ids)} rows, "
                         f"{len({*ids} & {*tuned_ids})} in common. Evaluate both on the same test questions.")
    return tuned if ids == tuned_ids else tuned.set_index("question_id").loc[ids].reset_index()


def _list_seeds(scores: Scores) -> list[pd.DataFrame]:
    return [scores] if isinstance(scores, pd.DataFrame) else list(scores)


def _choose_metrics(runs: list[pd.DataFrame], metrics: Sequence[str] | None) -> list[str]:
    shared = set.intersection(*(set(scores) for scores in runs))
    present = [name for name in METRICS if {*columns_of(name)} <= shared]
    wanted = present if metrics is None else metrics
    if missing := [name for name in wanted or METRICS if name not in present]:
        raise ValueError(f"Both runs must have the metrics {missing}; they share {present}. Score both.")
    return [name for name in wanted if SAME.get(name) not in wanted]


def _join_seeds(*recipes: list[np.ndarray]) -> list[np.ndarray]:
    """Two recipes' (1 + R,) values: their means over seeds, with what other seeds would have changed.

    That is drawn from Welch's t: each recipe's standard error over seeds times a normal number, and one chi
    for both with Welch and Satterthwaite's degrees of freedom (drawing three seeds of three would give short
    intervals). What other questions explain of the spread is left out: the resamples have it already.
    """
    means = [np.mean(values, axis=0) for values in recipes]
    freedom = np.array([max(1, len(values) - 1) for values in recipes])
    spreads = [values - mean for values, mean in zip(recipes, means, strict=True)]
    squares = np.array([(spread[:, 0] ** 2).sum() - spread[:, 1:].var(axis=1).sum() for spread in spreads])
    squares = squares.clip(min=0) / freedom / (freedom + 1)
    if squares.sum() > 0:
        rng, drawn = np.random.default_rng(42), len(means[0]) - 1
        freedom = squares.sum() ** 2 / (squares**2 / freedom).sum()
        stretch = np.sqrt(freedom / rng.chisquare(freedom, drawn))
        for mean, square in zip(means, squares, strict=True):
            mean[1:] += np.sqrt(square) * rng.normal(size=drawn) * stretch
    return means


def _resample(runs: dict, needed: list[tuple], codes: np.ndarray,
              n_resamples: int, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """(run, metric) -> (1 + R,) values: the observed one, then those of groups drawn with replacement.

    Args:
        codes: (N,) the group of each question, 0 to G - 1.
    """
    columns = {(run, column): runs[run][column].to_numpy(float) * count_rows(metric, runs[run])
               for run, metric in needed for column in columns_of(metric)}
    if missing := sorted({column for (_, column), values in columns.items() if np.isnan(values).any()}):
        raise ValueError(f"Some answers have no score in {', '.join(missing)}. Score the run again.")
    rows = count_rows("", runs[needed[0][0]])
    table = np.column_stack([*columns.values(), rows])
    sums = pd.DataFrame(table).groupby(codes).sum().to_numpy()  # (G, K + 1)
    groups, places = len(sums), {key: place for place, key in enumerate(columns)}
    rng, parts = np.random.default_rng(seed), [sums.sum(axis=0, keepdims=True)]  # the observed data first
    for start in range(0, n_resamples, CHUNK):
        size = min(CHUNK, n_resamples - start)
        drawn = rng.integers(groups, size=(size, groups)) + np.arange(size)[:, None] * groups
        weights = np.bincount(drawn.ravel(), minlength=size * groups).reshape(size, groups)
        parts.append(weights.astype(float) @ sums)
    totals = np.vstack(parts)
    return {(run, metric): evaluate_sums(
        metric, totals[:, [places[run, column] for column in columns_of(metric)]], totals[:, -1])
        for run, metric in needed}


def _judge(base: np.ndarray, tuned: np.ndarray, sizes: np.ndarray, scale: float) -> dict[str, float]:
    """Differences, intervals and p from (1 + R,) values, the observed ones first; no percentage of about 0.

    Args:
        sizes: (G,) how many questions each group has. Kish: where they differ, fewer groups are effective.
        scale: the metric's largest value.
    """
    from scipy.stats import norm, t

    delta = tuned - base
    with np.errstate(divide="ignore", invalid="ignore"):
        percent = 100 * delta / np.abs(base)
    percent[~np.isfinite(percent) | (np.abs(base[0]) < 1e-3 * scale)] = np.nan
    groups = sizes.sum() ** 2 / max(1, (sizes**2).sum())
    names, ends, p = ("ci_low", "ci_high", "percent_low", "percent_high"), [np.nan] * 4, 1.0
    if groups >= FEWEST_GROUPS:
        expansion = np.sqrt(groups / (groups - 1))
        level = norm.cdf(expansion * t.ppf(ALPHA / 2, groups - 1))
        ends = np.quantile([delta[1:], percent[1:]], [level, 1 - level], axis=1).T.ravel()
        beyond = min((delta[1:] <= 0).sum(), (delta[1:] >= 0).sum())
        score = norm.ppf((1 + beyond) / len(delta))
        if beyond == 0:  # past what resampling can resolve: the tail of a normal curve of the same spread
            score = min(score, -abs(delta[0]) / max(delta[1:].std(), 1e-12))
        p = np.clip(2 * t.cdf(score / expansion, groups - 1), 2 / len(delta), 1)
    found = {"base": base[0], "tuned": tuned[0], "delta": delta[0], "percent_change": percent[0]}
    return found | dict(zip(names, ends, strict=True)) | {"p": p, "p_holm": None, "family": 0, "verdict": ""}


def _correct_holm(table: pd.DataFrame) -> pd.DataFrame:
    """Fill p_holm, family and verdict over the whole table."""
    table["p_holm"], table["family"] = adjust_holm(table["p"]), len(table)
    words = {1: ("better", "worse"), -1: ("worse", "better"), 0: ("higher", "lower")}
    up, down = zip(*(words[DIRECTIONS[name]] for name in table["metric"]), strict=True)
    verdicts = np.where(table["delta"] > 0, up, down)
    table["verdict"] = np.where(table["p_holm"] < ALPHA, verdicts, "no difference")
    return table
