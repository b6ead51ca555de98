"""DataFrame -> Figure whose title states the finding, with units on every axis.

A figure is returned closed, so a notebook shows it once: as the last expression of its cell.
"""

from medqa_lib.evaluation.plots.data import plot_funnel, plot_lengths
from medqa_lib.evaluation.plots.forests import SHARED_METRICS, plot_ablation, plot_changes, plot_slices
from medqa_lib.evaluation.plots.runs import (
    plot_losses,
    plot_policy_table,
    plot_score_distributions,
    plot_search,
)
from medqa_lib.evaluation.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    finish,
    save_figure,
)

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "SHARED_METRICS", "SKY", "STYLE", "VERMILION", "finish",
    "plot_ablation", "plot_changes", "plot_funnel", "plot_lengths", "plot_losses", "plot_policy_table",
    "plot_score_distributions", "plot_search", "plot_slices", "save_figure",
]
