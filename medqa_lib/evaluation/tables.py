"""Tables for a page of 980 pixels: at most seven columns, the verdict among them, three digits."""

import numpy as np
import pandas as pd

from medqa_lib.evaluation.reported import REPORTED
from medqa_lib.evaluation.results import RunResult
from medqa_lib.evaluation.significance import PERCENT, compare_runs, format_p
from medqa_lib.metrics import METRICS

POLICY_LABELS = {"aligned": "correct", "preshifted": "shifted twice", "full_sequence": "prompt too",
                 "padding_supervised": "padding too", "no_eos": "without EOS"}
# What metrics, runs, label policies and sources are called in tables and figures.
LABELS = {name: label for name, (label, _) in METRICS.items()} | POLICY_LABELS | {
    "validation_loss": "Validation loss (nats / token)", "perplexity": "Perplexity", "base": "untuned",
    "base_without_nf4": "untuned, without NF4", "base_random": "untuned, random split",
    "baseline_untuned_cut": "untuned, cut to length",
    "baseline_chat_template_without_nf4": "untuned, chat template, without NF4",
    "baseline_chat_template": "untuned, chat template", "baseline_nearest_answer": "nearest training answer",
    "baseline_few_shot": "untuned, three examples", "baseline_one_shot": "untuned, nearest example",
    "baseline_few_shot_without_nf4": "untuned, three examples, without NF4",
    "baseline_shuffled_reference": "another disease's reference", "baseline_random_option": "random option",
    "exp_004_one_shot": "exp_004, nearest example", "exp_005_one_shot": "exp_005, nearest example",
    "exp_005_asked_nearest": "exp_005, passages when asked", "exp_006_asked_none": "exp_006, asked without",
    "exp_006_asked_random": "exp_006, random when asked", "exp_005_asked_none": "exp_005",
    "exp_006_random_passages": "exp_006, random in both", "exp_004_without_nf4": "exp_004, without NF4",
    "exp_005_without_nf4": "exp_005, without NF4", "medquad": "MedQuAD", "afrimedqa": "AfriMed-QA",
    "medqa": "MedQA"}
EXPECTED = {"aligned": "better", "preshifted": "worse"}
SUMMARY = ("validation_loss", "perplexity", "rouge2", "rougeL", "bleu", "token_f1", "bertscore_f1")


def label(name: str) -> str:
    """What a name of the code is called in tables and figures: `base` is "untuned", `rouge2` "ROUGE-2 F1"."""
    return LABELS.get(name, name)


def format_number(value: float) -> str:
    """Three significant digits, "-" for none: 0.104, 3.56, 1,747."""
    if pd.isna(value):
        return "-"
    digits = 3 if value == 0 else max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{min(digits, 5)}f}"


def format_change(row) -> str:
    """The relative change with its 95% interval: "+76.7% [+62.5, +91.8]"; "-" where the base is about 0."""
    if pd.isna(row.percent_change):
        return "-"
    interval = "" if pd.isna(row.percent_low) else f" [{row.percent_low:+.1f}, {row.percent_high:+.1f}]"
    return f"{row.percent_change:+.1f}%{interval}"


def results_table(comparison: pd.DataFrame, first: str = "untuned", second: str = "tuned") -> pd.DataFrame:
    """A table of `significance.compare_...` to be read: a row per metric, and per run, pair or slice.

    Args:
        first, second: what the two compared runs are called.
    """
    rows = [{"metric": label(row.metric), first: format_number(row.base), second: format_number(row.tuned),
             "change [95% interval]": format_change(row), "p (Holm)": format_p(row.p_holm),
             "verdict": row.verdict + ("" if pd.isna(row.family) else f" (Holm over {row.family:.0f})")}
            for row in comparison.itertuples()]
    table = pd.DataFrame(rows).set_index("metric")
    keys = [name for name in ("run", "pair", "slice") if name in comparison]
    if keys:
        named = comparison[keys[0]].map(lambda text: " -> ".join(map(label, text.split(" -> "))))
        table = table.set_index(named, append=True).swaplevel()
    return table


def pairs_table(comparison: pd.DataFrame) -> pd.DataFrame:
    """A row per pair of `significance.compare_pairs`, a column per metric: difference, interval, verdict."""
    cells = []
    for row in comparison.itertuples():
        difference, low, high = (f"{value:+.{2 if row.metric in PERCENT else 3}f}"
                                 for value in (row.delta, row.ci_low, row.ci_high))
        cells.append(f"{difference} " + ("" if pd.isna(row.ci_low) else f"[{low}, {high}] ") + row.verdict)
    pairs = comparison["pair"].map(lambda pair: " -> ".join(map(label, pair.split(" -> "))))
    table = comparison.assign(cell=cells, pair=pairs).pivot(index="pair", columns="metric", values="cell")
    table = table.loc[pairs.unique(), comparison["metric"].unique()]
    return table.rename(columns=label).rename_axis(index=None, columns=None)


def summary_table(runs: dict[str, RunResult]) -> pd.DataFrame:
    """One row per run, one column per metric, as numbers. A metric that no run has is left out."""
    table = pd.DataFrame({label(name): run.metrics for name, run in runs.items()}, SUMMARY).T
    return table.astype(float).dropna(axis=1, how="all")


def expectation_table(run: RunResult, base: RunResult) -> pd.DataFrame:
    """Expected, found, and what the original report says of the run of this name: a row per metric."""
    reported = REPORTED.get(run.name, {})
    expected = EXPECTED.get(run.config["identity"]["experiment"]["label_policy"], "-")
    names = [name for name in METRICS if name in {"rouge2", "bleu", *reported} and name in run.metrics]
    before, after = (each.metrics["validation_loss"] for each in (base, run))
    loss = {"metric": "validation_loss", "base": before, "tuned": after, "percent_low": np.nan,
            "percent_change": 100 * (after / before - 1), "verdict": "better" if after < before else "worse"}
    comparison = compare_runs(base.scores, run.scores, names)
    comparison = pd.concat([pd.DataFrame([loss]), comparison])
    table = results_table(comparison).drop(columns="p (Holm)").rename(columns={"verdict": "found"})
    table.insert(3, "expected", expected)
    return table.assign(**{"original report": [f"{reported[name]:+g}%" if name in reported else "-"
                                               for name in comparison["metric"]]})
