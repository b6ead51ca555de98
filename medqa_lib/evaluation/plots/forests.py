"""Changes with their intervals, as forest plots: of runs, of label policies, by source and length."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medqa_lib.evaluation.plots.style import ACROSS, BLUE, color_run, describe_n, finish
from medqa_lib.evaluation.tables import label

SHARED_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "token_f1", "bertscore_f1")


@plt.rc_context(ACROSS)
def plot_changes(comparison: pd.DataFrame, metrics: Sequence[str] = SHARED_METRICS,
                 reported: dict[str, dict[str, float]] | None = None) -> Figure:
    """Changes against the untuned model: a row per metric, a panel per run, one common axis.

    Args:
        comparison: `significance.compare_many`'s table, or `compare_runs`' with a column `run`.
        reported: run -> metric -> change in percent of somebody else's runs, drawn as crosses.
    """
    shown = comparison[comparison["metric"].isin(metrics)]
    figure, panels = _plot_forests(shown, "run", "metric", "percent", sharex=True)
    rows = list(dict.fromkeys(shown["metric"]))
    for run, panel in panels.items():
        panel.set_title(label(run) if len(panels) > 1 else "")
        theirs = {name: value for name, value in (reported or {}).get(run, {}).items() if name in rows}
        panel.plot(theirs.values(), list(map(rows.index, theirs)), "x", color="black", ms=8, mew=2)
    verdicts = shown.groupby("run", sort=False)["verdict"].unique()
    alike = {word: ", ".join(label(run) for run in panels if list(verdicts[run]) == [word])
             for word in ("worse", "better")}
    title = "; ".join(f"{word} in every metric: {runs}" for word, runs in alike.items() if runs)
    title = title or "no run is better or worse in every metric"
    caption = describe_n(comparison["n"]) + ". " + _describe_marks(comparison)
    if reported:
        caption += " Cross: the original report, on its own model, data and split."
    return finish(figure, caption, title[0].upper() + title[1:])


@plt.rc_context(ACROSS)
def plot_ablation(comparison: pd.DataFrame, reported: dict[str, float]) -> Figure:
    """Changes of label policies against the untuned model, a panel per metric; a report's as dashed lines.

    Args:
        comparison: `significance.compare_many`'s table; its runs are label policies.
        reported: metric -> the report's change in percent.
    """
    shown = comparison[comparison["metric"].isin(reported)]
    figure, panels = _plot_forests(shown, "metric", "run", "percent")
    for metric, panel in panels.items():
        panel.axvline(reported[metric], color="black", linestyle="--")
        panel.set_title(f"{label(metric)}\nreport {reported[metric]:+g}%")
    holds = shown["metric"].map(reported).between(shown["percent_low"], shown["percent_high"])
    holds = holds.groupby(shown["run"], sort=False).all()
    kept = [label(policy) for policy in holds.index[holds]]
    caption = f"Dashed: the original report. {describe_n(shown['n'])}. {_describe_marks(comparison)}"
    return finish(figure, caption, f"In agreement with the report in every metric: {', '.join(kept)}" if kept
                  else "No label policy reproduces the report")


@plt.rc_context(ACROSS)
def plot_slices(slices: pd.DataFrame, run: str) -> Figure:
    """A run's gain over the untuned model by source and by length of the reference, a panel per metric.

    Args:
        slices: `significance.compare_slices`' table.
    """
    shown = slices.assign(slice=[f"{label(row.slice)} (n = {row.n:,})" for row in slices.itertuples()])
    figure, panels = _plot_forests(shown, "metric", "slice", "ci")
    first = next(iter(panels))
    best = slices.loc[slices.loc[slices["metric"] == first, "delta"].idxmax()]
    title = f"{label(run)} gains most {label(first)} on {label(best['slice'])}: {best['delta']:+.3f}"
    return finish(figure, _describe_marks(slices), title)


def _plot_forests(table: pd.DataFrame, panels_by: str, rows_by: str, kind: str, sharex: bool = False):
    """Values with intervals: a panel per value of one column, a row per value of another.

    Args:
        kind: "percent", relative changes, or "ci", differences.
    Returns:
        The figure and {value of `panels_by`: panel}.
    """
    value, text = ("percent_change", "{:+.0f}%") if kind == "percent" else ("delta", "{:+.3f}")
    names, rows = list(dict.fromkeys(table[panels_by])), list(dict.fromkeys(table[rows_by]))
    figure, axes = plt.subplots(1, len(names), figsize=(9.5, 1.7 + 0.42 * len(rows)), sharex=sharex,
                                sharey=True, squeeze=False)
    for name, panel in zip(names, axes[0], strict=True):
        color = color_run(name) if panels_by == "run" else BLUE
        panel.axvline(0, color="black", linewidth=1)
        for row in table[table[panels_by] == name].to_dict("records"):
            place, face = rows.index(row[rows_by]), "white" if row["verdict"] == "no difference" else color
            panel.plot([row[f"{kind}_low"], row[f"{kind}_high"]], [place, place], color=color, linewidth=2)
            panel.plot(row[value], place, "o", color=color, markersize=6, markerfacecolor=face)
            if np.isfinite(row[value]):
                panel.annotate(text.format(row[value]), (row[value], place), xytext=(0, 6),
                               textcoords="offset points", ha="center", fontsize=8.5,
                               bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3})
        panel.set(title=label(name), xlabel="Change (%)" if kind == "percent" else "Difference to untuned",
                  ylim=(len(rows) - 0.5, -0.7))
        panel.margins(x=0.15)
    axes[0, 0].set_yticks(range(len(rows)), map(label, rows))
    return figure, dict(zip(names, axes[0], strict=True))


def _describe_marks(comparison: pd.DataFrame) -> str:
    return ("Bars: 95% bootstrap interval. Filled: p < 0.05 after Holm's correction over "
            f"{comparison['family'].max()} comparisons; hollow: no difference.")
