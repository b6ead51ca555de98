"""DataFrame -> Figure whose title states the finding. Okabe-Ito colours, a white page, units on every axis.

A figure is returned closed, so a notebook shows it once: as the last expression of its cell.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from medqa_lib.config import EXPERIMENTS, POLICIES, home_dir
from medqa_lib.evaluation.tables import format_number, label

# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, SKY, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY = "#666666"
POLICY_COLORS = {"preshifted": VERMILION, "aligned": BLUE}
LINES = {"exp_002": "--", "exp_003": "-.", "exp_005": "--"}
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "text.color": "black", "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10,
    "legend.fontsize": 9, "figure.titleweight": "bold", "figure.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD", "axes.axisbelow": True,
}
ACROSS = STYLE | {"axes.grid.axis": "x"}


def save_figure(figure: Figure, name: str, about: str = "", folder: Path | None = None) -> Path:
    """Write FOLDER/NAME.png (by default `figures` in the home folder) and return its path.

    Args:
        about: what was measured on what (`results.describe_origin`); it is added to the caption.
    """
    if about:
        finish(figure, f"{figure.get_supxlabel()}\n{about}".strip())
    path = Path(folder or home_dir() / "figures") / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def finish(figure: Figure, caption: str, title: str = "") -> Figure:
    """Put the title above and the caption below, and close the figure."""
    if title:
        figure.suptitle(textwrap.fill(title, 85), x=0.01, ha="left")
    lines = "\n".join(textwrap.fill(line, 150) for line in caption.split("\n"))
    figure.supxlabel(lines, fontsize=8.5, color="#333333", x=0.01, ha="left")
    plt.close(figure)
    return figure


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
def plot_funnel(funnel: pd.DataFrame) -> Figure:
    """Rows removed by the five largest cleaning steps and by all others together.

    Args:
        funnel: step, rows, removed; one row per step in order, the raw rows first.
    """
    removed = funnel.set_index("step")["removed"].loc[lambda rows: rows > 0].sort_values(ascending=False)
    bars = removed[:5].to_dict()
    if len(removed) > 5:
        bars[f"{len(removed) - 5} other steps"] = removed[5:].sum()
    figure, panel = plt.subplots(figsize=(9, 1.4 + 0.32 * len(bars)))
    panel.bar_label(panel.barh(list(bars), list(bars.values()), color=ORANGE), fmt="{:,.0f}", padding=4)
    panel.invert_yaxis()
    panel.set(xlabel="Rows removed")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    share = removed[:3].sum() / max(removed.sum(), 1)
    title = (f"{funnel['rows'].iloc[-1]:,} of {funnel['rows'].iloc[0]:,} rows are kept; "
             f"{min(3, len(removed))} steps remove {share:.0%} of the rest")
    return finish(figure, "Steps that only change rows are not drawn.", title)


@plt.rc_context(STYLE)
def plot_lengths(lengths: pd.DataFrame, limit_tokens: int) -> Figure:
    """Histogram of example lengths, a panel per source, with the length at which training cuts.

    Args:
        lengths: source and tokens (prompt, answer and EOS), one row per pair.
    """
    sources = lengths.groupby("source", sort=False)["tokens"]
    figure, panels = plt.subplots(1, len(sources), figsize=(9, 3.4), sharex=True, squeeze=False)
    ticks = [64, 128, 256, 512, 1024]
    for panel, (source, tokens) in zip(panels[0], sources, strict=True):
        sns.histplot(tokens, ax=panel, bins=40, log_scale=True, color=BLUE, alpha=1)
        panel.axvline(limit_tokens, color=VERMILION, linestyle="--")
        panel.minorticks_off()
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.set(xlabel="Tokens (log scale)", ylabel="Pairs")
        panel.set_title(f"{label(source)}: {len(tokens):,} pairs, median {tokens.median():.0f}, "
                        f"{(tokens > limit_tokens).mean():.1%} longer")
    caption = f"Prompt, answer and EOS together. Dashed: the limit of {limit_tokens} tokens in training."
    share = (lengths["tokens"] > limit_tokens).mean()
    return finish(figure, caption, f"{share:.1%} of the pairs are longer than {limit_tokens} tokens")


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


def color_run(run: str) -> str:
    """By labels: blue where they are correct, vermilion where shifted twice, green for other policies."""
    policy = EXPERIMENTS[run].label_policy if run in EXPERIMENTS else run
    return POLICY_COLORS.get(policy, GREEN if policy in POLICIES else GREY)


def _label_ends(panel, ends: dict[str, tuple[float, float]]) -> None:
    """Write each run's name at the end of its line; names that would touch move up."""
    gap, height = 0.06 * np.subtract(*panel.get_ylim()[::-1]), -np.inf
    for run, (step, loss) in sorted(ends.items(), key=lambda end: end[1][1]):
        height = max(loss, height + gap)
        panel.annotate(f" {label(run)}", (step, height), va="bottom" if run == "base" else "center",
                       fontsize=9, color=color_run(run))


def describe_n(sizes: pd.Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return f"n = {low:,} test questions" if low == high else f"n = {low:,} to {high:,} test questions"
