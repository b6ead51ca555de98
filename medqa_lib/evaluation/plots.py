"""DataFrame -> Figure whose title states the finding, with units on every axis.

A figure is returned closed, so a notebook shows it once: as the last expression of its cell.
"""

from __future__ import annotations  # noqa: I001

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from medqa_lib.evaluation.style import (  # noqa: F401 (others read them from here)
    ACROSS, BLUE, GREEN, GREY, ORANGE, POLICY_COLORS, SKY, STYLE, VERMILION, color_run, describe_marks,
    describe_n, finish, save_figure)
from medqa_lib.evaluation.tables import format_number, label

SHARED_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "token_f1", "bertscore_f1")
SEED_NOISE = 0.002  # nats / token: within it seeds alone decide
LINES = {"exp_002": "--", "exp_003": "-.", "exp_005": "--"}


@plt.rc_context(ACROSS)
def plot_changes(comparison: pd.DataFrame, reported: dict[str, dict[str, float]] | None = None) -> Figure:
    """Changes against the untuned model: a row per metric, a panel per run, one common axis.

    Args:
        comparison: `significance.compare_many`'s table, or `compare_runs`' with a column `run`.
        reported: run -> metric -> change in percent of somebody else's runs, drawn as crosses.
    """
    shown = comparison[comparison["metric"].isin(SHARED_METRICS)]
    figure, panels = _plot_forests(shown, "run", "metric", "percent", sharex=True)
    rows = list(shown["metric"].unique())
    for run, panel in panels.items():
        theirs = {name: change for name, change in (reported or {}).get(run, {}).items() if name in rows}
        panel.plot(theirs.values(), [rows.index(name) for name in theirs], "x", color="black", ms=8, mew=2)
    verdicts = shown.groupby("run", sort=False)["verdict"].agg(set)
    alike = {word: [label(run) for run in panels if verdicts[run] == {word}] for word in ("worse", "better")}
    title = "; ".join(f"{word} in every metric: {', '.join(runs)}" for word, runs in alike.items() if runs)
    title = title[:1].upper() + title[1:] or "No run is better or worse in every metric"
    caption = f"{describe_n(comparison['n'])}. {describe_marks(comparison)}"
    if reported:
        caption += " Cross: the original report, on its own model, data and split."
    return finish(figure, caption, title)


@plt.rc_context(ACROSS)
def plot_ablation(comparison: pd.DataFrame, reported: dict[str, float]) -> Figure:
    """`plot_changes` of label policies, a panel per metric; `reported` holds a report's change in percent."""
    shown = comparison[comparison["metric"].isin(reported)]
    figure, panels = _plot_forests(shown, "metric", "run", "percent")
    for metric, panel in panels.items():
        panel.axvline(reported[metric], color="black", linestyle="--")
        panel.set_title(f"{label(metric)}\nreport {reported[metric]:+g}%")
    inside = shown["metric"].map(reported).between(shown["percent_low"], shown["percent_high"])
    agrees = inside.groupby(shown["run"], sort=False).all()
    policies = ", ".join(label(policy) for policy in agrees.index[agrees])
    caption = f"Dashed: the original report. {describe_n(shown['n'])}. {describe_marks(comparison)}"
    return finish(figure, caption, f"In agreement with the report in every metric: {policies}" if policies
                  else "No label policy reproduces the report")


@plt.rc_context(ACROSS)
def plot_slices(slices: pd.DataFrame, run: str, base: str = "base") -> Figure:
    """A run's gain over another on parts of the test, from `significance.compare_slices`' table."""
    shown = slices.assign(slice=[f"{label(row.slice)} (n = {row.n:,})" for row in slices.itertuples()])
    figure, panels = _plot_forests(shown, "metric", "slice", "ci", unit=f"Difference to {label(base)}")
    metric = next(iter(panels))
    gains = slices[slices["metric"] == metric].sort_values("delta").itertuples()
    ends = [f"{row.delta:+.3f} ({label(row.slice)})" for row in gains]
    caption = f"Free questions only. {describe_marks(slices)}"
    title = f"{label(run)} against {label(base)}, {label(metric)}: {ends[0]} to {ends[-1]}"
    return finish(figure, caption, title)


def _plot_forests(table: pd.DataFrame, panels_by: str, rows_by: str, kind: str, sharex: bool = False,
                  unit: str = "Change (%)"):
    """Relative changes ("percent") or differences ("ci") with intervals, a panel per value of `panels_by`.

    Returns:
        The figure and {value of `panels_by`: panel}.
    """
    column, number = {"percent": ("percent_change", "{:+.0f}%"), "ci": ("delta", "{:+.3f}")}[kind]
    names, rows = table[panels_by].unique(), list(table[rows_by].unique())
    figure, axes = plt.subplots(1, len(names), figsize=(9.5, 1.7 + 0.42 * len(rows)), sharex=sharex,
                                sharey=True, squeeze=False)
    for name, panel in zip(names, axes[0], strict=True):
        color = color_run(name) if panels_by == "run" else BLUE
        panel.axvline(0, color="black", linewidth=1)
        for row in table[table[panels_by] == name].to_dict("records"):
            place, value = rows.index(row[rows_by]), row[column]
            panel.plot([row[f"{kind}_low"], row[f"{kind}_high"]], [place, place], color=color, linewidth=2)
            panel.plot(value, place, "o", color=color, markersize=6,
                       markerfacecolor="white" if row["verdict"] == "no difference" else color)
            if np.isfinite(value):
                panel.annotate(number.format(value), (value, place), xytext=(0, 6), fontsize=8.5, ha="center",
                               textcoords="offset points", bbox={"fc": "white", "ec": "none", "pad": 0.3})
        panel.set(xlabel=unit, ylim=(len(rows) - 0.5, -0.7), title=label(name) if len(names) > 1 else "")
        panel.margins(x=0.15)
    axes[0, 0].set_yticks(range(len(rows)), map(label, rows))
    return figure, dict(zip(names, axes[0], strict=True))


@plt.rc_context(STYLE)
def plot_losses(losses: pd.DataFrame) -> Figure:
    """Training and validation loss of a few runs, labelled at the ends of the lines.

    Args:
        losses: rows of loss.csv (step, split, loss) with a column `run`; the untuned model is the run `base`.
    """
    tuned = losses[losses["run"] != "base"].sort_values("step")
    same = tuned.loc[(tuned["split"] == "validation") & (tuned["step"] == 0), "loss"]
    untuned = [*same, *losses.loc[losses["run"] == "base", "loss"]][0]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), sharex=True, subplot_kw={"ymargin": 0.1})
    for panel, split in zip(panels, ("train", "validation"), strict=True):
        curves = tuned[tuned["split"] == split]
        for run, rows in curves.groupby("run"):
            panel.plot(rows["step"], rows["loss"], color=color_run(run), linestyle=LINES.get(run, "-"))
        ends = curves.groupby("run").last()
        panel.set(xlabel="Optimiser step", ylabel="Loss (nats / token)", xlim=(0, 1.22 * tuned["step"].max()))
        if split == "validation":
            below = " and ".join(ends.index[ends["loss"] < untuned])
            panel.axhline(untuned, color=GREY, linestyle=":")
            ends.loc["base", ["step", "loss"]] = tuned["step"].max(), untuned
        _label_ends(panel, ends.sort_values("loss"))
    panels[0].set_title("Training, on the run's labels")
    panels[1].set_title("Validation, always on correct labels")
    caption = ("Orange: labels shifted twice; blue: correct. Training loss: mean since the point before. "
               "Curves: the first 200 validation pairs; dotted: untuned, on "
               f"{'the same' if len(same) else 'all'} pairs.")
    return finish(figure, caption, f"Validation loss below the untuned model's: {below or 'no run'}")


def _label_ends(panel, ends: pd.DataFrame) -> None:
    """Write each run's name at the end of its line, the lowest first; names that would touch move up."""
    bottom, top = panel.get_ylim()
    height = -np.inf
    for run, end in ends.iterrows():
        height = max(end["loss"], height + 0.06 * (top - bottom))
        panel.annotate(f" {label(run)}", (end["step"], height), va="bottom" if run == "base" else "center",
                       fontsize=9, color=color_run(run), bbox={"fc": "white", "ec": "none", "pad": 0.3})


@plt.rc_context(STYLE | {"axes.grid": False})
def plot_policy_table(table: pd.DataFrame) -> Figure:
    """Steps and learning rate (down) x labels (across); the colour says better or worse than untuned.

    Args:
        table: a row per run, `base` among them: max_steps, learning_rate, label_policy, n_test, metrics.
    """
    runs = table[table["label_policy"].isin(POLICY_COLORS)]
    settings = [f"{row.max_steps} steps, {row.learning_rate:.0e}".replace("e-0", "e-")
                for row in runs.itertuples()]
    metrics = [name for name in ("validation_loss", "rouge2", "bleu") if name in runs]
    colors = LinearSegmentedColormap.from_list("verdict", [ORANGE, "white", SKY]).with_extremes(bad="#E5E5E5")
    figure, panels = plt.subplots(1, len(metrics), sharey=True, squeeze=False,
                                  figsize=(3.1 * len(metrics), 1.9 + 0.6 * len(set(settings))))
    for panel, metric in zip(panels[0], metrics, strict=True):
        cells = runs.assign(setting=settings).pivot(index="setting", columns="label_policy", values=metric)
        cells = cells.reindex(dict.fromkeys(settings), columns=[*POLICY_COLORS]).astype(float)
        base, sign = table.loc["base", metric], -1 if metric == "validation_loss" else 1
        texts = cells.map(lambda value: "not run" if np.isnan(value) else format_number(value))
        sns.heatmap(sign * np.log2(np.maximum(cells, 1e-9) / max(base, 1e-9)), ax=panel, cmap=colors, vmin=-1,
                    vmax=1, cbar=False, linewidths=2, xticklabels=list(map(label, cells)))
        for (row, column), text in np.ndenumerate(texts):  # heatmap would leave out what was not run
            panel.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=11)
        panel.set(title=f"{label(metric)}\nuntuned {format_number(base)}", xlabel="Labels", ylabel="")
        panel.tick_params(length=0, rotation=0)
    panels[0, 0].set_ylabel("Steps, learning rate")
    caption = (f"{describe_n(table['n_test'])} per run. Blue: better than untuned; orange: worse; "
               "the deeper, the further (full colour: twice or half).")
    return finish(figure, caption, "At these settings labels decide, not steps or learning rate")


@plt.rc_context(ACROSS)
def plot_score_distributions(scores: pd.DataFrame) -> Figure:
    """Box plots over test questions, a row per run, from rows of scores.csv with a column `run`."""
    metrics = [name for name in ("rougeL", "token_f1", "bertscore_f1", "words") if name in scores]
    medians = scores.groupby("run", sort=False)[metrics[0]].median()
    figure, panels = plt.subplots(1, len(metrics), figsize=(9.5, 1.7 + 0.42 * len(medians)), sharey=True,
                                  squeeze=False)
    for panel, metric in zip(panels[0], metrics, strict=True):
        sns.boxplot(scores, x=metric, y="run", hue="run", palette=[color_run(run) for run in medians.index],
                    ax=panel, whis=(5, 95), width=0.65, showfliers=False, legend=False,
                    boxprops={"alpha": 0.6}, medianprops={"color": "black", "linewidth": 2.5})
        panel.set(xlabel=label(metric), ylabel="")
    panels[0, 0].set_yticks(range(len(medians)), map(label, medians.index))
    caption = (f"{describe_n(scores['run'].value_counts())} per run. Thick line: median; box: quartiles; "
               "whiskers: 5th to 95th percentile.")
    return finish(figure, caption, f"Highest median {label(metrics[0])}: {label(medians.idxmax())}, "
                  f"{format_number(medians.max())} (untuned {format_number(medians['base'])})")


@plt.rc_context(ACROSS)
def plot_search(table: pd.DataFrame) -> Figure:
    """Every trial of a search (round, name, validation_loss, status), sorted within its round."""
    table = table.sort_values(["round", "validation_loss"], ignore_index=True)
    best = table["validation_loss"].min()
    figure, panel = plt.subplots(figsize=(9, 1.4 + 0.27 * len(table)))
    panel.axvspan(best - SEED_NOISE, best + SEED_NOISE, color=SKY, alpha=0.4)
    sns.scatterplot(table, x="validation_loss", y=table.index, hue="round", style="round", s=60, ax=panel,
                    palette={1: BLUE, 2: VERMILION, 3: GREEN}, markers={1: "o", 2: "s", 3: "^"})
    for row in table.itertuples():
        failed = np.isnan(row.validation_loss)
        text = textwrap.shorten(row.status, 70) if failed else f"{row.validation_loss:.3f}"
        panel.annotate(text, (best if failed else row.validation_loss, row.Index), xytext=(7, 0), va="center",
                       textcoords="offset points", fontsize=9)
    panel.set_yticks(table.index, table["name"].str.replace("+", " + "))
    panel.set(xlabel=label("validation_loss"), ylabel="", ylim=(len(table) - 0.4, -0.6))
    panel.margins(x=0.12)
    caption = ("Merged model, whole validation split, correct labels, one seed per trial. "
               f"Band: the best trial +- {SEED_NOISE}, which seeds alone give.")
    return finish(figure, caption, "Learning rate and adapted layers matter, the rest is noise")


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
    title = (f"{funnel['rows'].iloc[-1]:,} of {funnel['rows'].iloc[0]:,} rows are kept; {len(removed[:3])} "
             f"steps remove {removed[:3].sum() / max(removed.sum(), 1):.0%} of the rest")
    return finish(figure, "Steps that only change rows are not drawn.", title)


@plt.rc_context(STYLE)
def plot_lengths(lengths: pd.DataFrame, limit_tokens: int) -> Figure:
    """Histogram of example lengths, a panel per source, with the length at which training cuts.

    Args:
        lengths: source and tokens (prompt, answer and EOS), one row per pair.
    """
    sources = lengths.groupby("source", sort=False)["tokens"]
    figure, panels = plt.subplots(1, len(sources), figsize=(9, 3.4), sharex=True, squeeze=False)
    for panel, (source, tokens) in zip(panels[0], sources, strict=True):
        sns.histplot(tokens, ax=panel, bins=40, log_scale=True, color=BLUE, alpha=1)
        panel.axvline(limit_tokens, color=VERMILION, linestyle="--")
        panel.set_xticks([64, 128, 256, 512, 1024], ["64", "128", "256", "512", "1,024"])
        panel.minorticks_off()
        title = (f"{label(source)}: {len(tokens):,} pairs, median {tokens.median():.0f}, "
                 f"{(tokens > limit_tokens).mean():.1%} longer")
        panel.set(xlabel="Tokens (log scale)", ylabel="Pairs", title=title)
    caption = f"Prompt, answer and EOS together. Dashed: the limit of {limit_tokens} tokens in training."
    share = (lengths["tokens"] > limit_tokens).mean()
    return finish(figure, caption, f"{share:.1%} of the pairs are longer than {limit_tokens} tokens")
