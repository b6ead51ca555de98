"""Any text, through cleaning, merging, prompting and encoding: nothing crashes, nothing is lost uncounted, nothing becomes a control token.

HYPOTHESIS_PROFILE=thorough runs 10,000 examples of each property instead of 100.
"""

import json
import os
import re
import unicodedata

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medqa_lib.config import POLICIES, PROFILES
from medqa_lib.data import merge_sources
from medqa_lib.data.sources import REQUIRED
from medqa_lib.labels import (
    IGNORE_INDEX,
    TRUNCATIONS,
    UNUSABLE,
    encode_example,
    encode_split,
    make_collator,
)
from medqa_lib.prompts import encode_prompt, escape_special_tokens, format_prompt

settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# What breaks parsers, tokenizers and templates, mixed into arbitrary Unicode.
FRAGMENTS = st.sampled_from(
    [
        "</s>",
        "<s>",
        "<unk>",
        "<|im_end|>",
        "<|im_start|>",
        "<0x0A>",
        "</",
        "<",
        "&lt;/s&gt;",
        "<b>bold</b>",
        "### Instruction:",
        "### Response:",
        "###  response :",
        "##### Response:",
        "{question}",
        "{",
        "%s",
        "\\",
        '"',
        "'",
        "\x00",
        "\r\n",
        "\t",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\u0301",
        "\u2581",
        "\U0001f48a",
        "\ud800",
        "No rationale",
        "Answer:",
        "A. B. C.",
        "NaN",
        "What is (are) X ?",
        "Dr. Who vs. p <0.05. ",
        "1. ",
        "a" * 300,
        "word " * 60,
        "Approximate number of patients",
        "These resources address the diagnosis",
        "Key Points",
        "(a ",
        "A disease is an illness of the body. ",
    ]
)
ANY_TEXT = st.lists(st.one_of(st.text(st.characters(exclude_categories=())), FRAGMENTS), max_size=6).map(
    "".join
)
ANY_CELL = st.one_of(
    ANY_TEXT,
    st.none(),
    st.floats(),
    st.integers(),
    st.booleans(),
    st.sampled_from([pd.NA, pd.NaT]),
    st.lists(ANY_TEXT, max_size=2),
    st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=2),
)
OPTIONS = st.dictionaries(
    st.sampled_from(["option1", "option2", "option3", "x"]), st.one_of(ANY_TEXT, st.none(), st.integers())
)
MEDQUAD = st.lists(
    st.fixed_dictionaries({"question": ANY_CELL, "answer": ANY_CELL, "focus_area": ANY_CELL}), max_size=4
)
AFRIMEDQA = st.lists(
    st.fixed_dictionaries(
        {
            "question_type": st.one_of(st.sampled_from(["mcq", "mcq", "saq", "consumer_queries"]), ANY_CELL),
            "question": ANY_CELL,
            "answer_options": st.one_of(OPTIONS.map(json.dumps), ANY_CELL),
            "correct_answer": st.one_of(
                st.sampled_from(["option1", "option2", "option1,option2", "option9"]), ANY_CELL
            ),
            "answer_rationale": ANY_CELL,
        }
    ),
    max_size=4,
)


@pytest.fixture(scope="session")
def tokenizer():
    from medqa_lib.model import load_tokenizer

    return load_tokenizer(PROFILES["smoke"])


def squeeze(text):
    return re.sub(" ", "", text)


@given(ANY_TEXT)
def test_neutralize_only_adds_spaces_and_needs_no_second_pass(text):
    readable = text.encode("utf-8", "replace").decode()
    once = escape_special_tokens(text)
    assert squeeze(once) == squeeze(readable)
    assert escape_special_tokens(once) == once
    assert not re.search(r"#{2,}[ \t]*(instruction|response)[ \t]*:", once, re.IGNORECASE)
    assert not re.search(r"</?(s|unk)>|<\|[a-z_]+\|>", once)


@given(ANY_TEXT)
def test_prompt_survives_the_round_trip_through_tokens(tokenizer, question):
    prompt = format_prompt(question)
    ids = encode_prompt(tokenizer, question)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == prompt
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    assert prompt.count("### Instruction:") == prompt.count("### Response:") == 1


@given(ANY_TEXT, ANY_TEXT, st.integers(8, 400), st.sampled_from(POLICIES), st.sampled_from(TRUNCATIONS))
def test_encode_example_masks_exactly_the_prompt_or_says_why_not(
    tokenizer, question, answer, max_length, policy, truncation
):
    try:
        example = encode_example(tokenizer, question, answer, max_length, policy, truncation)
    except ValueError as error:
        assert any(reason in str(error) for reason in UNUSABLE.values())
        return
    ids, labels = example["input_ids"], example["labels"]
    prompt = encode_prompt(tokenizer, question)
    assert ids[: len(prompt)] == prompt and len(prompt) < len(ids) == len(labels) <= max_length
    assert tokenizer.eos_token_id not in ids[:-1]
    expected = {
        "full_sequence": ids,
        "preshifted": [IGNORE_INDEX] * (len(prompt) - 1) + ids[len(prompt) :] + [IGNORE_INDEX],
    }
    aligned = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
    if policy == "no_eos" and ids[-1] == tokenizer.eos_token_id:
        aligned[-1] = IGNORE_INDEX
    assert labels == expected.get(policy, aligned)
    batch = make_collator(tokenizer, policy, max_length)([example])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


@given(MEDQUAD, AFRIMEDQA)
def test_merge_sources_counts_every_row_and_leaves_clean_text(medquad, afrimedqa):
    sources = {
        name: pd.DataFrame(rows, columns=list(REQUIRED[name]), dtype=object)
        for name, rows in (("medquad", medquad), ("afrimedqa", afrimedqa))
        if rows
    }
    try:
        pairs = merge_sources(sources)
    except ValueError as error:
        assert "No pair is left" in str(error) or "empty" in str(error)
        return
    funnel = pairs.attrs["funnel"]
    assert funnel[0]["rows"] == len(medquad) + len(afrimedqa) and funnel[-1]["rows"] == len(pairs)
    assert funnel[0]["rows"] - sum(step["removed"] for step in funnel) == len(pairs)
    assert all(step["removed"] >= 0 for step in funnel)
    for text in [*pairs["question"], *pairs["answer"]]:
        assert text.strip() and text.encode() and text == unicodedata.normalize("NFC", text).strip()
    for question, answer, choices in zip(pairs["question"], pairs["answer"], pairs["choices"], strict=True):
        if choices:
            parsed = json.loads(choices)
            assert len(parsed["options"]) > 1 and all(option.strip() for option in parsed["options"])
            right = parsed["options"][parsed["correct"]]
            assert f"{'ABCDEFGHIJ'[parsed['correct']]}. {right}" in question and answer.startswith(
                right.rstrip(".")
            )


@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=5), st.integers(8, 400))
def test_encode_split_counts_every_row(tokenizer, pairs, max_length):
    split = {"question": [question for question, _ in pairs], "answer": [answer for _, answer in pairs]}
    try:
        encoded, counts = encode_split(tokenizer, Rows(split), max_length)
    except ValueError as error:
        assert "None of" in str(error)
        return
    outcomes = {
        name: n
        for name, n in counts.items()
        if name in UNUSABLE or name in ("whole", "cut_at_sentence", "cut_mid_answer")
    }
    assert sum(outcomes.values()) == counts["rows"] == len(pairs)
    assert len(encoded) == counts["kept"] == sum(n for name, n in outcomes.items() if name not in UNUSABLE)


class Rows(dict):
    """The two things that encode_split asks of a Dataset: its length and a slice of its columns."""

    def __len__(self):
        return len(self["question"])

    def __getitem__(self, key):
        return (
            {name: column[key] for name, column in self.items()}
            if isinstance(key, slice)
            else super().__getitem__(key)
        )
