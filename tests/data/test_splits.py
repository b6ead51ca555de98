"""Leakage groups, the split and the leakage report, against hand-worked cases and brute force."""

import hashlib
import json
import random

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from medqa_lib.data import split_pairs, splits
from medqa_lib.data.splits import COLUMNS, SPLITS, leakage_report, link_groups, near_duplicates
from medqa_lib.data.texts import text_key

WORDS = [f"w{i}" for i in range(40)]


def make_pairs(rows: list[dict]) -> pd.DataFrame:
    """Pairs with unrelated questions and answers where a row does not say otherwise."""
    blank = {"source": "medquad", "choices": "", "references": "", "official": "", "focus_area": "", "group": ""}
    rows = [
        {
            "question": f"Question number {i} about something?",
            "answer": " ".join(f"{word}x{i}" for word in WORDS[:12]),
            **blank,
            **row,
        }
        for i, row in enumerate(rows)
    ]
    return pd.DataFrame(rows)[list(COLUMNS)]


def jaccard(left: str, right: str) -> float:
    """Independent of splits.py: sets of joined words."""
    sets = []
    for text in (left, right):
        words = text_key(text).split()
        sets.append({" ".join(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if sets[0] | sets[1] else 0.0


def test_near_duplicates_takes_a_similarity_of_exactly_four_fifths():
    # 13 words have 9 shingles; another last word changes one: 8 shared of 10. Of 12 words it leaves 7 of 9.
    just, below = WORDS[:13], WORDS[20:32]
    answers = [" ".join(words) for words in (just, [*just[:-1], "other"], below, [*below[:-1], "other"])]
    i, j = near_duplicates(answers)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1)]


def test_near_duplicates_agrees_with_brute_force():
    generator = random.Random(0)
    answers = []
    for _ in range(60):
        words = [generator.choice(WORDS[:6]) for _ in range(generator.randrange(1, 60))]
        answers += [
            " ".join(words),
            " ".join(word if generator.random() > 0.03 else "edited" for word in words),
        ]
    expected = {
        (i, j)
        for i in range(len(answers))
        for j in range(i + 1, len(answers))
        if jaccard(answers[i], answers[j]) >= 0.8
        and min(len(answers[i].split()), len(answers[j].split())) >= 8
    }
    i, j = near_duplicates(answers)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert len(expected) > 10


@pytest.mark.parametrize("answers", [[], [""], ["too short"], ["one two three four five six seven eight"]])
def test_near_duplicates_finds_none_among_none(answers):
    assert [len(side) for side in near_duplicates(answers)] == [0, 0]


def test_link_groups_joins_rows_over_each_kind_of_link():
    long = " ".join(WORDS[:30])
    pairs = make_pairs(
        [
            {"question": "What is gout?", "focus_area": "Gout"},  # 0 and 1: same question
            {"question": "what is GOUT ?", "answer": long},  # 1 and 2: same answer
            {"answer": long.upper()},
            {"answer": long + " end"},  # 1 and 3: near-duplicate answer
            {"focus_area": "gout"},  # 0 and 4: same disease
            {"answer": "All of the above"},
            {"answer": "All of the above"},  # 5, 6: short answers link nothing
            {},
            {},  # 7, 8: an empty focus area links nothing
        ]
    )
    groups = link_groups(pairs)
    assert len(set(groups[:5])) == 1
    assert len(set(groups[5:]) | {groups[0]}) == 5


def test_link_groups_joins_choice_questions_by_a_long_stem_only():
    stem = "A man has fever and cough since two weeks. Which test?"
    pairs = make_pairs(
        [
            {"question": f"{stem}\nA. X-ray\nB. Sputum"},
            {"question": f"{stem}\nA. Sputum\nB. Nothing"},
            {"question": "Which is true?\nA. This\nB. That"},
            {"question": "Which is true?\nA. One\nB. Two"},
        ]
    )
    groups = link_groups(pairs)
    assert groups[0] == groups[1] and len(set(groups)) == 3


def test_link_groups_names_a_group_by_its_texts():
    pairs = make_pairs([{"focus_area": name} for name in ("gout", "flu", "gout", "", "flu")])
    order = [3, 1, 4, 0, 2]
    assert [link_groups(pairs)[row] for row in order] == link_groups(pairs.iloc[order].reset_index(drop=True))


def many_pairs() -> pd.DataFrame:
    """400 rows: 150 diseases of one to four rows in one source, 60 single rows in the other."""
    generator = random.Random(1)
    rows = [{"focus_area": f"disease {generator.randrange(150)}"} for _ in range(340)] + [
        {"source": "afrimedqa"}
    ] * 60
    pairs = make_pairs(rows)
    pairs["group"] = link_groups(pairs)
    return pairs


@pytest.mark.parametrize("by", ["group", "random"])
def test_split_pairs_gives_each_source_eighty_ten_ten(by):
    result = split_pairs(many_pairs(), by=by)
    assert {name: len(split) for name, split in result.items()} == {
        "train": 320,
        "validation": 40,
        "test": 40,
    }
    assert {
        name: sum(source == "afrimedqa" for source in split["source"]) for name, split in result.items()
    } == {"train": 48, "validation": 6, "test": 6}
    assert list(result) == list(SPLITS) and result["train"].column_names == list(COLUMNS)


def test_split_pairs_keeps_groups_together_and_every_row_once():
    pairs = many_pairs()
    result = split_pairs(pairs)
    groups = [set(split["group"]) for split in result.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sorted(question for split in result.values() for question in split["question"]) == sorted(
        pairs["question"]
    )
    random_groups = [set(split["group"]) for split in split_pairs(pairs, by="random").values()]
    assert random_groups[0] & random_groups[2]


def test_split_pairs_depends_on_the_seed_but_not_on_the_order_of_rows():
    pairs = many_pairs()
    hashes = splits.hash_splits(split_pairs(pairs))
    assert splits.hash_splits(split_pairs(pairs.sample(frac=1, random_state=3))) == hashes
    assert splits.hash_splits(split_pairs(pairs, seed=43)) != hashes


def test_split_pairs_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="'group' or 'random'"):
        split_pairs(many_pairs(), by="disease")
    with pytest.raises(ValueError, match="lack the columns.*choices"):
        split_pairs(many_pairs().drop(columns="choices"))


@pytest.mark.parametrize("sizes", [[1000], [500, 500], [8, 1]])
def test_split_pairs_says_that_it_needs_three_groups(sizes):
    rows = [{"group": f"g{i}"} for i, size in enumerate(sizes) for _ in range(size)]
    with pytest.raises(ValueError, match=f"All {sum(sizes)} pairs are in {len(sizes)} group.*expected 3"):
        split_pairs(make_pairs(rows))


@pytest.mark.parametrize(
    ("sizes", "expected"), [([300, 400, 300], [400, 300, 300]), ([9, 9, 9, 9], [18, 9, 9]), ([1] * 3, [1] * 3)]
)
def test_split_pairs_holds_out_the_smallest_groups_if_all_are_larger_than_a_tenth(sizes, expected):
    rows = [{"group": f"g{i}"} for i, size in enumerate(sizes) for _ in range(size)]
    result = split_pairs(make_pairs(rows))
    assert [result[name].num_rows for name in SPLITS] == expected
    groups = [set(split["group"]) for split in result.values()]
    assert len(set.union(*groups)) == sum(map(len, groups)) == len(sizes)


def test_hash_splits_is_the_sha256_of_one_json_line_a_row():
    rows = [
        {
            "question": "Qu\u00e9?",
            "answer": "a\nb",
            "source": "medquad",
            "group": "g",
            "choices": "",
            "references": "",
            "official": "",
            "focus_area": "f",
        }
    ]
    line = json.dumps(["Qu\u00e9?", "a\nb", "", "medquad", "g", "", "f", ""], ensure_ascii=False)
    digest = hashlib.sha256(line.encode() + b"\n").hexdigest()
    assert splits.hash_splits(DatasetDict({"test": Dataset.from_list(rows)})) == {"test": digest}


def test_leakage_report_counts_held_out_rows_with_a_relative_in_train():
    long = " ".join(WORDS[:30])
    pairs = make_pairs(
        [
            {"question": "What is gout?", "focus_area": "gout"},
            {"answer": long},
            {"answer": " ".join(WORDS[30:38])},  # train
            {"question": "What is GOUT ?", "focus_area": "Gout"},
            {"answer": long + " end"},
            {"answer": "Yes."},
            {"focus_area": "flu"},  # test
            {"answer": " ".join(WORDS[30:38])},  # validation
        ]
    )
    parts = {"train": range(3), "test": range(3, 7), "validation": range(7, 8)}
    made = DatasetDict(
        {name: Dataset.from_list(pairs.iloc[list(rows)].to_dict("records")) for name, rows in parts.items()}
    )
    report = leakage_report(made)
    found = {(row.split, row.check.split(" (")[0]): (row.rows, row.in_train) for row in report.itertuples()}
    assert found == {
        ("test", "same question"): (4, 1),
        ("test", "same answer"): (3, 0),
        ("test", "near-duplicate answer"): (3, 1),
        ("test", "same disease"): (2, 1),
        ("validation", "same question"): (1, 0),
        ("validation", "same answer"): (1, 1),
        ("validation", "near-duplicate answer"): (1, 1),
        ("validation", "same disease"): (0, 0),
    }
    assert report.set_index(["split", "check"]).loc[("test", "same question"), "percent"] == 25.0


def test_leakage_report_is_zero_for_the_grouped_split_of_random_texts():
    generator = np.random.default_rng(5)
    rows = []
    for i in range(200):
        words = [f"v{word}" for word in generator.integers(0, 9, size=int(generator.integers(3, 14)))]
        focus_area = f"disease {i % 70}" if i % 2 else ""
        rows.append(
            {
                "question": f"Question {generator.integers(150)}?",
                "answer": " ".join(words),
                "focus_area": focus_area,
            }
        )
    pairs = make_pairs(rows)
    pairs["group"] = link_groups(pairs)
    assert (leakage_report(split_pairs(pairs))["in_train"] == 0).all()
    assert leakage_report(split_pairs(pairs, by="random"))["in_train"].sum() > 0
