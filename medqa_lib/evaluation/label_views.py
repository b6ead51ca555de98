"""Labels made visible: one example token by token, and the audit of several policies as a figure."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd

from medqa_lib.config import POLICIES
from medqa_lib.evaluation.plots import BLUE, GREY, ORANGE, SKY, STYLE
from medqa_lib.labels import IGNORE_INDEX, PaddingCollator, encode_example
from medqa_lib.loss_check import loss_targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

PADDING_SHOWN = 2
IGNORED, RIGHT, WRONG = "⬜", "🟩", "🟥"  # GitHub strips colours from tables, but not these
BACKGROUND = {IGNORED: "#F0F0F0", RIGHT: "#CDEFDF", WRONG: "#FAD7C3"}
SHARES = ("prompt", "answer", "eos", "padding")


def token_table(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, max_length: int = 512) -> pd.DataFrame:
    """One row a position of one padded example; the index is the position.

    Returns:
        token and id; for each policy the label, marked as ignored, as `aligned` has it, or differing from that; and for `aligned` and
        `preshifted` what the loss compares the position's prediction with, marked in the same way against the next token.
    """
    batches = {}
    for policy in POLICIES:
        example = encode_example(tokenizer, question, answer, max_length, policy)
        length = len(example["input_ids"]) + PADDING_SHOWN
        batches[policy] = PaddingCollator(tokenizer, policy, length, pad_to_multiple_of=length)([example])
    table = pd.DataFrame({"id": batches["aligned"]["input_ids"][0].tolist()})
    table.insert(0, "token", [_show_token(tokenizer, token) for token in table["id"]])
    for prefix, column in (("label: ", lambda batch: batch["labels"]), ("learns: ", loss_targets)):
        right = column(batches["aligned"])[0].tolist()
        for policy in POLICIES if prefix == "label: " else ("aligned", "preshifted"):
            values = column(batches[policy])[0].tolist()
            table[prefix + policy] = [_mark(tokenizer, value, expected) for value, expected in zip(values, right, strict=True)]
    return table.rename_axis("position")


def _mark(tokenizer, value: int, expected: int) -> str:
    mark = RIGHT if value == expected != IGNORE_INDEX else IGNORED if value == IGNORE_INDEX == expected else WRONG
    return f"{mark} {'' if value == IGNORE_INDEX else _show_token(tokenizer, value)}".strip()


def _show_token(tokenizer, token: int) -> str:
    """The token's text; a space as ·, a line break as ↵."""
    text = tokenizer.convert_ids_to_tokens(token)
    for written in ("▁", "Ġ"):
        text = text.replace(written, "·")
    return text.replace("Ċ", "↵").replace("<0x0A>", "↵")


def render_tokens(table: pd.DataFrame) -> str:
    """`token_table` as HTML, coloured where the viewer allows it; the marks say the same where it does not."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (table.index.name, *table.columns))
    rows = []
    for position, row in table.iterrows():
        cells = [f"<td>{position}</td>"]
        for value in map(str, row):
            color = BACKGROUND.get(value[0]) if value else None
            style = f' bgcolor="{color}" style="background:{color};color:black"' if color else ""
            cells.append(f"<td{style}>{html.escape(value)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def audit_table(reports: dict[str, dict]) -> pd.DataFrame:
    """`audit_alignment`'s reports by name, one row each: nats a token by offset, chance, shares, rows, the policy found, verdict."""
    rows = {}
    for name, report in reports.items():
        rows[name] = {**{f"{offset:+d}": value for offset, value in report["nll"].items()}, "chance": report["chance_nll"],
                      **{part: report[f"{part}_supervised_share"] for part in SHARES}, "rows": report["rows"],
                      "found": report["policy"] or "no policy", "verdict": report["verdict"]}
    return pd.DataFrame(rows).T


def plot_audits(table: pd.DataFrame) -> Figure:
    """How likely the targets are at each offset, and what is supervised; a row an audited policy.

    Args:
        table: `audit_table`.
    """
    places = range(len(table))
    offsets = {"+0": ("copies the token", SKY, "s"), "+1": ("next token", BLUE, "o"), "+2": ("token after next", ORANGE, "D")}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 1.6 + 0.45 * len(table)), sharey=True, width_ratios=(3, 2))
        for offset, (label, color, marker) in offsets.items():
            left.plot(table[offset].astype(float), places, marker, color=color, markersize=8, label=f"{offset}: {label}")
        left.axvline(float(table["chance"].iloc[0]), color=GREY, linestyle="--", label="chance, log V")
        left.set_xlim(left=0)
        left.set_xlabel("How surprising the targets are, read at this offset (nats / token)")
        left.set_yticks(places, table.index)
        left.set_ylim(len(table) - 0.5, -0.5)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=2, frameon=False)
        shares = table[list(SHARES)].astype(float).to_numpy()
        right.imshow(shares, cmap="Blues", vmin=0, vmax=2.2, aspect="auto")
        for row in places:
            for column in range(len(SHARES)):
                right.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", color="black")
        right.set_xticks(range(len(SHARES)), ["prompt", "answer", "EOS", "padding"])
        right.set_xlabel("Share that is supervised")
        right.grid(visible=False)
        figure.supxlabel(f"{table['rows'].max()} examples counted", fontsize=8.5, color="#333333", x=0.01, ha="left")
    plt.close(figure)
    return figure
