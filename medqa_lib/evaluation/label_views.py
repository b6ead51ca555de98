"""Labels made visible: one example token by token, and the audit of several policies as a figure."""

from __future__ import annotations

import html
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

IGNORED, RIGHT, WRONG = "·", "✓", "✗"
SHARES = ("prompt", "answer", "eos", "padding")


def token_table(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, max_length: int = 512):
    """One row per position of one padded example; the index is the position.

    Returns:
        token and id; for each policy the label, marked as ignored, as `aligned` has it, or different; and for
        `aligned` and `preshifted` what the loss compares the position's prediction with, marked likewise.
    """
    batches = {}
    for policy in POLICIES:
        example = encode_example(tokenizer, question, answer, max_length, policy)
        length = len(example["input_ids"]) + 2  # two places of padding
        collator = make_collator(tokenizer, policy, length)
        collator.pad_to_multiple_of = length
        batches[policy] = collator([example])
    table = pd.DataFrame({"id": batches["aligned"]["input_ids"][0].tolist()})
    table.insert(0, "token", [_show_token(tokenizer, token) for token in table["id"]])
    labels = {policy: batch["labels"][0].tolist() for policy, batch in batches.items()}
    learnt = {policy: [*labels[policy][1:], IGNORE_INDEX] for policy in ("aligned", "preshifted")}
    for prefix, columns in (("label: ", labels), ("learns: ", learnt)):
        for policy, values in columns.items():
            pairs = zip(values, columns["aligned"], strict=True)
            table[prefix + policy] = [_mark(tokenizer, *pair) for pair in pairs]
    return table.rename_axis("position")


def _mark(tokenizer, value: int, expected: int) -> str:
    mark = WRONG if value != expected else IGNORED if value == IGNORE_INDEX else RIGHT
    return f"{mark} {'' if value == IGNORE_INDEX else _show_token(tokenizer, value)}".strip()


def _show_token(tokenizer, token: int) -> str:
    """The token's text; a space as ␣, a line break as ↵."""
    text = tokenizer.convert_ids_to_tokens(token)
    for written, shown in {"▁": "␣", "Ġ": "␣", "Ċ": "↵", "<0x0A>": "↵"}.items():
        text = text.replace(written, shown)
    return text


def render_tokens(table: pd.DataFrame) -> str:
    """`token_table` as an HTML table; control tokens such as </s> are text in it."""
    cells = table.reset_index().map(lambda value: html.escape(str(value)))
    return cells.to_html(index=False, escape=False, border=0)


def audit_table(reports: dict[str, dict]) -> pd.DataFrame:
    """Reports of `labels.audit_policy` by name, nats per token by offset, shares, what was found."""
    rows = {}
    for name, report in reports.items():
        nats = {f"{offset:+d}": value for offset, value in report["nll"].items()}
        shares = {part: report[f"{part}_share"] for part in SHARES}
        rows[name] = {**nats, "chance": report["chance_nll"], **shares, "rows": report["rows"],
                      "found": report["policy"] or "no policy", "verdict": report["verdict"]}
    return pd.DataFrame(rows).T


def plot_audits(table: pd.DataFrame) -> Figure:
    """How likely the targets are at each offset, and what is supervised, by row of `audit_table`."""
    places = [place + 0.5 for place in range(len(table))]
    offsets = {"+0": ("copies the token", SKY, "s"), "+1": ("next token", BLUE, "o"),
               "+2": ("token after next", ORANGE, "D")}
    with plt.rc_context(STYLE):
        size = (9, 1.6 + 0.45 * len(table))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=(3, 2))
        shares = table[list(SHARES)].astype(float).rename(columns={"eos": "EOS"})
        seaborn.heatmap(shares, ax=right, annot=True, fmt=".0%", cmap="Blues", vmin=0, vmax=2.2, cbar=False,
                        annot_kws={"color": "black"})
        right.set_xlabel("Share that is supervised")
        for offset, (label, color, marker) in offsets.items():
            nats = table[offset].astype(float)
            left.plot(nats, places, marker, color=color, markersize=8, label=f"{offset}: {label}")
        left.axvline(float(table["chance"].iloc[0]), color=GREY, linestyle="--", label="chance, log V")
        left.set(xlim=(0, None), xlabel="How surprising the targets are, read at this offset (nats / token)")
        left.set_yticks(places, table.index)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=2, frameon=False)
        figure.supxlabel(f"{table['rows'].max()} examples counted", fontsize=8.5, x=0.01, ha="left")
    plt.close(figure)
    return figure
