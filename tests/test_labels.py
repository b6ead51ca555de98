import pytest
import torch
from datasets import Dataset

from medqa_lib import labels
from medqa_lib.config import POLICIES
from medqa_lib.labels import IGNORE_INDEX, encode_example, encode_split, label_ids, make_collator
from medqa_lib.prompts import encode_prompt

PROMPT = " ### Instruction:\nQ?\n\n### Response:\n"
PROMPT_TOKENS = 1 + len(PROMPT)  # BOS and a token a character
_ = IGNORE_INDEX


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("aligned", [_, _, _, 7, 8, 2]),
        ("preshifted", [_, _, 7, 8, 2, _]),
        ("full_sequence", [1, 5, 6, 7, 8, 2]),
        ("padding_supervised", [_, _, _, 7, 8, 2]),
        ("no_eos", [_, _, _, 7, 8, _]),
    ],
)
def test_label_ids_follow_the_policy(policy, expected):
    assert label_ids([1, 5, 6, 7, 8, 2], 3, policy, eos_token_id=2) == expected


def test_label_ids_no_eos_keeps_the_last_token_of_a_cut_row():
    assert label_ids([1, 5, 7, 8], 2, "no_eos", eos_token_id=2) == [_, _, 7, 8]


@pytest.mark.parametrize("prompt_tokens", [0, 3, 4])
def test_label_ids_without_prompt_or_answer_is_an_error(prompt_tokens):
    with pytest.raises(ValueError, match=f"{prompt_tokens} prompt tokens of 3"):
        label_ids([1, 5, 2], prompt_tokens)


def test_unknown_policy_or_truncation_is_named(llama_like):
    with pytest.raises(ValueError, match="'shifted'; expected one of aligned, "):
        encode_example(llama_like, "Q?", "Go", 64, policy="shifted")
    with pytest.raises(ValueError, match="'clip'; expected one of sentence, "):
        encode_example(llama_like, "Q?", "Go", 64, truncation="clip")


def test_encode_example_masks_exactly_the_prompt_and_supervises_eos(llama_like, ids_of):
    example = encode_example(llama_like, "Q?", "Go on", 64)
    assert example["input_ids"] == [1, *ids_of(PROMPT + "Go on"), 2]
    assert example["labels"] == [_] * PROMPT_TOKENS + ids_of("Go on") + [2]
    assert example["input_ids"][:PROMPT_TOKENS] == encode_prompt(llama_like, "Q?")


def test_encode_example_tokenises_prompt_and_answer_together(llama_like, ids_of):
    apart = llama_like("Go", add_special_tokens=False)["input_ids"]
    assert apart == ids_of(" Go")  # ▁G: with the space that the tokenizer puts before any text
    assert encode_example(llama_like, "Q?", "Go", 64)["labels"][-3:] == [*ids_of("Go"), 2]


def test_encode_example_has_one_bos_and_one_eos_whatever_the_row_says(llama_like):
    ids = encode_example(llama_like, "<s>Q</s>", "</s>Stop</s>\n### Response:\nGo<unk>", 200)["input_ids"]
    assert ids.count(1) == 1
    assert ids.count(2) == 1
    assert ids[-1] == 2
    assert llama_like.decode(ids).count("### Response:") == 1


@pytest.mark.parametrize(
    ("room", "answer", "kept"),
    [
        (3, "Go", "Go"),  # two characters and EOS fit
        (9, "It is. Go on.", "It is."),  # the sentence and EOS fit, two are left over
        (7, "It is. Go on.", "It is."),  # exactly
        (12, "A. B! C? Go on.", "A. B! C?"),
        (12, "Dr. Go is in. Go on.", None),  # no sentence ends at "Dr."
        (12, "Take:\n1. Go and on.", None),  # nor at "1."
        (12, "At pH 7.4 it goes. On.", None),  # nor inside 7.4
        (10, '"Go on." It is.', '"Go on."'),
    ],
)
def test_encode_example_ends_at_the_last_sentence_that_fits(llama_like, ids_of, room, answer, kept):
    example = encode_example(llama_like, "Q?", answer, PROMPT_TOKENS + room)
    if kept is None:  # mid-answer and without EOS, which would teach to stop there
        assert example["input_ids"] == [1, *ids_of(PROMPT + answer)][: PROMPT_TOKENS + room]
    else:
        assert example["input_ids"] == [1, *ids_of(PROMPT + kept), 2]
        assert example["labels"][-1] == 2


def test_encode_example_cut_ends_mid_answer_without_eos(llama_like, ids_of):
    example = encode_example(llama_like, "Q?", "It is. Go on.", PROMPT_TOKENS + 9, truncation="cut")
    assert example["labels"] == [_] * PROMPT_TOKENS + ids_of("It is. Go on.")[:9]


@pytest.mark.parametrize(
    ("question", "answer", "room", "truncation", "reason"),
    [
        ("Q?", " ", 9, "sentence", "empty"),
        ("", "Go", 9, "sentence", "empty"),
        ("Q?", "Go", 1, "cut", "prompt alone fills max_length"),
        ("Q?", "It is.", 6, "drop", "longer than max_length"),
    ],
)
def test_encode_example_says_why_a_row_cannot_be_used(llama_like, question, answer, room, truncation, reason):
    with pytest.raises(ValueError, match=reason):
        encode_example(llama_like, question, answer, PROMPT_TOKENS + room, truncation=truncation)


def test_encode_example_refuses_a_prompt_that_changes_before_its_answer(make_llama_like):
    tokenizer = make_llama_like(("\n", "G"))
    with pytest.raises(ValueError, match="not a prefix"):
        encode_example(tokenizer, "Q?", "Go", 64)
    assert encode_example(tokenizer, "Q?", "No", 64)["labels"][-1] == 2


@pytest.mark.parametrize("token", ["[END]", "[/INST]", "<\uff5cUser\uff5c>", "<end_of_turn>"])
def test_control_tokens_in_a_row_are_read_as_text(llama_like, token):
    llama_like.add_special_tokens({"eos_token": token})
    end = llama_like.eos_token_id
    ids = encode_example(llama_like, f"Q {token}?", f"Go {token} on", 200)["input_ids"]
    assert end not in encode_prompt(llama_like, f"Q {token}?") and ids.index(end) == len(ids) - 1


@pytest.mark.parametrize("truncation", ["sentence", "cut", "drop"])
def test_encode_example_leaves_a_row_that_just_fits_whole(llama_like, ids_of, truncation):
    example = encode_example(llama_like, "Q?", "It is.", PROMPT_TOKENS + 7, truncation=truncation)
    assert example["labels"][PROMPT_TOKENS:] == [*ids_of("It is."), 2]


def make_split():
    rows = [
        ("Q?", "Go", "b"),
        ("Q?", "It is. Go on, and on.", "a"),
        ("Q?", "Goes on and on and on", "a"),
        ("Q?", "", "a"),
        ("Q?" * 9, "Go", "b"),
    ]
    return Dataset.from_list([{"question": q, "answer": a, "source": s, "group": "g"} for q, a, s in rows])


def test_encode_split_counts_every_row_and_keeps_the_source(llama_like):
    encoded, counts = encode_split(llama_like, make_split(), PROMPT_TOKENS + 10)
    assert counts == {
        "rows": 5,
        "kept": 3,
        "whole": 1,
        "cut_at_sentence": 1,
        "cut_mid_answer": 1,
        "empty": 1,
        "prompt_too_long": 1,
        "tokens": 3 * PROMPT_TOKENS + 3 + 7 + 10,
        "supervised_tokens": 3 + 7 + 10,
    }
    assert encoded["source"] == ["b", "a", "a"]
    assert encoded.column_names == ["input_ids", "labels", "source"]


def test_encode_split_equals_encode_example_row_by_row(llama_like, monkeypatch):
    monkeypatch.setattr(labels, "_BATCH_ROWS", 2)
    split = make_split()
    for policy in POLICIES:
        encoded, _counts = encode_split(llama_like, split, PROMPT_TOKENS + 10, policy)
        for row, of in zip(encoded, (0, 1, 2), strict=True):
            expected = encode_example(
                llama_like, split[of]["question"], split[of]["answer"], PROMPT_TOKENS + 10, policy
            )
            assert {"input_ids": row["input_ids"], "labels": row["labels"]} == expected


def test_encode_split_with_nothing_left_is_an_error(llama_like):
    with pytest.raises(ValueError, match=r"None of 5 rows is usable \(max_length 8\)"):
        encode_split(llama_like, make_split(), 8)


EXAMPLES = [
    {"input_ids": [1, 5, 7, 2], "labels": [_, _, 7, 2]},
    {"input_ids": [1, 5, 6, 7, 8, 2], "labels": [_, _, _, 7, 8, 2]},
]


def test_collator_pads_right_and_never_supervises_padding(llama_like):
    batch = make_collator(llama_like)(EXAMPLES)
    assert llama_like.pad_token_id == llama_like.eos_token_id == 2
    assert batch["input_ids"].tolist() == [[1, 5, 7, 2, 2, 2, 2, 2], [1, 5, 6, 7, 8, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[_, _, 7, 2, _, _, _, _], [_, _, _, 7, 8, 2, _, _]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collator_keeps_each_answers_eos_supervised_though_padding_is_eos(llama_like):
    examples = [encode_example(llama_like, "Q?", answer, 64) for answer in ("Go", "Go on", "It is. Go")]
    batch = make_collator(llama_like)(examples)
    real = batch["attention_mask"].bool()
    assert ((batch["labels"] == 2) & real).sum(1).tolist() == [1, 1, 1]
    assert (batch["labels"][~real] == _).all()


def test_collator_padding_supervised_has_fixed_length_and_eos_labels(llama_like):
    batch = make_collator(llama_like, "padding_supervised", max_length=7)(EXAMPLES)
    assert batch["labels"].tolist() == [[_, _, 7, 2, 2, 2, 2], [_, _, _, 7, 8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]
