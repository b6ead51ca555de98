"""Labels made visible: one example, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from medqa_lib.config import POLICIES
from medqa_lib.labels import IGNORE_INDEX, encode_example, make_collator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
