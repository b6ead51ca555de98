"""DataFrame -> Figure whose title states the finding, with units on every axis.

A figure is returned closed, so a notebook shows it once: as the last expression of its cell.
"""

import textwrap
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
BLUE, SKY, ORANGE, GREEN, VERMILION = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00"
GREY = "#666666"
POLICY_COLORS = {"preshifted": VERMILION, "aligned": BLUE}
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "text.color": "black", "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10,
    "legend.fontsize": 9, "figure.titleweight": "bold", "figure.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD", "axes.axisbelow": True,
}
ACROSS = STYLE | {"axes.grid.axis": "x"}
SHARED_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "token_f1", "bertscore_f1")
LINES = {"exp_002": "--", "exp_003": "-.", "exp_005": "--"}


@plt.rc_context(ACROSS)
def plot_changes(comparison: pd.DataFrame, reported: dict[str, dict[str, float]] | None = None) -> Figure:
    """Changes against the untuned model: a row per metric, a panel per run, one common axis.

    Args:
        comparison: `significance.compare_many`'s table, or `compare_runs`' with a column `run`.
        reported: run -> metric -> change in percent of somebody else's runs, drawn as crosses.
    """
    shown = comparison[comparison["metric"].isin(SHARED_METRICS)]
    figure, panels = _plot_forests(shown, "run", "metric", "percent")
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
    title = f"{label(run)} against {label(base)}, {label(metric)}: {ends[0]} to {ends[-1]}"
    return finish(figure, f"Free questions only. {describe_marks(slices)}", title)


def _plot_forests(table: pd.DataFrame, panels_by: str, rows_by: str, kind: str, unit: str = "Change (%)"):
    """Relative changes ("percent") or differences ("ci") with intervals, a panel per value of `panels_by`.

    Returns:
        The figure and {value of `panels_by`: panel}.
    """
    column, number = {"percent": ("percent_change", "{:+.0f}%"), "ci": ("delta", "{:+.3f}")}[kind]
    names, rows = table[panels_by].unique(), list(table[rows_by].unique())
    figure, axes = plt.subplots(1, len(names), figsize=(9.5, 1.7 + 0.42 * len(rows)), sharey=True,
                                sharex=panels_by == "run", squeeze=False)
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
    height = -np.inf
    for run, end in ends.iterrows():
        height = max(end["loss"], height + 0.06 * np.ptp(panel.get_ylim()))
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
        figure.suptitle(textwrap.fill(title, 92), x=0.01, ha="left")
    lines = "\n".join(textwrap.fill(line, 150) for line in caption.split("\n"))
    figure.supxlabel(lines, fontsize=8.5, color="#333333", x=0.01, ha="left")
    plt.close(figure)
    return figure


def color_run(run: str) -> str:
    """By labels: blue where they are correct, vermilion where shifted twice, green for other policies."""
    policy = EXPERIMENTS[run].label_policy if run in EXPERIMENTS else run
    return POLICY_COLORS.get(policy, GREEN if policy in POLICIES else GREY)


def describe_n(sizes: pd.Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return f"n = {low:,} test questions" if low == high else f"n = {low:,} to {high:,} test questions"


def describe_marks(comparison: pd.DataFrame) -> str:
    return ("Bars: 95% bootstrap interval. Filled: p < 0.05 after Holm's correction over "
            f"{comparison['family'].max()} comparisons; hollow: no difference.")
