"""The merged pairs of the bundled sample, and splits kept on disk."""

import json
import os
import time

import numpy as np
import pandas as pd
import pytest
from datasets import DatasetDict

from medqa_lib.data import (
    hash_splits,
    leakage_report,
    load_sources,
    load_splits,
    merge_sources,
    prepare_splits,
    save_splits,
    sources,
    split_pairs,
)
from medqa_lib.data import prepare as data

# The bundled sample's splits, everywhere. They change when the sample or a rule does, and never by themselves.
SAMPLE_SHA256 = {
    "group": {
        "train": "883a159296b0c9373d4ee10aa72280aacf6b908039b7ad15518c8b96c9dfdbd0",
        "validation": "99982ad981d76e4eb20f818358a9f1d454bea490bd58f41a0a239282d62970fe",
        "test": "f8502e45e0185735883e6e9d8e537dbd74e7b447e66fda42de7734545c16f9fe",
    },
    "random": {
        "train": "21aced65d569c576a9db4414d65fe5ab80f4c0981745decdef19f0e5e721ae05",
        "validation": "e1680f2d0d21ee167cfe9fcf6679dbd440414e14c8e0a40513d3e64ddef7455e",
        "test": "132b229ece87e8aa50ca4ed9a067f56c6406b0925034e3c1c82811c9f11e2adb",
    },
}
SAMPLE_FOLDER = "f102e6d3a62482fb"  # of the sample and CLEANING_VERSION 5: no edit of a module changes it
REAL_DIR = os.environ.get("MEDQA_DATA_DIR")  # of the caller; the tests run without it


@pytest.fixture(autouse=True)
def _no_folder_of_the_caller(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDQA_DATA_DIR", raising=False)
    monkeypatch.setenv("MEDQA_PROFILE", "smoke")
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def pairs() -> pd.DataFrame:
    return merge_sources(load_sources(sources.SAMPLE_DIR))


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_merge_sources_counts_every_row_of_the_sample(pairs):
    funnel = pairs.attrs["funnel"]
    assert funnel[0] == {"step": "raw rows", "rows": 154, "removed": 0, "changed": 0}
    assert len(pairs) + sum(step["removed"] for step in funnel) == 154
    assert {step["step"]: step["removed"] for step in funnel if step["removed"]} == {
        "consumer questions (no reference answer)": 4,
        "options and key": 3,
        "question templates and labels": 1,
        "several correct options": 1,
        "options in a free question": 1,
        "link-only answers": 2,
        "no question or answer": 3,
        "under three words": 2,
        "not medical": 1,
        "exact pairs": 2,
        "one answer per question": 1,
    }
    assert pairs["source"].value_counts().to_dict() == {"medquad": 91, "afrimedqa": 42}


def test_merge_sources_gives_text_in_every_cell_and_choices_that_hold_the_answer(pairs):
    assert list(pairs) == [
        "question", "answer", "references", "source", "group", "choices", "focus_area", "official"
    ]
    assert pairs.groupby("source")["official"].agg(set).to_dict() == {"medquad": {""}, "afrimedqa": {"train", "test"}}
    assert all(isinstance(cell, str) for column in pairs for cell in pairs[column])
    asked = [(row, json.loads(row.choices)) for row in pairs.itertuples() if row.choices]
    assert len(asked) == 26
    assert all(row.answer.startswith(choices["options"][choices["correct"]]) for row, choices in asked)
    assert all(f"\nA. {choices['options'][0]}" in row.question for row, choices in asked)


def test_merge_sources_leaves_control_token_text_to_the_prompt(pairs):
    assert [
        question
        for question, answer in zip(pairs["question"], pairs["answer"], strict=True)
        if "</s>" in answer
    ] == ["What are Control Tokens in Clinic Notes?"]


def test_merge_sources_of_the_sample_fits_short_models(pairs):
    words = pairs["answer"].str.split().str.len()
    assert 110 <= len(pairs) <= 140 and words.max() <= 70 and words[pairs["choices"] == ""].median() >= 30


def test_merge_sources_refuses_unknown_and_unusable_sources():
    frames = load_sources(sources.SAMPLE_DIR)
    with pytest.raises(ValueError, match="pubmed"):
        merge_sources({"pubmed": frames["medquad"]})
    with pytest.raises(ValueError, match="no column answer_rationale"):
        merge_sources({"afrimedqa": frames["afrimedqa"].drop(columns="answer_rationale")})
    empty = pd.DataFrame(
        {"question": [None, "Why?"], "answer": ["Because of rest.", float("nan")], "focus_area": ["", 3]}
    )
    with pytest.raises(ValueError, match="No pair is left of 2 raw rows"):
        merge_sources({"medquad": empty})


def test_merge_sources_reads_options_as_python_literals_as_to_csv_writes_them(pairs, tmp_path):
    frames = load_sources(sources.SAMPLE_DIR)
    options = frames["afrimedqa"]["answer_options"].map(lambda cell: json.loads(cell) if "}" in cell else cell)
    with_gap = options.map(lambda cell: {**cell, "option9": float("nan")} if isinstance(cell, dict) else cell)
    for parsed in (options, with_gap):
        for changed in (parsed, parsed.map(str), parsed.map(lambda cell: json.dumps(cell) if cell else "")):
            found = merge_sources(frames | {"afrimedqa": frames["afrimedqa"].assign(answer_options=changed)})
            pd.testing.assert_frame_equal(found, pairs)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("answer_options", lambda cell: cell.replace('": "', '" - "')),
        ("answer_options", lambda cell: "; ".join(json.loads(cell).values()) if "}" in cell else cell),
        ("correct_answer", lambda cell: cell.replace("option", "")),
    ],
)
def test_merge_sources_stops_where_a_whole_kind_of_rows_cannot_be_read(column, change):
    frames = load_sources(sources.SAMPLE_DIR)
    frame = frames["afrimedqa"]
    with pytest.raises(ValueError, match="multiple-choice rows cannot be read.*option2"):
        merge_sources(frames | {"afrimedqa": frame.assign(**{column: frame[column].map(change)})})


def test_split_pairs_of_the_sample_has_the_pinned_hashes(pairs):
    assert {by: hash_splits(split_pairs(pairs, by=by)) for by in ("group", "random")} == SAMPLE_SHA256


def test_split_pairs_of_the_sample_leaks_only_row_by_row(pairs):
    assert leakage_report(split_pairs(pairs))["in_train"].sum() == 0
    assert leakage_report(split_pairs(pairs, by="random"))["in_train"].sum() > 5


def test_merge_sources_does_not_depend_on_the_order_of_raw_rows(pairs):
    shuffled = {
        name: frame.sample(frac=1, random_state=1) for name, frame in load_sources(sources.SAMPLE_DIR).items()
    }
    assert hash_splits(split_pairs(merge_sources(shuffled))) == hash_splits(split_pairs(pairs))


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_prepare_splits_keeps_its_work_and_says_what_it_holds(monkeypatch, tmp_path):
    first = prepare_splits()
    [manifest] = (tmp_path / "home" / "data").glob("*/group/manifest.json")
    about = json.loads(manifest.read_text())
    assert (
        about["rows"] == first.num_rows
        and about["sha256"] == hash_splits(first)
        and about["funnel"][0]["rows"] == 154
    )
    assert about["sources"]["medquad"] == {"origin": "bundled sample", "rows": 100} and about[
        "versions"
    ].keys() >= {"pandas", "datasets"}
    monkeypatch.setattr(data, "clean_rows", None)  # a second call must not need it
    assert hash_splits(prepare_splits()) == hash_splits(first)


def test_prepare_splits_keeps_both_splits_and_notices_other_sources(monkeypatch, tmp_path, capsys):
    home = tmp_path / "elsewhere"
    prepare_splits(home=home)
    prepare_splits(by="random", home=home)
    rows = "".join(f"What is disease {i}?,Disease {i} is made up.,x,d{i}\n" for i in range(20))
    (tmp_path / "medquad.csv").write_text("question,answer,source,focus_area\n" + rows)
    monkeypatch.setenv("MEDQA_DATA_DIR", str(tmp_path))  # one source alone is enough
    assert set(prepare_splits(home=home)["train"]["source"]) == {"medquad"}
    assert "medquad" in capsys.readouterr().out
    assert sorted(path.parent.name for path in home.glob("data/*/*/manifest.json")) == [
        "group",
        "group",
        "random",
    ]


def test_prepare_splits_goes_by_the_cleaning_version_and_not_by_the_source_text(monkeypatch, tmp_path, capsys):
    old = hash_splits(prepare_splits())
    assert SAMPLE_FOLDER not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "home" / "data").iterdir()] == [SAMPLE_FOLDER]
    monkeypatch.setattr(data, "CLEANING_VERSION", data.CLEANING_VERSION + 1)
    prepare_splits()
    assert len(list((tmp_path / "home" / "data").glob("*/group"))) == 2
    assert SAMPLE_FOLDER in capsys.readouterr().out
    assert hash_splits(load_splits(tmp_path / "home" / "data" / SAMPLE_FOLDER / "group")) == old


@pytest.mark.parametrize("damage", ["cut Arrow", "lost Arrow", "broken manifest", "other row"])
def test_prepare_splits_makes_damaged_splits_again_and_says_so(tmp_path, capsys, damage):
    expected = hash_splits(prepare_splits())
    [folder] = (tmp_path / "home" / "data").glob("*/group")
    arrow, manifest = next((folder / "train").glob("*.arrow")), folder / "manifest.json"
    if damage == "cut Arrow":
        arrow.write_bytes(arrow.read_bytes()[:2000])
    elif damage == "lost Arrow":
        arrow.unlink()
    elif damage == "broken manifest":
        manifest.write_text('{"sha256": ')
    else:
        arrow.write_bytes(arrow.read_bytes().replace(b"Gout is a painful form", b"Gout is a painfuI form"))
    with pytest.raises(ValueError, match="damaged"):
        load_splits(folder)
    assert hash_splits(prepare_splits()) == expected
    printed = capsys.readouterr().out
    assert (
        "damaged" in printed
        and "Making them again" in printed
        and hash_splits(load_splits(folder)) == expected
    )
    assert not list(folder.parent.glob("*partial*"))


def test_load_splits_asks_for_splits_that_were_never_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_splits"):
        load_splits(tmp_path / "none")


def test_save_splits_of_two_runtimes_on_one_drive_do_not_meet(tmp_path, pairs, monkeypatch):
    """Machine B, whose process has the same number, saves while A is in the middle of it."""
    splits, save_to_disk = split_pairs(pairs), DatasetDict.save_to_disk

    def save_after_the_other(self, path):
        save_to_disk(self, path)
        monkeypatch.setattr(DatasetDict, "save_to_disk", save_to_disk)
        monkeypatch.setattr(data.platform, "node", lambda: "machine-b")
        save_splits(splits, tmp_path / "splits")

    monkeypatch.setattr(DatasetDict, "save_to_disk", save_after_the_other)
    monkeypatch.setattr(data.platform, "node", lambda: "machine-a")
    folder = save_splits(splits, tmp_path / "splits")
    assert hash_splits(load_splits(folder)) == hash_splits(splits)
    assert [path.name for path in tmp_path.iterdir()] == ["splits"]


def test_save_splits_keeps_the_folder_of_a_faster_process(tmp_path, pairs):
    splits = split_pairs(pairs)
    folder = save_splits(splits, tmp_path / "splits")
    inode = folder.stat().st_ino
    assert save_splits(splits, folder) == folder and folder.stat().st_ino == inode, (
        "somebody may be reading it"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["splits"]


def test_save_splits_replaces_a_damaged_folder_and_other_splits(tmp_path, pairs):
    splits = split_pairs(pairs)
    folder = save_splits(splits, tmp_path / "splits")
    (folder / "manifest.json").unlink()
    assert hash_splits(load_splits(save_splits(splits, folder))) == hash_splits(splits)
    other = split_pairs(pairs, by="random")
    assert hash_splits(load_splits(save_splits(other, folder))) == hash_splits(other)


# --- the real data, where there is some ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DIR, reason="set MEDQA_DATA_DIR to the real data")
def test_merge_sources_cleans_the_real_rows_within_a_minute():
    start = time.process_time()
    merged = merge_sources(load_sources(REAL_DIR))
    splits = split_pairs(merged)
    assert time.process_time() - start < 60
    funnel = merged.attrs["funnel"]
    assert len(merged) + sum(step["removed"] for step in funnel) == funnel[0]["rows"]
    shares = np.array(list(splits.num_rows.values())) / sum(splits.num_rows.values())
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    report = leakage_report(splits).query("split == 'test'").set_index("check")["percent"]
    assert report.filter(like="same").sum() == 0 and report.iloc[-1] <= 2
