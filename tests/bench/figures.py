"""Figures of the training benchmark, from its results file alone."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from medqa_lib.evaluation.plots import BLUE, GREEN, GREY, ORANGE, SKY, STYLE, VERMILION, finish

MODEL = "TinyLlama's configuration, random weights"  # of results files that do not name theirs
BUSY = 0.9  # where the pass is at least this share of a step, the GPU sets the pace


def plot_training_speed(rows: Sequence[dict]) -> Figure:
    """Real tokens/s of the training benchmark's arms and, where it has been measured, what each ingredient gains.

    Args:
        rows: tests/bench/bench_training.py's results file. Arms with under four timed steps only compare losses and are not drawn.
    Raises:
        ValueError: no arm is left to draw, as after `--cpu`.
    """
    gains = [row for row in rows if row.get("summary") == "ablation"]
    arms = pd.DataFrame(
        [
            row
            for row in rows
            if "arm" in row
            and "growth_tokens" not in row
            and row.get("job") != "ablation"
            and row.get("timed_steps", 0 if "dropout 0" in row["arm"] else 4) >= 4
        ]
    )
    if arms.empty:
        raise ValueError("The results hold no arm with four or more timed steps.")
    arms[["low", "high"]] = [
        (spread[0], spread[-1]) for spread in arms.filter(regex="^tokens_s_").bfill(axis=1).iloc[:, 0]
    ]
    arms = (
        arms.groupby("arm")
        .agg(
            rate=("tokens_s", "mean"),
            low=("low", "min"),
            high=("high", "max"),
            memory=("peak_gib", "max"),
            runs=("tokens_s", "size"),
        )
        .sort_values("rate")
    )
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, panels = plt.subplots(
            1 + bool(gains),
            1,
            figsize=(9, 1.3 + 0.34 * len(arms) + 0.34 * len(gains)),
            squeeze=False,
            height_ratios=[len(arms), len(gains)] if gains else None,
        )
        speed = panels[0, 0]
        colors = [
            next(
                color
                for start, color in (("fast", BLUE), ("flat", SKY), ("Unsl", ORANGE), ("", GREY))
                if name.startswith(start)
            )
            for name in arms.index
        ]
        speed.barh(arms.index, arms["rate"], color=colors, height=0.7)
        speed.hlines(range(len(arms)), arms["low"], arms["high"], color="black", linewidth=1)
        for place, row in enumerate(arms.itertuples()):
            speed.annotate(
                f"{row.rate:,.0f}  ({row.memory:.1f} GiB)" + (f", {row.runs} runs" if row.runs > 1 else ""),
                (max(row.rate, row.high), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        speed.set(xlabel="Real tokens / s", xlim=(0, 1.3 * arms[["rate", "high"]].max().max()))
        speed.xaxis.set_major_formatter("{x:,.0f}")
        if gains:
            _draw_gains(panels[1, 0], sorted(gains, key=lambda row: row["gain_percent"]))
        return finish(
            figure,
            f"{rows[0].get('model', MODEL)}; {rows[0]['gpu']}, {rows[0]['rows']} examples a step, {rows[0]['date']}.\n"
            "Lines: 10th to 90th percentile of single steps. In brackets: peak memory. Dropout 0.05 unless said.",
        )


def _draw_gains(panel, gains: Sequence[dict]) -> None:
    values = [row["gain_percent"] for row in gains]
    panel.barh(
        [row["ingredient"] for row in gains],
        values,
        color=[GREEN if value >= 3 else GREY for value in values],
        height=0.7,
    )
    for place, value in enumerate(values):
        panel.annotate(
            f"{value:+.1f}%",
            (max(value, 3), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    panel.axvline(3, color=VERMILION, linestyle="--")
    panel.set(
        xlabel="Gain in tokens / s over the same without it (%); dashed: 3%",
        xlim=(min(0, *values) * 1.1 - 1, max(5, *values) * 1.2),
    )


def plot_training_growth(rows: Sequence[dict]) -> Figure:
    """Tokens/s of the fast path over examples a step, and what a step's time is made of; each bend has a letter, and below its reason.

    Args:
        rows: tests/bench/bench_training.py's results file, with its job `growth`.
    """
    growth = pd.DataFrame([row for row in rows if "growth_tokens" in row]).sort_values(
        "growth_examples", ignore_index=True
    )
    growth["busy"] = growth["pass_ms"] >= BUSY * growth["step_ms"] if "pass_ms" in growth else True
    limits = sorted(growth["growth_tokens"].unique())
    letters = set()
    with plt.rc_context(STYLE):
        figure, (speed, time) = plt.subplots(1, 2, figsize=(9, 6))
        for limit, color, marker, letter_at in zip(
            limits, (BLUE, ORANGE, GREEN), "os^", ((9, -12), (9, -12), (-8, 9)), strict=False
        ):
            part = growth[growth["growth_tokens"] == limit]
            for panel, x, y in ((speed, "growth_examples", "tokens_s"), (time, "tokens_a_step", "step_ms")):
                panel.plot(
                    part[x], part[y], color=color, marker=marker, label=f"at most {limit:,} tokens an example"
                )
                waiting = part[~part["busy"]]
                panel.plot(
                    waiting[x],
                    waiting[y],
                    color=color,
                    marker=marker,
                    markerfacecolor="white",
                    linestyle="none",
                )
            if "pass_ms" not in growth:
                continue
            time.plot(part["tokens_a_step"], part["pass_ms"], color=color, marker=".", linestyle=":")
            for before, at, after in zip(part.index, part.index[1:], part.index[2:], strict=False):
                busy = set(growth.loc[[before, at, after], "busy"])
                letter = "B" if len(busy) > 1 else "C" if busy.pop() else "A"
                letters.add(letter)
                speed.annotate(
                    letter,
                    (part.loc[at, "growth_examples"], part.loc[at, "tokens_s"]),
                    xytext=letter_at,
                    textcoords="offset points",
                    color=color,
                    fontweight="bold",
                    ha="center",
                    va="center",
                )
        speed.set(
            xlabel="Examples a step (log scale)", ylabel="Real tokens / s", xscale="log", ylim=(0, None)
        )
        ticks = sorted(growth["growth_examples"].unique())
        speed.set_xticks(ticks, [str(n) for n in ticks])
        speed.minorticks_off()
        speed.yaxis.set_major_formatter("{x:,.0f}")
        time.set(
            xlabel="Real tokens a step (log scale)",
            ylabel="ms a step (log scale); dotted: its pass alone",
            xscale="log",
            yscale="log",
        )
        for axis in (time.xaxis, time.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,.0f}")
        time.minorticks_off()
        figure.legend(
            *speed.get_legend_handles_labels(), loc="outside upper center", ncols=len(limits), frameon=False
        )
        reasons = _explain_growth(growth, rows) if "pass_ms" in growth else {}
        return finish(
            figure,
            "\n".join(
                [
                    *(
                        textwrap.fill(f"{letter}: {reasons[letter]}", 142, subsequent_indent="    ")
                        for letter in sorted(letters)
                    ),
                    f"{rows[0].get('model', MODEL)}; {rows[0]['gpu']}, {rows[0]['date']}; {growth['timed_steps'].min()} timed steps a point "
                    "(step: mean, pass: median).",
                ]
            ),
        )


def _explain_growth(growth: pd.DataFrame, rows: Sequence[dict]) -> dict[str, str]:
    """Letter -> the reason of the bends that have it, in numbers of the results file."""
    growth = growth.assign(
        outside=growth["step_ms"] - growth["pass_ms"],
        computed=growth["tokens_a_step"] * (1 + growth["filled"]),
    )
    waiting, busy = growth[~growth["busy"]], growth[growth["busy"]]
    said = {}
    if len(waiting):
        said["A"] = (
            f"the GPU waits for the CPU (hollow: the pass is under {BUSY:.0%} of the step). Steps of "
            f"{_span(waiting['tokens_a_step'])} tokens take {_span(waiting['step_ms'])} ms: {_span(waiting['outside'])} ms lie "
            "outside the pass and do not follow the tokens, so speed grows with them, unevenly. Tokens that only fill up a graph "
            f"({_span(100 * waiting['filled'])}%) take GPU time that is left over."
        )
        serial = [
            row["step_ms"] - row["pass_ms"]
            for row in rows
            if row.get("arm") == "fast less unfiltered losses" and "pass_ms" in row
        ]
        said["A"] += "".join(
            f" Made to wait for every loss, the CPU needs {ms:.0f} ms for its part of a step."
            for ms in serial
        )
    if len(busy):
        share = (busy["pass_ms"] / busy["step_ms"]).min()
        said["B"] = (
            f"the pass takes over: from {busy['tokens_a_step'].min():,} tokens on it is {share:.0%} of the step or more, so time "
            "grows with the tokens and speed levels off."
        )
        slope, fixed = np.polyfit(growth["computed"], growth["pass_ms"], 1, w=1 / growth["pass_ms"])
        said["C"] = (
            f"a pass takes about {fixed:.0f} ms and {1e3 * slope:.1f} µs a token that it computes, so more tokens share the "
            f"{fixed:.0f} ms, the up to {busy['outside'].max():.0f} ms outside it and the filling "
            f"({_span(100 * busy['filled'])}%)."
        )
        said["C"] += _compare_lengths(busy)
    return said


def _compare_lengths(busy: pd.DataFrame) -> str:
    """The pass of the two largest steps that have the same tokens to 5% in documents of different length."""
    pairs = [
        (a, b)
        for a, b in itertools.combinations(busy.sort_values("growth_tokens").itertuples(), 2)
        if a.growth_tokens < b.growth_tokens and abs(a.tokens_a_step / b.tokens_a_step - 1) <= 0.05
    ]
    a, b = max(pairs, key=lambda pair: pair[0].tokens_a_step, default=(None, None))
    if a is None or a.pass_ms >= b.pass_ms:
        return ""
    return (
        f" Attention grows with length: {b.tokens_a_step:,} tokens in examples of at most {b.growth_tokens:,} take a pass of "
        f"{b.pass_ms:.0f} ms, {a.tokens_a_step:,} in examples of at most {a.growth_tokens:,} one of {a.pass_ms:.0f}."
    )


def _span(values: pd.Series) -> str:
    return f"{values.min():,.0f} to {values.max():,.0f}"
