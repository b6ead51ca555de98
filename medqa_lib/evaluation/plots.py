"""DataFrame -> Figure whose title states the finding. Okabe-Ito colours on an opaque white page, units on every axis.

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

from medqa_lib.config import EXPERIMENTS, home_dir
from medqa_lib.evaluation.significance import SCALES
from medqa_lib.evaluation.tables import LABELS, POLICY_LABELS, SOURCE_LABELS, format_number, label_run

# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, SKY, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY = "#666666"
POLICY_COLORS = {"aligned": BLUE, "preshifted": VERMILION}
LINES = {"exp_002": "--", "exp_003": "-.", "exp_005": "--"}
SHARED_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "token_f1", "bertscore_f1")
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "text.color": "black",
    "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9,
    "figure.titleweight": "bold", "figure.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "axes.axisbelow": True,
}
ACROSS = STYLE | {"axes.grid.axis": "x"}


def save_figure(figure: Figure, name: str, about: str = "", folder: Path | None = None) -> Path:
    """Write FOLDER/NAME.png (by default `figures` in the home folder) and return its path.

    Args:
        about: what was measured on what (`results.describe_origin`); it is added to the caption, in the
            notebook too.
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
        figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=8.5, color="#333333", x=0.01, ha="left")
    plt.close(figure)
    return figure


def plot_losses(losses: pd.DataFrame) -> Figure:
    """Training and validation loss of a few runs, labelled at the ends of the lines.

    Args:
        losses: rows of loss.csv (step, split, loss) with a column `run`; the untuned model, `base`, is a
            level line.
    """
    base = losses.loc[losses["run"] == "base", "loss"]
    tuned = losses[losses["run"] != "base"].sort_values("step")
    same = tuned[(tuned["split"] == "validation") & (tuned["step"] == 0)]["loss"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), sharex=True)
        for panel, split in zip(panels, ("train", "validation"), strict=True):
            ends = {}
            for run, rows in tuned[tuned["split"] == split].groupby("run", sort=False):
                panel.plot(rows["step"], rows["loss"], color=_color_run(run), linestyle=LINES.get(run, "-"))
                ends[run] = (rows["step"].iloc[-1], rows["loss"].iloc[-1])
            panel.set(xlabel="Optimiser step", ylabel="Loss (nats / token)", xlim=(0, 1.22 * tuned["step"].max()))
            if split == "validation" and len(base):
                untuned = (same if len(same) else base).iloc[0]
                panel.axhline(untuned, color=GREY, linestyle=":")
                below = [run for run, (_, loss) in ends.items() if loss < untuned]
                ends["base"] = (tuned["step"].max(), untuned)
            _label_ends(panel, ends)
        panels[0].set_title("Training, on the run's labels")
        panels[1].set_title("Validation, always on correct labels")
        caption = ("Orange: labels shifted twice; blue: correct labels. Training loss: mean since the point before. Curves: of the "
                   "first 400 validation\npairs; dotted: the untuned model on " + ("the same pairs." if len(same) else "all pairs."))
        title = f"Validation loss below the untuned model's: {' and '.join(below) or 'no run'}" if len(base) else ""
        return finish(figure, caption, title)


def plot_changes(comparison: pd.DataFrame, metrics: Sequence[str] = SHARED_METRICS,
                 reported: dict[str, dict[str, float]] | None = None) -> Figure:
    """Relative changes against the untuned model with 95% intervals: a row per metric, a panel per run, one common axis.

    Args:
        comparison: `significance.compare_many`'s table, or `compare_runs`' with a column `run`.
        reported: run -> metric -> change in percent of somebody else's runs, drawn as crosses:
            `reported.REPORTED`.
    """
    metrics, runs = [name for name in metrics if name in set(comparison["metric"])], list(dict.fromkeys(comparison["run"]))
    with plt.rc_context(ACROSS):
        figure, panels = plt.subplots(1, len(runs), figsize=(9.5, 1.7 + 0.42 * len(metrics)), sharex=True, sharey=True, squeeze=False)
        for panel, run in zip(panels[0], runs, strict=True):
            rows = comparison[comparison["run"] == run].set_index("metric").loc[metrics]
            _draw_forest(panel, rows, "percent", _color_run(run), "{:+.0f}%")
            theirs = {metric: value for metric, value in (reported or {}).get(run, {}).items() if metric in metrics}
            panel.plot(theirs.values(), [metrics.index(metric) for metric in theirs], "x", color="black", markersize=8, markeredgewidth=2)
            panel.set(title=label_run(run) if len(runs) > 1 else "", xlabel="Change (%)")
        panels[0, 0].set_yticks(range(len(metrics)), [LABELS[metric] for metric in metrics])
        caption = (f"Change of the mean, {_describe_n(comparison['n'])}, 95% bootstrap interval. Filled: p < 0.05 after Holm's "
                   f"correction over {comparison['family'].max()} comparisons; hollow: no difference.")
        if reported:
            caption += "\nCross: the original report, on its own model, data and split."
        sides = {word: [label_run(run) for run in runs if set(comparison.loc[(comparison["run"] == run) & comparison["metric"].isin(metrics), "verdict"]) == {word}]
                 for word in ("worse", "better")}
        title = "; ".join(f"{word} in every metric: {', '.join(names)}" for word, names in sides.items() if names) or "No run is better or worse in every metric"
        return finish(figure, caption, title[0].upper() + title[1:])


def plot_policy_table(table: pd.DataFrame, metrics: Sequence[str] = ("validation_loss", "rouge2", "bleu")) -> Figure:
    """Steps and learning rate (down) x labels (across), a panel per metric; the colour says better or worse than untuned.

    Args:
        table: a row per run with max_steps, learning_rate, label_policy, n_test and the metrics; index: run
            names, `base` among them.
    """
    metrics, base = [name for name in metrics if name in table and table[name].notna().any()], table.loc["base"]
    runs = table[table["label_policy"].isin(POLICY_COLORS)].astype({"max_steps": int})
    runs["setting"] = [f"{row.max_steps} steps, {row.learning_rate:.0e}".replace("e-0", "e-") for row in runs.itertuples()]
    colors = LinearSegmentedColormap.from_list("verdict", [ORANGE, "white", SKY]).with_extremes(bad="#E5E5E5")
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = plt.subplots(1, len(metrics), figsize=(3.1 * len(metrics), 1.9 + 0.6 * runs["setting"].nunique()), sharey=True, squeeze=False)
        for panel, metric in zip(panels[0], metrics, strict=True):
            cells = runs.pivot(index="setting", columns="label_policy", values=metric).astype(float)
            cells = cells.reindex(index=runs["setting"].unique(), columns=[name for name in ("preshifted", "aligned") if name in cells])
            gain = np.log2(np.maximum(cells, 1e-9) / max(base[metric], 1e-9)) * (-1 if metric == "validation_loss" else 1)
            sns.heatmap(gain, ax=panel, cmap=colors, vmin=-1, vmax=1, cbar=False, linewidths=2,
                        xticklabels=[POLICY_LABELS[name] for name in cells])
            for (row, column), value in np.ndenumerate(cells):
                text = "not run" if np.isnan(value) else format_number(value)
                panel.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=11)
            panel.set(title=f"{LABELS[metric]}\nuntuned {format_number(base[metric])}", xlabel="Labels", ylabel="")
            panel.tick_params(length=0, rotation=0)
        panels[0, 0].set_ylabel("Steps, learning rate")
        return finish(figure, "Blue: better than untuned; orange: worse; the deeper, the further (full colour: twice or half). "
                              f"{_describe_n(table['n_test'])} per run.", "Labels decide, not steps or learning rate")


def plot_score_distributions(scores: pd.DataFrame, metrics: Sequence[str] = ("rougeL", "token_f1", "bertscore_f1", "words")) -> Figure:
    """Box plots over test questions, a row per run: median, quartiles, whiskers from the 5th to the 95th percentile.

    Args:
        scores: rows of scores.csv with a column `run`.
    """
    metrics, runs = [name for name in metrics if name in scores and scores[name].notna().any()], list(dict.fromkeys(scores["run"]))
    medians = scores.groupby("run", sort=False)[metrics[0]].median()
    with plt.rc_context(ACROSS):
        figure, panels = plt.subplots(1, len(metrics), figsize=(9.5, 1.7 + 0.42 * len(runs)), sharey=True, squeeze=False)
        for panel, metric in zip(panels[0], metrics, strict=True):
            sns.boxplot(scores, x=metric, y="run", hue="run", palette={run: _color_run(run) for run in runs}, ax=panel, whis=(5, 95),
                        showfliers=False, width=0.65, medianprops={"color": "black", "linewidth": 2.5}, boxprops={"alpha": 0.6}, legend=False)
            panel.set(xlabel=LABELS[metric], ylabel="")
        panels[0, 0].set_yticks(range(len(runs)), [label_run(run) for run in runs])
        return finish(figure, f"{_describe_n(scores.groupby('run').size())} per run. Thick line: median; box: quartiles; whiskers: 5th to 95th percentile.",
                      f"Highest median {LABELS[metrics[0]]}: {label_run(medians.idxmax())}, {format_number(medians.max())}"
                      + (f" (untuned {format_number(medians['base'])})" if "base" in medians else ""))


def plot_ablation(comparison: pd.DataFrame, reported: dict[str, float]) -> Figure:
    """Changes of label policies against the untuned model, a panel per metric, with a report's changes as dashed lines.

    Args:
        comparison: `significance.compare_many`'s table; `run` holds label policies.
        reported: metric -> the report's change in percent.
    """
    metrics, policies = [name for name in reported if name in set(comparison["metric"])], list(dict.fromkeys(comparison["run"]))
    holds = comparison[comparison["metric"].isin(metrics)].assign(value=lambda rows: rows["metric"].map(reported))
    holds = holds["value"].between(holds["percent_low"], holds["percent_high"]).groupby(holds["run"], sort=False).all()
    with plt.rc_context(ACROSS):
        figure, panels = plt.subplots(1, len(metrics), figsize=(9.5, 1.7 + 0.42 * len(policies)), sharey=True, squeeze=False)
        for panel, metric in zip(panels[0], metrics, strict=True):
            _draw_forest(panel, comparison[comparison["metric"] == metric].set_index("run").loc[policies], "percent", BLUE, "{:+.0f}%")
            panel.axvline(reported[metric], color="black", linestyle="--")
            panel.set(xlabel="Change (%)", title=f"{LABELS[metric]}\nreport {reported[metric]:+g}%")
        panels[0, 0].set_yticks(range(len(policies)), [label_run(policy) for policy in policies])
        kept = [label_run(policy) for policy in holds.index[holds]]
        return finish(figure, f"Change against the untuned model with 95% interval, {_describe_n(comparison['n'])}. Dashed: the original report.",
                      f"In agreement with the report in every metric: {', '.join(kept)}" if kept else "No label policy reproduces the report")


def plot_slices(slices: pd.DataFrame, run: str) -> Figure:
    """Forest plot of a run's gain over the untuned model by source and by length of the reference, a panel per metric.

    Args:
        slices: `significance.compare_slices`' table.
    """
    metrics, names = list(dict.fromkeys(slices["metric"])), list(dict.fromkeys(slices["slice"]))
    sizes = slices.drop_duplicates("slice").set_index("slice")["n"]
    first = slices[slices["metric"] == metrics[0]].set_index("slice")
    with plt.rc_context(ACROSS):
        figure, panels = plt.subplots(1, len(metrics), figsize=(9.5, 1.7 + 0.42 * len(names)), sharey=True, squeeze=False)
        for panel, metric in zip(panels[0], metrics, strict=True):
            _draw_forest(panel, slices[slices["metric"] == metric].set_index("slice").loc[names], "ci", _color_run(run), "{:+.2f}" if metric in SCALES else "{:+.3f}")
            panel.set(xlabel="Difference to untuned", title=LABELS[metric])
        panels[0, 0].set_yticks(range(len(names)), [f"{SOURCE_LABELS.get(name, name)} (n = {sizes[name]:,})" for name in names])
        best = first["delta"].idxmax()
        return finish(figure, "95% bootstrap interval. Filled: p < 0.05 after Holm's correction "
                              f"over {slices['family'].max()} comparisons; hollow: no difference.",
                      f"{label_run(run)} gains most {LABELS[metrics[0]]} on {SOURCE_LABELS.get(best, best)}: {first.loc[best, 'delta']:+.3f}")


def plot_funnel(funnel: pd.DataFrame) -> Figure:
    """Rows kept, and rows removed by the five largest cleaning steps and by all others together.

    Args:
        funnel: step, rows, removed; one row per step in order, the raw rows first.
    """
    raw, kept = funnel["rows"].iloc[0], funnel["rows"].iloc[-1]
    removed = funnel.set_index("step")["removed"].loc[lambda rows: rows > 0].sort_values(ascending=False)
    bars = removed[:5].to_dict() | ({f"{len(removed) - 5} other steps": removed[5:].sum()} if len(removed) > 5 else {})
    with plt.rc_context(ACROSS):
        figure, panel = plt.subplots(figsize=(9, 1.4 + 0.32 * len(bars)))
        panel.bar_label(panel.barh(list(bars), list(bars.values()), color=ORANGE), fmt="{:,.0f}", padding=4)
        panel.invert_yaxis()
        panel.set(xlabel="Rows removed")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        share = removed[:3].sum() / max(removed.sum(), 1)
        return finish(figure, "Steps that only change rows are not drawn.",
                      f"{kept:,} of {raw:,} rows are kept; {min(3, len(removed))} steps remove {share:.0%} of the rest")


def plot_lengths(lengths: pd.DataFrame, limit_tokens: int) -> Figure:
    """Histogram of example lengths, a panel per source, with the length at which training cuts.

    Args:
        lengths: source and tokens (prompt, answer and EOS), one row per pair.
    """
    longer = (lengths["tokens"] > limit_tokens).mean()
    ticks = [64, 128, 256, 512, 1024, 2048]
    with plt.rc_context(STYLE):
        sources = lengths.groupby("source", sort=False)["tokens"]
        figure, panels = plt.subplots(1, len(sources), figsize=(9, 3.4), sharex=True, squeeze=False)
        for panel, (source, tokens) in zip(panels[0], sources, strict=True):
            sns.histplot(tokens, ax=panel, bins=40, log_scale=True, color=BLUE, alpha=1)
            panel.axvline(limit_tokens, color=VERMILION, linestyle="--")
            panel.annotate(f"{limit_tokens}", (limit_tokens, 1), xycoords=panel.get_xaxis_transform(), xytext=(3, -10), textcoords="offset points", color=VERMILION)
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
            panel.minorticks_off()
            panel.set(xlabel="Tokens (log scale)", ylabel="Pairs",
                      title=f"{SOURCE_LABELS.get(source, source)}: {len(tokens):,} pairs, median {tokens.median():.0f}, {(tokens > limit_tokens).mean():.1%} longer")
        return finish(figure, f"Prompt, answer and EOS together. Dashed: the limit of {limit_tokens} tokens in training.",
                      f"{longer:.1%} of the pairs are longer than {limit_tokens} tokens")


def plot_search(table: pd.DataFrame, noise: float = 0.002) -> Figure:
    """Validation loss of every trial of a search, sorted within its round; failed trials as text.

    Args:
        table: round, name, validation_loss, status, in any order.
        noise: half the width of the band around the best trial within which differences are noise of the
            seed.
    """
    table = table.sort_values(["round", "validation_loss"], ignore_index=True).rename(columns={"round": "Round"})
    best = table.loc[table["validation_loss"].idxmin()]
    with plt.rc_context(ACROSS):
        figure, panel = plt.subplots(figsize=(9, 1.4 + 0.27 * len(table)))
        sns.stripplot(table, x="validation_loss", y=table.index.astype(str), hue="Round", palette=[BLUE, VERMILION, GREEN][:table["Round"].nunique()], size=7, jitter=False, ax=panel)
        panel.axvspan(best["validation_loss"] - noise, best["validation_loss"] + noise, color=SKY, alpha=0.4, zorder=0)
        for place, row in table.iterrows():
            if np.isfinite(row["validation_loss"]):
                panel.annotate(f"{row['validation_loss']:.3f}", (row["validation_loss"], place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
            else:
                panel.text(0.03, place, textwrap.shorten(row["status"], 70), transform=panel.get_yaxis_transform(), va="center", fontsize=9)
        panel.set_yticks(range(len(table)), [name.replace("+", " + ") for name in table["name"]])
        panel.set(xlabel=LABELS["validation_loss"], ylabel="")
        panel.margins(x=0.12)
        return finish(figure, f"Merged model, whole validation split, correct labels, one seed per trial. Band: best trial +- {noise}, which seeds alone give.",
                      "Learning rate and adapted layers matter, the rest is noise")


def _color_run(run: str) -> str:
    """By labels: blue where they are correct, vermilion where they are shifted twice."""
    experiment = EXPERIMENTS.get(run)
    policy = experiment.label_policy if experiment else run
    return POLICY_COLORS.get(policy, GREEN if experiment or policy in POLICY_LABELS else GREY)


def _label_ends(panel, ends: dict[str, tuple[float, float]]) -> None:
    """Write each run's name at the end of its line; names that would touch move up or down."""
    runs = sorted(ends, key=lambda run: ends[run][1])
    gap = 0.06 * np.subtract(*panel.get_ylim()[::-1])
    heights = [ends[run][1] for run in runs]
    for i in range(1, len(runs)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for run, height in zip(runs, heights, strict=True):
        panel.annotate(f" {label_run(run)}", (ends[run][0], height), va="bottom" if run == "base" else "center", fontsize=9,
                       color=_color_run(run))


def _draw_forest(panel, rows: pd.DataFrame, kind: str, color: str, text: str) -> None:
    """Intervals and values, a row each from the top. `kind`: "percent" or "ci", the columns with the interval."""
    value = "percent_change" if kind == "percent" else "delta"
    panel.axvline(0, color="black", linewidth=1)
    for place, row in enumerate(rows.to_dict("records")):
        panel.plot([row[f"{kind}_low"], row[f"{kind}_high"]], [place, place], color=color, linewidth=2)
        panel.plot(row[value], place, "o", color=color, markersize=6, markerfacecolor="white" if row["verdict"] == "no difference" else color)
        if np.isfinite(row[value]):
            panel.annotate(text.format(row[value]), (row[value], place), xytext=(0, 6), textcoords="offset points", ha="center",
                           fontsize=8.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3})
    panel.set_ylim(len(rows) - 0.5, -0.7)
    panel.margins(x=0.15)


def _describe_n(sizes: pd.Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return f"n = {low:,} test questions" if low == high else f"n = {low:,} to {high:,} test questions"
