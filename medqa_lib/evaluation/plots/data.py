"""The data: what cleaning removes, how long the examples are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from medqa_lib.evaluation.plots.style import ACROSS, BLUE, ORANGE, STYLE, VERMILION, finish
from medqa_lib.evaluation.tables import label


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
