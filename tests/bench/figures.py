"""Figures of the training benchmark, from its results file alone."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from medqa_lib.plots import BLUE, GREEN, GREY, ORANGE, SKY, STYLE, VERMILION, finish


def plot_training_speed(rows: Sequence[dict]) -> Figure:
    """Real tokens/s of the training benchmark's arms and, where it has been measured, what each ingredient gains.

    Args:
        rows: tests/bench/bench_training.py's results file. Arms with under four timed steps only compare losses and are not drawn.
    Raises:
        ValueError: no arm is left to draw, as after `--cpu`.
    """
    gains = [row for row in rows if row.get("summary") == "ablation"]
    arms = pd.DataFrame([row for row in rows if "arm" in row and "growth_tokens" not in row and row.get("job") != "ablation"
                         and row.get("timed_steps", 0 if "dropout 0" in row["arm"] else 4) >= 4])
    if arms.empty:
        raise ValueError("The results hold no arm with four or more timed steps.")
    arms[["low", "high"]] = [(spread[0], spread[-1]) for spread in arms.filter(regex="^tokens_s_").bfill(axis=1).iloc[:, 0]]
    arms = arms.groupby("arm").agg(rate=("tokens_s", "mean"), low=("low", "min"), high=("high", "max"), memory=("peak_gib", "max"),
                                   runs=("tokens_s", "size")).sort_values("rate")
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, panels = plt.subplots(1 + bool(gains), 1, figsize=(9, 1.3 + 0.34 * len(arms) + 0.34 * len(gains)), squeeze=False,
                                      height_ratios=[len(arms), len(gains)] if gains else None)
        speed = panels[0, 0]
        colors = [next(color for start, color in (("fast", BLUE), ("flat", SKY), ("Unsl", ORANGE), ("", GREY)) if name.startswith(start))
                  for name in arms.index]
        speed.barh(arms.index, arms["rate"], color=colors, height=0.7)
        speed.hlines(range(len(arms)), arms["low"], arms["high"], color="black", linewidth=1)
        for place, row in enumerate(arms.itertuples()):
            speed.annotate(f"{row.rate:,.0f}  ({row.memory:.1f} GiB)" + (f", {row.runs} runs" if row.runs > 1 else ""),
                           (max(row.rate, row.high), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        speed.set(xlabel="Real tokens / s", xlim=(0, 1.3 * arms[["rate", "high"]].max().max()))
        speed.xaxis.set_major_formatter("{x:,.0f}")
        if gains:
            _draw_gains(panels[1, 0], sorted(gains, key=lambda row: row["gain_percent"]))
        return finish(figure, f"{rows[0]['gpu']}, {rows[0]['rows']} examples a step, {rows[0]['date']}. "
                               "Lines: 10th to 90th percentile of single steps. In brackets: peak memory.")


def _draw_gains(panel, gains: Sequence[dict]) -> None:
    values = [row["gain_percent"] for row in gains]
    panel.barh([row["ingredient"] for row in gains], values, color=[GREEN if value >= 3 else GREY for value in values], height=0.7)
    for place, value in enumerate(values):
        panel.annotate(f"{value:+.1f}%", (max(value, 3), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    panel.axvline(3, color=VERMILION, linestyle="--")
    panel.set(xlabel="Gain in tokens / s over the same without it (%); dashed: 3%", xlim=(min(0, *values) * 1.1 - 1, max(5, *values) * 1.2))


def plot_training_growth(rows: Sequence[dict]) -> Figure:
    """Tokens/s of the fast path over examples a step and over tokens a step, a line a length limit; hollow: the pass alone.

    Args:
        rows: tests/bench/bench_training.py's results file, with its job `growth`.
    """
    growth = pd.DataFrame([row for row in rows if "growth_tokens" in row]).sort_values("growth_examples")
    limits = sorted(growth["growth_tokens"].unique())
    with plt.rc_context(STYLE):
        figure, (by_examples, by_tokens) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
        for limit, color, marker in zip(limits, (BLUE, ORANGE, GREEN), "os^", strict=False):
            part = growth[growth["growth_tokens"] == limit]
            by_examples.plot(part["growth_examples"], part["tokens_s"], marker=marker, color=color, label=f"at most {limit:,} tokens")
            by_tokens.plot(part["tokens_a_step"], part["tokens_s"], marker=marker, color=color)
            if "pass_ms" in growth:
                by_tokens.plot(part["tokens_a_step"], 1e3 * part["tokens_a_step"] / part["pass_ms"], marker=marker, color=color,
                               linestyle=":", markerfacecolor="white")
        ticks = sorted(growth["growth_examples"].unique())
        by_examples.set(xlabel="Examples a step (log scale)", ylabel="Real tokens / s", xscale="log", ylim=(0, None))
        by_examples.set_xticks(ticks, [str(n) for n in ticks])
        by_examples.minorticks_off()
        by_tokens.set(xlabel="Real tokens a step (log scale)", ylabel="Real tokens / s", xscale="log")
        by_examples.yaxis.set_major_formatter("{x:,.0f}")
        figure.legend(loc="outside upper center", ncols=len(limits), frameon=False)
        return finish(figure, f"{rows[0]['gpu']}, {rows[0]['date']}. {_explain_growth(growth)}")


def _explain_growth(growth: pd.DataFrame) -> str:
    """The bends' two causes in numbers: tokens that only fill a graph, and time outside the pass."""
    small, large = (growth.loc[i] for i in (growth["tokens_a_step"].idxmin(), growth["tokens_a_step"].idxmax()))
    said = (f"Graphs are filled up with {small['filled']:.0%} of the real tokens at {small['tokens_a_step']:,} a step, "
            f"{large['filled']:.0%} at {large['tokens_a_step']:,}.")
    if "pass_ms" not in growth:
        return said
    outside = growth["step_ms"] - growth["pass_ms"]
    first, last = outside[small.name] / small["step_ms"], outside[large.name] / large["step_ms"]
    return said + (f"\nDotted: the pass alone; {outside.min():.1f} to {outside.max():.1f} ms a step are outside it "
                   f"({first:.0%} of the smallest step, {last:.0%} of the largest).")
