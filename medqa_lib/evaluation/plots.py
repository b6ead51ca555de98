"""DataFrame -> Figure. Okabe-Ito colours, an opaque white page (GitHub's dark theme shows it too), units on every axis, n below.

A figure is returned closed, so a notebook shows it once: as the last expression of its cell.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from medqa_lib.config import home_dir
from medqa_lib.metrics import METRICS

# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, SKY, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
# Run -> colour, line, marker. A control has its baseline's colour with a broken line; the ablations share one colour.
RUN_STYLES = {
    "base": (GREY, "--", "o"),
    "exp_001": (BLUE, "-", "o"), "exp_001_aligned": (BLUE, "--", "s"),
    "exp_002": (SKY, "-", "o"), "exp_002_aligned": (SKY, "--", "s"),
    "exp_003": (ORANGE, "-", "o"),
    "exp_004": (GREEN, "-", "o"),
    "exp_005": (VERMILION, "-", "o"),
    "ablation_full_sequence": (PURPLE, "-", "^"), "ablation_padding_supervised": (PURPLE, "--", "v"), "ablation_no_eos": (PURPLE, ":", "<"),
}
# A comparison of label policies names its rows by policy: each looks like the run that has it.
RUN_STYLES |= {name.removeprefix("ablation_"): style for name, style in RUN_STYLES.items() if name.startswith("ablation_")}
RUN_STYLES |= {"preshifted": RUN_STYLES["exp_003"], "aligned": RUN_STYLES["exp_004"]}
OTHER_STYLE = ("#AAAAAA", ":", "D")
SHARED_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "token_f1", "bertscore_f1")
UNITS = {name: label for name, (label, _) in METRICS.items()} | {"validation_loss": "Validation loss (nats / token)"}
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "text.color": "black",
    "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10, "axes.titleweight": "bold", "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD", "axes.axisbelow": True,
}


def save_figure(figure: Figure, name: str, about: str = "") -> Path:
    """Write NAME.png under MEDQA_FIGURES (unset: `figures` in the home folder) and return its path.

    Args:
        about: what was measured on what (`results.describe_origin`); it is added to the caption, in the notebook too.
    """
    if about:
        finish(figure, f"{figure.get_supxlabel()}\n{about}".strip())
    folder = Path(os.environ.get("MEDQA_FIGURES") or home_dir() / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def plot_losses(losses: pd.DataFrame) -> Figure:
    """Training and validation loss of one or more runs.

    Args:
        losses: rows of loss.csv (step, split, loss) with a column `run`; a run with one validation point is a level line.
    """
    runs = list(dict.fromkeys(losses["run"]))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True)
        for panel, split in zip(panels, ("train", "validation"), strict=True):
            for run in runs:
                rows = losses[(losses["run"] == run) & (losses["split"] == split)].sort_values("step")
                if len(rows) == 1 and rows["step"].iloc[0] == 0:
                    panel.axhline(rows["loss"].iloc[0], color=GREY, linestyle="--", label=run)
                elif len(rows):
                    panel.plot(rows["step"], rows["loss"], label=run, markersize=4, **_style_run(run))
            panel.set(xlabel="Optimiser step", ylabel="Loss (nats / token)")
        panels[0].set_title("Training, on the labels of the run")
        panels[1].set_title("Validation, always on correct labels")
        entries = {}
        for panel in panels[::-1]:
            entries |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False)
        return finish(figure, "Training loss: mean since the point before. Validation loss: every answer token weighs alike; curves are\n"
                              "of the first 400 validation pairs, the dashed line and the tables of all that the profile takes.")


def plot_changes(comparison: pd.DataFrame, metrics: Sequence[str] = SHARED_METRICS, reported: pd.DataFrame | None = None) -> Figure:
    """Forest plot of relative changes against the base model, with 95% intervals; a panel a metric.

    Args:
        comparison: `statistics.compare_many`'s table, or `compare_runs`' with a column `run`. Filled markers: p_holm < 0.05.
        reported: run, metric, percent_change of somebody else's runs, drawn as crosses.
    """
    metrics = [name for name in metrics if name in set(comparison["metric"])]
    runs = list(dict.fromkeys(comparison["run"]))
    n_columns = min(3, len(metrics))
    n_rows = -(-len(metrics) // n_columns)
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, grid = plt.subplots(n_rows, n_columns, figsize=(9, 1.2 + n_rows * (0.75 + 0.28 * len(runs))), sharey=True, squeeze=False)
        for panel, metric in zip(grid.flat, metrics, strict=False):
            _draw_forest(panel, comparison[comparison["metric"] == metric].set_index("run"), runs)
            if reported is not None:
                rows = reported[(reported["metric"] == metric) & reported["run"].isin(runs)]
                panel.plot(rows["percent_change"], [runs.index(run) for run in rows["run"]], "x", color="black", markersize=7,
                           markeredgewidth=1.8, zorder=3)
            panel.set_title(METRICS[metric][0])
        for panel in grid.flat[len(metrics):]:
            panel.set_axis_off()
        for panel in grid.flat[:len(metrics)]:
            panel.set_xlabel("Change (%)")
        caption = (f"Change of the mean against base, {_describe_n(comparison['n'])}. Bars: 95% bootstrap interval.\n"
                   "Filled: p < 0.05 after Holm's correction; hollow: no difference shown.")
        if reported is not None:
            caption += " Crosses: the original report, on its own model, data and split."
        return finish(figure, caption)


def plot_policy_table(table: pd.DataFrame, metrics: Sequence[str] = ("validation_loss", "rouge2", "bleu")) -> Figure:
    """Steps and learning rate (down) x labels (across), a panel a metric; the colour says better or worse than base.

    Args:
        table: a row a run with max_steps, learning_rate, labels, n_test and the metrics; index: run names, `base` among them.
    """
    metrics = [name for name in metrics if name in table and table[name].notna().any()]
    runs = table.drop(index="base").astype({"max_steps": int})
    settings = list(dict.fromkeys(zip(runs["max_steps"], runs["learning_rate"], strict=True)))
    columns = [name for name in ("preshifted", "aligned") if name in set(runs["labels"])]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = plt.subplots(1, len(metrics), figsize=(3.1 * len(metrics), 1.5 + 0.6 * len(settings)), sharey=True, squeeze=False)
        for panel, metric in zip(panels[0], metrics, strict=True):
            cells = np.full((len(settings), len(columns)), np.nan)
            for row in runs.itertuples():
                if row.labels in columns:
                    cells[settings.index((row.max_steps, row.learning_rate)), columns.index(row.labels)] = getattr(row, metric)
            _draw_cells(panel, cells, table.loc["base", metric], higher_is_better=metric != "validation_loss")
            panel.set_title(f"{UNITS[metric]}\nbase {_format_score(table.loc['base', metric])}")
            panel.set_xticks(range(len(columns)), columns)
            panel.set_xlabel("Labels")
        panels[0, 0].set_yticks(range(len(settings)), [f"{steps} steps, {rate:.0e}".replace("e-0", "e-") for steps, rate in settings])
        panels[0, 0].set_ylabel("Steps, learning rate")
        return finish(figure, f"Blue: better than base; orange: worse; the deeper, the further. {_describe_n(table['n_test'])} a run.")


def plot_score_distributions(scores: pd.DataFrame, metrics: Sequence[str] = ("rougeL", "token_f1", "bertscore_f1", "words")) -> Figure:
    """Box plots over test questions, a row a run: median, quartiles, whiskers from the 5th to the 95th percentile, dot = mean.

    Args:
        scores: rows of scores.csv with a column `run`.
    """
    metrics = [name for name in metrics if name in scores and scores[name].notna().any()]
    runs = list(dict.fromkeys(scores["run"]))
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, panels = plt.subplots(1, len(metrics), figsize=(9.5, 1.4 + 0.32 * len(runs)), sharey=True, squeeze=False)
        for panel, metric in zip(panels[0], metrics, strict=True):
            boxes = panel.boxplot([scores.loc[scores["run"] == run, metric].dropna() for run in runs], orientation="horizontal",
                                  positions=range(len(runs)), widths=0.65, whis=(5, 95), showfliers=False, patch_artist=True,
                                  showmeans=True, medianprops={"color": "black"},
                                  meanprops={"marker": "o", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 4})
            for box, run in zip(boxes["boxes"], runs, strict=True):
                box.set(facecolor=_style_run(run)["color"], alpha=0.75)
            panel.set_xlabel(METRICS[metric][0])
            panel.set_yticks(range(len(runs)), runs)
        panels[0, 0].invert_yaxis()
        n = _describe_n(scores.groupby("run").size())
        return finish(figure, f"{n} a run. Box: quartiles; whiskers: 5th to 95th percentile; dot: mean.")


def _style_run(run: str) -> dict:
    return dict(zip(("color", "linestyle", "marker"), RUN_STYLES.get(run, OTHER_STYLE), strict=True))


def _draw_forest(panel, rows: pd.DataFrame, runs: Sequence[str]) -> None:
    panel.axvline(0, color="black", linewidth=1)
    for spot, run in enumerate(runs):
        row = rows.loc[run]
        style = _style_run(run)
        panel.plot([row["percent_low"], row["percent_high"]], [spot, spot], color=style["color"], linewidth=2)
        panel.plot(row["percent_change"], spot, style["marker"], color=style["color"], markersize=6,
                   markerfacecolor="white" if row["verdict"] == "no difference" else style["color"])
    panel.set_yticks(range(len(runs)), runs)
    panel.set_ylim(len(runs) - 0.4, -0.6)
    panel.margins(x=0.12)


def _draw_cells(panel, cells: np.ndarray, base: float, higher_is_better: bool) -> None:
    """Numbers on colours: 0 = base, 1 = twice as good, -1 = half as good, on a log scale."""
    least = 1e-9  # a score may be 0
    gain = np.log2(np.maximum(cells, least) / max(base, least)) * (1 if higher_is_better else -1)
    colors = LinearSegmentedColormap.from_list("verdict", [ORANGE, "white", SKY]).with_extremes(bad="#E5E5E5")
    panel.imshow(gain, cmap=colors, vmin=-1, vmax=1, aspect="auto")
    decimals = 2 if np.nanmax([base, *cells.flat]) >= 1 else 4
    for (row, column), value in np.ndenumerate(cells):
        panel.text(column, row, "not run" if np.isnan(value) else f"{value:.{decimals}f}", ha="center", va="center", color="black")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def _format_score(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _describe_n(sizes: pd.Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return f"n = {low} test questions" if low == high else f"n = {low} to {high} test questions"


def finish(figure: Figure, caption: str) -> Figure:
    """Put the caption below and close the figure."""
    figure.supxlabel(caption, fontsize=8.5, color="#333333", x=0.01, ha="left")
    plt.close(figure)
    return figure


def plot_funnel(funnel: pd.DataFrame) -> Figure:
    """Rows left after each cleaning step that removes any, and how many it removed.

    Args:
        funnel: step, rows, removed; one row a step in order, the raw rows first.
    """
    rows = funnel[(funnel["removed"] > 0) | (funnel.index == funnel.index[0])]
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, panel = plt.subplots(figsize=(9, 1.2 + 0.32 * len(rows)))
        places = range(len(rows))
        panel.barh(places, rows["rows"], color=BLUE, height=0.7)
        panel.barh(places, rows["removed"], left=rows["rows"], color=ORANGE, height=0.7)
        for place, row in zip(places, rows.itertuples(), strict=True):
            panel.annotate(f"{row.rows:,}" + (f"  (-{row.removed:,})" if row.removed else ""), (row.rows + row.removed, place),
                           xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        panel.set_yticks(places, rows["step"])
        panel.invert_yaxis()
        panel.set(xlabel="Rows", xlim=(0, 1.18 * rows["rows"].max()))
        return finish(figure, "Blue: rows left after the step; orange: rows that it removed. Steps that only change rows are not drawn.")


def plot_lengths(lengths: pd.DataFrame, limit_tokens: int) -> Figure:
    """Histogram of example lengths, a panel a source, with the length at which training cuts.

    Args:
        lengths: source and tokens (prompt, answer and end mark), one row a pair.
    """
    sources = list(dict.fromkeys(lengths["source"]))
    bins = np.geomspace(max(1, lengths["tokens"].min()), lengths["tokens"].max() + 1, 41)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(sources), figsize=(9, 3.4), sharex=True, squeeze=False)
        for panel, source in zip(panels[0], sources, strict=True):
            tokens = lengths.loc[lengths["source"] == source, "tokens"]
            panel.hist(tokens, bins=bins, color=BLUE)
            panel.axvline(limit_tokens, color=VERMILION, linestyle="--")
            panel.set(xscale="log", xlabel="Tokens (log scale)", ylabel="Pairs")
            panel.set_title(f"{source}: {len(tokens):,} pairs, median {tokens.median():.0f}, {(tokens > limit_tokens).mean():.1%} longer")
        return finish(figure, f"Prompt, answer and end mark together. Dashed: the limit of {limit_tokens} tokens in training.")


def plot_search(table: pd.DataFrame) -> Figure:
    """Validation loss of every trial of the search, a row a trial, a colour and a marker a round.

    Args:
        table: `search.search_table`'s: round, name, validation_loss, status. A trial without a loss shows its status instead.
    """
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(9, 1.2 + 0.3 * len(table)))
        for number, color, marker in zip((1, 2, 3), (BLUE, ORANGE, GREEN), "os^", strict=True):
            rows = table[table["round"] == number]
            panel.plot(rows["validation_loss"], rows.index, marker, color=color, label=f"Round {number}")
        for place, row in table.iterrows():
            if np.isfinite(row["validation_loss"]):
                panel.annotate(f"{row['validation_loss']:.4f}", (row["validation_loss"], place), xytext=(7, 0), textcoords="offset points",
                               va="center", fontsize=9)
            else:
                panel.text(0.01, place, textwrap.fill(row["status"], 84), transform=panel.get_yaxis_transform(),
                           va="center", fontsize=9)
        panel.set_yticks(table.index, [textwrap.fill(name.replace("+", " + "), 44) for name in table["name"]], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15, y=0.03)
        panel.set_xlabel(UNITS["validation_loss"])
        figure.legend(loc="outside right upper", frameon=False)
        return finish(figure, "Merged model, whole validation split, right labels. One seed a trial.")
