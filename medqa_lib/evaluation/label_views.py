"""Labels made visible: one example token by token, and the audit of several policies as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
import seaborn

from medqa_lib.config import POLICIES
from medqa_lib.evaluation.plots import BLUE, GREY, ORANGE, SKY, STYLE
from medqa_lib.labels import IGNORE_INDEX, encode_example, make_collator

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

SHARES = ["prompt", "answer", "eos", "padding"]
SHOWN = {"▁": "␣", "Ġ": "␣", "Ċ": "↵", "<0x0A>": "↵"}  # how tokenizers write a space and a line break


def token_table(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, max_length: int = 512):
    """One row per position of one example with two places of padding; the index is the position.

    Returns:
        token, id and for each policy the label, marked as ignored (·), as `aligned` has it (✓), or not (✗).
    """
    def show(token: int) -> str:
        text = tokenizer.convert_ids_to_tokens(token)
        for written, shown in SHOWN.items():
            text = text.replace(written, shown)
        return text

    def mark(label: int, expected: int) -> str:
        sign = "✗" if label != expected else "·" if label == IGNORE_INDEX else "✓"
        return sign if label == IGNORE_INDEX else f"{sign} {show(label)}"

    labels = {}
    for policy in POLICIES:
        example = encode_example(tokenizer, question, answer, max_length, policy)
        collator = make_collator(tokenizer, policy, len(example["input_ids"]) + 2)
        collator.pad_to_multiple_of = len(example["input_ids"]) + 2
        batch = collator([example])
        labels[policy] = batch["labels"][0].tolist()
    ids = batch["input_ids"][0].tolist()  # the same for all policies
    columns = {f"label: {policy}": map(mark, labels[policy], labels["aligned"]) for policy in POLICIES}
    return pd.DataFrame({"token": map(show, ids), "id": ids, **columns}).rename_axis("position")


def render_tokens(table: pd.DataFrame) -> str:
    """`token_table` as an HTML table; control tokens such as </s> are text in it."""
    return table.reset_index().to_html(index=False, border=0)


def audit_table(reports: dict[str, dict]) -> pd.DataFrame:
    """Reports of `labels.audit_policy` by name: nats per token by offset, shares, what was found."""
    rows = {}
    for name, report in reports.items():
        nats = {f"{offset:+d}": value for offset, value in report["nll"].items()}
        shares = {part: report[f"{part}_share"] for part in SHARES}
        rows[name] = {**nats, "chance": report["chance_nll"], **shares, "rows": report["rows"],
                      "found": report["policy"] or "no policy", "verdict": report["verdict"]}
    return pd.DataFrame(rows).T


@plt.rc_context(STYLE)
def plot_audits(table: pd.DataFrame) -> Figure:
    """How likely the targets are at each offset, and what is supervised, by row of `audit_table`."""
    size = (9, 1.6 + 0.45 * len(table))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=(3, 2))
    seaborn.heatmap(table[SHARES].astype(float).rename(columns={"eos": "EOS"}), ax=right, annot=True,
                    fmt=".0%", cmap="Blues", vmin=0, vmax=2.2, cbar=False, annot_kws={"color": "black"})
    right.set_xlabel("Share that is supervised")
    for offset, name, color, marker in (("+0", "copies the token", SKY, "s"), ("+1", "next token", BLUE, "o"),
                                        ("+2", "token after next", ORANGE, "D")):
        places = [place + 0.5 for place in range(len(table))]
        left.plot(table[offset], places, marker, color=color, markersize=8, label=f"{offset}: {name}")
    left.axvline(table["chance"].iloc[0], color=GREY, linestyle="--", label="chance, log V")
    left.set(xlim=(0, None), xlabel="How surprising the targets are, read at this offset (nats / token)")
    left.set_yticks(places, table.index)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=2, frameon=False)
    figure.supxlabel(f"{table['rows'].max()} examples counted", fontsize=8.5, x=0.01, ha="left")
    plt.close(figure)
    return figure
