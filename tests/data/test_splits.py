"""Leakage groups, the split and the leakage report, against hand-worked cases and brute force."""

import hashlib
import json
import random

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from medqa_lib.data import split_pairs, splits
from medqa_lib.data.splits import COLUMNS, SPLITS, leakage_report, link_groups, train_overlap

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


def test_link_groups_joins_rows_over_each_kind_of_link():
    long = " ".join(WORDS[:30])
    rows = [
        {"question": "What is gout?", "focus_area": "Gout"},  # 0 and 1: same question
        {"question": "what is GOUT ?", "answer": long},  # 1 and 2: same answer
        {"answer": long.upper()},
        {"answer": long[:60] + " and then something else"},  # 1 and 3: half of an answer
        {"focus_area": "gout (disease)"},  # 0 and 4: same disease
        {"answer": "All of the above"},
        {"answer": "All of the above"},  # 5, 6: short answers link nothing
        {},
        {},  # 7, 8: an empty focus area links nothing
        {"source": "afrimedqa", "question": "Which is true?\nA. This\nB. That"},
        {"source": "afrimedqa", "question": "Which is TRUE\nA. One\nB. Two"},  # 9 and 10: same stem
    ]
    groups = link_groups(make_pairs(rows))
    assert len(set(groups[:5])) == 1 and groups[9] == groups[10]
    assert len(set(groups)) == 6


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
    for source, rows in (("medquad", 340), ("afrimedqa", 60)):
        held_out = [split["source"].count(source) for split in map(result.get, SPLITS[1:])]
        assert held_out == pytest.approx([rows / 10] * 2, rel=0.06)
    assert sum(result.num_rows.values()) == 400
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
    with pytest.raises(ValueError, match="'group', 'official' or 'random'"):
        split_pairs(many_pairs(), by="disease")


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


def split_by_hand(rows: list[dict], train: int, test: int) -> DatasetDict:
    """The first rows are train, then test, the rest validation."""
    pairs = make_pairs(rows)
    parts = {"train": pairs[:train], "test": pairs[train : train + test], "validation": pairs[train + test :]}
    return DatasetDict({name: Dataset.from_dict(part.to_dict("list")) for name, part in parts.items()})


def test_leakage_report_counts_held_out_rows_and_words_that_train_has():
    copied = " ".join(WORDS[:20])
    rows = [
        {"question": "What is gout?", "focus_area": "gout"},
        {"answer": copied, "focus_area": "Bjornstad syndrome"},
        {"answer": " ".join(WORDS[30:38])},  # train
        {"question": "What is GOUT ?", "focus_area": "Gout disease"},
        {"answer": f"a b c {copied.upper()} d e"},  # 20 of 25 words are in train
        {"answer": "Yes."},
        {"focus_area": "Bjrnstad syndrome", "answer": " ".join(WORDS[1:13])},  # test; 12 words in a row do not count
        {"answer": " ".join(WORDS[30:38])},  # validation
    ]
    made = split_by_hand(rows, train=3, test=4)
    report = leakage_report(made)
    found = {(row.split, row.check.split(" (")[0]): (row.rows, row.in_train) for row in report.itertuples()}
    words = "words of the answer in a run of 13"
    assert found == {
        ("test", "same question"): (4, 1),
        ("test", "same answer"): (3, 0),
        ("test", "same disease"): (2, 1),
        ("test", "disease spelled nearly alike"): (2, 1),
        ("test", words): (12 + 25 + 1 + 12, 20),
        ("validation", "same question"): (1, 0),
        ("validation", "same answer"): (1, 1),
        ("validation", "same disease"): (0, 0),
        ("validation", "disease spelled nearly alike"): (0, 0),
        ("validation", words): (8, 0),
    }
    assert report.set_index(["split", "check"]).loc[("test", "same question"), "percent"] == 25.0
    assert train_overlap(made).tolist() == [0, 20 / 25, 0, 0]


def test_a_text_under_twenty_diseases_is_no_relative():
    template = "It is passed on by one of the two parents in half of all known families."
    for diseases, expected in ((20, 0), (19, 1)):
        rows = [{"answer": template, "focus_area": f"disease {letter}"} for letter in "abcdefghijklmnopqrstuv"]
        made = split_by_hand(rows[:diseases] + [{}], train=diseases - 1, test=1)
        report = leakage_report(made).query("split == 'test'").set_index("check")["in_train"]
        assert report["same answer (8 words or more)"] == expected
        assert report["words of the answer in a run of 13"] == 16


def test_leakage_report_is_zero_for_the_grouped_split_of_random_texts():
    generator = np.random.default_rng(5)
    rows = []
    for i in range(200):
        words = [f"v{word}" for word in generator.integers(0, 9, size=int(generator.integers(3, 14)))]
        focus_area = f"disease {i % 70}" if i % 2 else ""
        question = f"Question {generator.integers(150)}?"
        rows.append({"question": question, "answer": " ".join(words), "focus_area": focus_area})
    pairs = make_pairs(rows)
    pairs["group"] = link_groups(pairs)
    assert (leakage_report(split_pairs(pairs))["in_train"] == 0).all()
    assert leakage_report(split_pairs(pairs, by="random"))["in_train"].sum() > 0


def test_split_pairs_leaves_training_rows_out_that_copy_held_out_ones(capsys):
    """Long answers share 20 of their words: too few for one group, too many for train and test."""
    own = [" ".join(f"{word}own{i}" for word in WORDS) for i in range(15)]
    pairs = make_pairs([{"answer": f"{' '.join(WORDS[:20])} {text}"} for text in own] + [{}] * 30)
    pairs["group"] = link_groups(pairs)
    assert pairs["group"].nunique() == 45
    result = split_pairs(pairs, seed=3)
    held_out = [answer for name in SPLITS[1:] for answer in result[name]["answer"]]
    assert any(answer.startswith("w0 w1 ") for answer in held_out)
    assert not any(answer.startswith("w0 w1 ") for answer in result["train"]["answer"])
    assert sum(result.num_rows.values()) < 45 and "left out" in capsys.readouterr().out
    assert sum(split_pairs(pairs, seed=3, by="random").num_rows.values()) == 45


def test_split_pairs_keeps_what_is_inherited_in_train_and_leaves_it_out_of_the_test(capsys):
    copied = " ".join(WORDS[:20])
    rows = [{"question": f"Is disease {i} inherited?", "answer": f"{copied} {'x' * i}"} for i in range(15)]
    pairs = make_pairs(rows + [{}] * 85)
    pairs["group"] = pairs["question"]
    by_row, result = split_pairs(pairs, seed=0, by="random"), split_pairs(pairs, seed=0)
    told = [sum("inherited" in question for question in result[name]["question"]) for name in SPLITS]
    assert told[0] >= 10 and told[1] >= 1 and told[2] == 0 and result.num_rows["test"] >= 1
    assert sum(result.num_rows.values()) < 100 == sum(by_row.num_rows.values())
    assert "test" in capsys.readouterr().out


def test_split_pairs_keeps_a_test_whose_rows_mostly_share_text_with_train_and_says_so(capsys):
    rows = [{"question": f"Is disease {i} inherited?", "answer": " ".join(WORDS[:20])} for i in range(15)]
    pairs = make_pairs(rows)
    pairs["group"] = pairs["question"]
    result = split_pairs(pairs, seed=3)
    assert sum(result.num_rows.values()) == 15
    assert f"{result.num_rows['test']} of {result.num_rows['test']} test rows" in capsys.readouterr().out


def test_split_pairs_compares_spellings_of_diseases_alone(capsys):
    pairs = make_pairs([{"focus_area": f"record {i}", "source": "own"} for i in range(100, 400)])
    pairs["group"] = pairs["focus_area"]
    assert sum(split_pairs(pairs).num_rows.values()) == 300 and capsys.readouterr().out == ""


@pytest.mark.parametrize("sizes", [[368, 16, 16], [500, 10, 10]])
def test_split_pairs_says_that_one_group_leaves_nothing_to_train_on(sizes):
    rows = [{"group": f"g{i}"} for i, size in enumerate(sizes) for _ in range(size)]
    with pytest.raises(ValueError, match=f"has {max(sizes)} of {sum(sizes)}.*train"):
        split_pairs(make_pairs(rows))


@pytest.mark.parametrize(
    ("name", "other", "leaks"),
    [
        ("Bjrnstad syndrome", "Bjornstad syndrome", True),  # MedQuAD lost some letters
        ("branchio-oculo-facial syndrome", "Branchiooculofacial syndrome", True),
        ("Gaucher", "Gauches", False),  # too short
        ("cystinuria", "homocystinuria", False),
    ],
)
def test_split_pairs_leaves_a_disease_out_of_the_test_that_train_spells_otherwise(name, other, leaks):
    pairs = make_pairs([{}] * 40)
    pairs["group"] = pairs["question"]
    before = split_pairs(pairs)
    areas = dict.fromkeys(before["train"]["question"], other) | {(asked := before["test"]["question"][0]): name}
    pairs["focus_area"] = pairs["question"].map(areas).fillna("")
    assert (asked not in split_pairs(pairs)["test"]["question"]) == leaks


def test_split_pairs_by_official_holds_the_official_rows_and_their_relatives_out():
    pairs = many_pairs()
    is_exam = pairs["source"] == "afrimedqa"
    pairs.loc[is_exam, "official"] = ["test"] * 40 + ["train"] * 20
    relative = pairs.index[is_exam][-1]
    pairs.loc[relative, "group"] = pairs.loc[pairs.index[is_exam][0], "group"]
    result = split_pairs(pairs, by="official")
    exam = {name: [row for row in split if row["source"] == "afrimedqa"] for name, split in result.items()}
    assert {name: len(rows) for name, rows in exam.items()} == {"train": 17, "validation": 2, "test": 41}
    assert pairs["question"][relative] in {row["question"] for row in exam["test"]}
    assert all(row["official"] == "train" for name in ("train", "validation") for row in exam[name])
    by_group = split_pairs(pairs)
    assert [row for row in result["test"] if row["source"] == "medquad"] == [
        row for row in by_group["test"] if row["source"] == "medquad"
    ]
    with pytest.raises(ValueError, match="official"):
        split_pairs(pairs.assign(official=""), by="official")
