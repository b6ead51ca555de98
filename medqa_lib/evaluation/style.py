"""What all figures share: colours, an opaque white page, title above and caption below."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from medqa_lib.config import EXPERIMENTS, POLICIES, home_dir

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
