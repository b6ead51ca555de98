"""Runs: their losses, the policy table, their scores' distributions, the trials of a search."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from medqa_lib.evaluation.plots.style import (
    ACROSS,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    POLICY_COLORS,
    SKY,
    STYLE,
    VERMILION,
    color_run,
    describe_n,
    finish,
)
from medqa_lib.evaluation.tables import format_number, label

LINES = {"exp_002": "--", "exp_003": "-.", "exp_005": "--"}


@plt.rc_context(STYLE)
def plot_losses(losses: pd.DataFrame) -> Figure:
    """Training and validation loss of a few runs, labelled at the ends of the lines.

    Args:
        losses: rows of loss.csv (step, split, loss) with a column `run`; the untuned model is the run `base`.
    """
    base = losses.loc[losses["run"] == "base", "loss"]
    tuned = losses[losses["run"] != "base"].sort_values("step")
    same = tuned.loc[(tuned["split"] == "validation") & (tuned["step"] == 0), "loss"]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), sharex=True)
    below = []
    for panel, split in zip(panels, ("train", "validation"), strict=True):
        ends = {}
        for run, rows in tuned[tuned["split"] == split].groupby("run"):
            panel.plot(rows["step"], rows["loss"], color=color_run(run), linestyle=LINES.get(run, "-"))
            ends[run] = (rows["step"].iloc[-1], rows["loss"].iloc[-1])
        panel.set(xlabel="Optimiser step", ylabel="Loss (nats / token)", xlim=(0, 1.22 * tuned["step"].max()))
        if split == "validation" and len(base):
            untuned = [*same, *base][0]
            panel.axhline(untuned, color=GREY, linestyle=":")
            below = [run for run, (_, loss) in ends.items() if loss < untuned]
            ends["base"] = (tuned["step"].max(), untuned)
        _label_ends(panel, ends)
    panels[0].set_title("Training, on the run's labels")
    panels[1].set_title("Validation, always on correct labels")
    caption = ("Orange: labels shifted twice; blue: correct labels. Training loss: mean since the point "
               "before. Curves: on the first 400 validation pairs; dotted: the untuned model on "
               f"{'the same' if len(same) else 'all'} pairs.")
    title = f"Validation loss below the untuned model's: {' and '.join(below) or 'no run'}"
    return finish(figure, caption, title)


@plt.rc_context(STYLE | {"axes.grid": False})
def plot_policy_table(table: pd.DataFrame,
                      metrics: Sequence[str] = ("validation_loss", "rouge2", "bleu")) -> Figure:
    """Steps and learning rate (down) x labels (across); the colour says better or worse than untuned.

    Args:
        table: a row per run with max_steps, learning_rate, label_policy, n_test and the metrics; the index
            holds run names, `base` among them.
    """
    runs = table[table["label_policy"].isin(POLICY_COLORS)].astype({"max_steps": int})
    runs["setting"] = [f"{row.max_steps} steps, {row.learning_rate:.0e}".replace("e-0", "e-")
                       for row in runs.itertuples()]
    settings = runs["setting"].unique()
    policies = [name for name in POLICY_COLORS if name in set(runs["label_policy"])]
    metrics = [name for name in metrics if name in runs and runs[name].notna().any()]
    colors = LinearSegmentedColormap.from_list("verdict", [ORANGE, "white", SKY]).with_extremes(bad="#E5E5E5")
    figure, panels = plt.subplots(1, len(metrics), figsize=(3.1 * len(metrics), 1.9 + 0.6 * len(settings)),
                                  sharey=True, squeeze=False)
    for panel, metric in zip(panels[0], metrics, strict=True):
        cells = runs.pivot(index="setting", columns="label_policy", values=metric).astype(float)
        cells = cells.loc[settings, policies]
        base, sign = table.loc["base", metric], -1 if metric == "validation_loss" else 1
        sns.heatmap(sign * np.log2(np.maximum(cells, 1e-9) / max(base, 1e-9)), ax=panel, cmap=colors, vmin=-1,
                    vmax=1, cbar=False, linewidths=2, xticklabels=list(map(label, policies)))
        for (row, column), value in np.ndenumerate(cells):
            text = "not run" if np.isnan(value) else format_number(value)
            panel.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=11)
        panel.set(title=f"{label(metric)}\nuntuned {format_number(base)}", xlabel="Labels", ylabel="")
        panel.tick_params(length=0, rotation=0)
    panels[0, 0].set_ylabel("Steps, learning rate")
    caption = (f"{describe_n(table['n_test'])} per run. Blue: better than untuned; orange: worse; "
               "the deeper, the further (full colour: twice or half).")
    return finish(figure, caption, "Labels decide, not steps or learning rate")


@plt.rc_context(ACROSS)
def plot_score_distributions(scores: pd.DataFrame,
                             metrics: Sequence[str] = ("rougeL", "token_f1", "bertscore_f1", "words")):
    """Box plots over test questions, a row per run.

    Args:
        scores: rows of scores.csv with a column `run`.
    """
    metrics = [name for name in metrics if name in scores and scores[name].notna().any()]
    medians = scores.groupby("run", sort=False)[metrics[0]].median()
    colors = {run: color_run(run) for run in medians.index}
    figure, panels = plt.subplots(1, len(metrics), figsize=(9.5, 1.7 + 0.42 * len(medians)), sharey=True,
                                  squeeze=False)
    for panel, metric in zip(panels[0], metrics, strict=True):
        sns.boxplot(scores, x=metric, y="run", hue="run", palette=colors, ax=panel, whis=(5, 95), width=0.65,
                    showfliers=False, legend=False, boxprops={"alpha": 0.6},
                    medianprops={"color": "black", "linewidth": 2.5})
        panel.set(xlabel=label(metric), ylabel="")
    panels[0, 0].set_yticks(range(len(medians)), map(label, medians.index))
    title = f"Highest median {label(metrics[0])}: {label(medians.idxmax())}, {format_number(medians.max())}"
    if "base" in medians:
        title += f" (untuned {format_number(medians['base'])})"
    caption = f"{describe_n(scores.groupby('run').size())} per run. Thick line: median; box: quartiles; "
    return finish(figure, caption + "whiskers: 5th to 95th percentile.", title)


@plt.rc_context(ACROSS)
def plot_search(table: pd.DataFrame, noise: float = 0.002) -> Figure:
    """Validation loss of every trial of a search, sorted within its round; failed trials as text.

    Args:
        table: round, name, validation_loss, status, in any order.
        noise: half the width of the band around the best trial in which seeds alone decide.
    """
    table = table.sort_values(["round", "validation_loss"], ignore_index=True)
    best, marks = table["validation_loss"].min(), {1: ("o", BLUE), 2: ("s", VERMILION), 3: ("^", GREEN)}
    figure, panel = plt.subplots(figsize=(9, 1.4 + 0.27 * len(table)))
    panel.axvspan(best - noise, best + noise, color=SKY, alpha=0.4)
    for number, rows in table.groupby("round"):
        marker, color = marks[number]
        panel.plot(rows["validation_loss"], rows.index, marker, color=color, label=f"Round {number}")
    for place, row in table.iterrows():
        done = np.isfinite(row["validation_loss"])
        text = f"{row['validation_loss']:.3f}" if done else textwrap.shorten(row["status"], 70)
        panel.annotate(text, (row["validation_loss"] if done else 0.02, place), xytext=(7, 0), va="center",
                       textcoords="offset points", fontsize=9,
                       xycoords="data" if done else panel.get_yaxis_transform())
    panel.set_yticks(table.index, [name.replace("+", " + ") for name in table["name"]])
    panel.set(xlabel=label("validation_loss"), ylim=(len(table) - 0.4, -0.6))
    panel.margins(x=0.12)
    panel.legend()
    caption = ("Merged model, whole validation split, correct labels, one seed per trial. "
               f"Band: the best trial +- {noise}, which seeds alone give.")
    return finish(figure, caption, "Learning rate and adapted layers matter, the rest is noise")


def _label_ends(panel, ends: dict[str, tuple[float, float]]) -> None:
    """Write each run's name at the end of its line; names that would touch move up."""
    gap, height = 0.06 * np.subtract(*panel.get_ylim()[::-1]), -np.inf
    for run, (step, loss) in sorted(ends.items(), key=lambda end: end[1][1]):
        height = max(loss, height + gap)
        panel.annotate(f" {label(run)}", (step, height), va="bottom" if run == "base" else "center",
                       fontsize=9, color=color_run(run))
