"""Pairs of your own: what is read, which columns are taken, what shares a group, what is refused."""

import sys

import pandas as pd
import pytest

from medqa_lib.data import hash_splits, leakage_report, pairs_from, split_pairs

ROWS = pd.DataFrame(
    {
        "Prompt": [f"How is illness number {i} treated?" for i in range(30)],
        "response": [
            f"Illness {i} is treated with rest, fluids and medicine {i} of the ward." for i in range(30)
        ],
        "ward": [f"ward {i // 3}" for i in range(30)],
    }
)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("faq.csv", lambda path: ROWS.to_csv(path, index=False)),
        ("faq.CSV", lambda path: ROWS.to_csv(path, index=False, sep=";", encoding="utf-8-sig")),
        ("faq.tsv", lambda path: ROWS.to_csv(path, index=False, sep="\t")),
        ("faq.json", lambda path: ROWS.to_json(path, orient="records")),
        ("faq.jsonl", lambda path: ROWS.to_json(path, orient="records", lines=True)),
        ("faq.parquet", lambda path: ROWS.to_parquet(path)),
    ],
)
def test_pairs_from_reads_each_kind_of_file_alike(tmp_path, capsys, name, write):
    write(tmp_path / name)
    pairs = pairs_from(tmp_path / name)
    printed = capsys.readouterr().out
    assert "Prompt" in printed and "response" in printed and name in printed
    assert hash_splits(split_pairs(pairs)) == hash_splits(split_pairs(pairs_from(ROWS)))
    assert pairs["question"].tolist() == ROWS["Prompt"].tolist()


def test_pairs_from_keeps_a_group_on_one_side():
    splits = split_pairs(pairs_from(ROWS, group="ward"))
    wards = [{int(question.split()[4]) // 3 for question in split["question"]} for split in splits.values()]
    assert splits.num_rows == {"train": 24, "validation": 3, "test": 3}
    assert sum(map(len, wards)) == len(set.union(*wards)) == 10


def test_pairs_from_groups_equal_questions_and_nearly_equal_answers():
    rows = ROWS.copy()
    rows.loc[1, "Prompt"] = rows.loc[0, "Prompt"].upper()
    long = " ".join(f"word{i}" for i in range(30))
    rows.loc[[2, 3], "response"] = [long, long + " end"]
    pairs = pairs_from(rows)
    assert pairs["group"][0] == pairs["group"][1] != pairs["group"][2] == pairs["group"][3]
    assert pairs["group"].nunique() == 28
    assert leakage_report(split_pairs(pairs))["in_train"].sum() == 0


def test_pairs_from_cleans_what_is_safe_for_any_text_and_nothing_else():
    rows = ROWS.copy()
    rows.loc[0, "response"] = "Answer: <b>1.</b> Drink tea&nbsp;daily."
    rows.loc[1, "response"] = "Yes."
    rows.loc[2, "response"] = None
    rows.loc[3] = rows.loc[4]
    pairs = pairs_from(rows)
    assert pairs["answer"][:2].tolist() == ["Answer: 1. Drink tea daily.", "Yes."]
    assert len(pairs) == 28 and pairs.attrs["funnel"][0]["rows"] == 30


def test_pairs_from_takes_a_data_set_of_the_hub(monkeypatch):
    from datasets import Dataset

    half = {"train": Dataset.from_pandas(ROWS[:15]), "test": Dataset.from_pandas(ROWS[15:])}
    monkeypatch.setattr("datasets.load_dataset", {"clinic/faq": half}.get)
    assert len(pairs_from("clinic/faq", question="Prompt", answer="response")) == 30


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"source": ROWS, "answer": "reply"}, "reply.*Prompt, response, ward"),
        ({"source": ROWS, "group": "clinic"}, "clinic"),
        ({"source": ROWS.rename(columns={"Prompt": "title"})}, "title"),
        ({"source": ROWS[:9]}, "9 of 9.*10"),
        ({"source": "no/such/file.csv"}, "no/such/file.csv"),
        ({"source": "data/faq.csv"}, "data/faq.csv"),
        ({"source": sys.executable}, "parquet"),
    ],
)
def test_pairs_from_says_in_one_line_what_is_wrong(arguments, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        pairs_from(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["faq.json", "faq.jsonl", "faq.parquet", "faq.csv"])
def test_pairs_from_names_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"{not \xe9 json")
    with pytest.raises(ValueError, match=name) as error:
        pairs_from(tmp_path / name)
    assert "\n" not in str(error.value)


def test_pairs_from_gives_the_hubs_reason(monkeypatch):
    def refuse(name):
        raise RuntimeError(f"Dataset '{name}' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError, match="clinic/faq.*accepted conditions"):
        pairs_from("clinic/faq")
