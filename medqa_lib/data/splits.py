"""Group-aware train/validation/test split and a leakage report.

Rows belong together if they share question, disease or much of the answer's text. Their order is by SHA-256,
so the same pairs give the same splits on any machine.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from medqa_lib.data.cleaning import Row
from medqa_lib.data.links import Runs, link_keys, similar_answers, similar_names, similar_stems, spellings

COLUMNS = ("question", "answer", "references", "source", "group", "choices", "focus_area", "official")
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.095  # each of validation and test: a tenth of what `drop_leaked` leaves
LEAK_WORDS = 13  # so long a run that is verbatim in train counts as leaked
MAX_COPIED = 17  # a row that shares as many words in such runs with the other side is left out


def to_json(*cells: str) -> bytes:
    """The cells as one line to hash: they cannot run into each other."""
    return json.dumps(cells, ensure_ascii=False).encode("utf-8", "surrogatepass")


def sha256_text(*parts: str) -> str:
    """Hex digest of the parts."""
    return hashlib.sha256(to_json(*parts)).hexdigest()


# --- groups -------------------------------------------------------------------------------------------------


def link_groups(pairs: pd.DataFrame) -> list[str]:
    """One id per row, equal for rows that are related, directly or over others, by any link of links.py.

    The id is made of the texts of the group, so it does not depend on the order of rows.
    """
    links = [similar_answers(pairs), similar_stems(pairs), similar_names(pairs)]
    for key in link_keys(pairs).values():
        row = pd.Series(range(len(pairs)))[(key != "").to_numpy()]
        links.append((row, row.groupby(key.to_numpy()[row]).transform("first")))
    i, j = np.concatenate(links, axis=1)
    graph = sparse.coo_matrix((np.ones(len(i)), (i, j)), shape=(len(pairs), len(pairs)))
    component = connected_components(graph, directed=False)[1]
    digests = pd.Series(list(map(sha256_text, pairs["question"], pairs["answer"]))).str[:16]
    return digests.groupby(component).transform("min").tolist()


def make_pairs(rows: list[Row], funnel: list[dict]) -> pd.DataFrame:
    """Cleaned rows as a frame with their leakage groups, and the funnel in its `attrs`."""
    pairs = pd.DataFrame(rows)
    pairs = pairs.assign(group=link_groups(pairs)).reindex(columns=list(COLUMNS), fill_value="")
    pairs.attrs["funnel"] = funnel
    return pairs


# --- the split ----------------------------------------------------------------------------------------------


def assign_splits(groups: list[str], sources: list[str], seed: int, official: Sequence[str]) -> list[str]:
    """The split of each row: per source, groups in an order that the seed decides fill test, then validation.

    A group that no longer fits goes to the next; so each held-out split ends within a few rows of its share.
    The `official` groups are test, and validation is a share of the others.
    """
    counts = pd.crosstab(np.array(groups), np.array(sources))
    sizes = pd.DataFrame({"rows": counts.sum(axis=1), "source": counts.idxmax(axis=1)})  # where most are from
    sizes["order"] = [sha256_text(str(seed), group) for group in sizes.index]
    sizes.loc[official, "order"] = ""  # first
    split_of, must = {}, set(official)
    for _, stratum in sizes.sort_values("order").groupby("source"):
        rest = stratum["rows"].drop(official, errors="ignore").sum()
        room = dict.fromkeys(("test", "validation"), round(HELD_OUT_SHARE * rest))
        for group, rows in stratum["rows"].items():
            fits = next((name for name, left in room.items() if rows <= left), "train")
            split_of[group] = "test" if group in must else fits
            room[split_of[group]] = room.get(split_of[group], 0) - rows
    for name in ("test", "validation"):  # all groups are larger than a tenth: the smallest must do
        if name not in split_of.values():
            in_train = sizes[[split_of[group] == "train" for group in sizes.index]]
            split_of[in_train.sort_values(["rows", "order"]).index[0]] = name
    return [split_of[group] for group in groups]


def split_pairs(pairs: pd.DataFrame, seed: int = 42, by: str = "group") -> DatasetDict:
    """Split 80/10/10 by leakage group, or row by row (`by="random"`), as we assume the original report did.

    `by="official"`: test is AfriMed-QA's official test rows with their relatives, and a tenth of MedQuAD.
    Rows that share much text with the other side are left out (but for "random"), and it is said.
    Rows of a split are in an order that the seed decides, so its first n rows are a random sample of it.
    """
    if by not in ("group", "official", "random"):
        raise ValueError(f"Cannot split by {by!r}; expected 'group', 'official' or 'random'.")
    official = pairs["group"][(pairs["official"] == "test") & (by == "official")].unique().tolist()
    if by == "official" and not official:
        raise ValueError("No pair is of AfriMed-QA's official test; expected 'test' in column official.")
    order = [sha256_text(str(seed), *row) for row in zip(pairs["question"], pairs["answer"], strict=True)]
    units = order if by == "random" else pairs["group"].tolist()
    if (count := len(set(units))) < 3:
        raise ValueError(f"All {len(pairs)} pairs are in {count} group{'s' * (count > 1)} of related rows; "
                         "expected 3 groups or more, one each for train, validation and test.")
    pairs = pairs.assign(split=assign_splits(units, pairs["source"].tolist(), seed, official), order=order)
    if "train" not in set(pairs["split"]):
        raise ValueError(f"The largest group of related rows has {pairs['group'].value_counts().max():,} of "
                         f"{len(pairs):,}, so none are left to train on; expected smaller groups.")
    pairs = (pairs if by == "random" else drop_leaked(pairs)).sort_values("order")
    cells = {name: pairs.loc[pairs["split"] == name, list(COLUMNS)].to_dict("list") for name in SPLITS}
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in cells.items()})


def drop_leaked(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs without rows that share MAX_COPIED words or more with the other side.

    Training rows leave first. Templates stay, and answers to "Is X inherited?": without them train would say
    "dominant" too rarely. Then test rows leave that still share as much with train, or whose disease MedQuAD
    has there in another spelling; but if they are most of the test, they stay. Validation keeps all.
    """
    stays = pairs["question"].str.contains("inherited").to_numpy()  # few paragraphs answer it
    in_train, in_test = ((pairs["split"] == name).to_numpy() for name in ("train", "test"))
    held_out, left, runs = ~in_train, in_train.copy(), Runs(pairs, LEAK_WORDS)
    while (is_copy := (runs.count_copied(left, held_out, templates=False) >= MAX_COPIED) & ~stays).any():
        left &= ~is_copy  # without it a text may stand under fewer diseases and be no template any more
    left = left if left.any() else in_train
    tests = in_test & ~spelled_alike(pairs, left) & (runs.count_copied(in_test, left) < MAX_COPIED)
    if 2 * tests.sum() < in_test.sum():
        print(f"{in_test.sum() - tests.sum():,} of {in_test.sum():,} test rows share text with train: "
              "most of them, so they stay. Scores on this test say little of new questions.")
        tests = in_test
    if lost := len(pairs) - len(kept := pairs[left | tests | (held_out & ~in_test)]):
        print(f"{lost:,} rows are left out, since they share text or a disease with the other side: "
              f"{(in_train & ~left).sum():,} of train's {in_train.sum():,}, "
              f"{(in_test & ~tests).sum():,} of test's {in_test.sum():,}.")
    return kept


def spelled_alike(pairs: pd.DataFrame, in_train: np.ndarray) -> np.ndarray:
    """(N,) whether MedQuAD's disease of a row is among those of a mask, in this or nearly this spelling."""
    names = pairs["focus_area"].where(pairs["source"] == "medquad", "").map(spellings)
    return ~names.map(set().union(*names[in_train]).isdisjoint).to_numpy(bool)


def hash_splits(splits: DatasetDict) -> dict[str, str]:
    """SHA-256 of each split's content, not of its Arrow file: one JSON line per row, cells as in COLUMNS."""
    digests = {}
    for name, split in splits.items():
        cells = split[:]
        rows = zip(*(cells[column] for column in COLUMNS if column in cells), strict=True)
        digests[name] = hashlib.sha256(b"".join(to_json(*row) + b"\n" for row in rows)).hexdigest()
    return digests


# --- what has leaked ----------------------------------------------------------------------------------------


def join_splits(splits: DatasetDict) -> tuple[pd.DataFrame, Runs, np.ndarray]:
    """All N rows with their split, the runs of 13 words in their answers, and (N,) words of each answer."""
    frame = pd.concat([splits[name].to_pandas().assign(split=name) for name in SPLITS], ignore_index=True)
    runs = Runs(frame, LEAK_WORDS)
    return frame, runs, np.bincount(runs.row, minlength=len(frame))


def train_overlap(splits: DatasetDict) -> np.ndarray:
    """(test rows,) the share of an answer's words that stands in 13 words in a row of a training answer."""
    frame, runs, words = join_splits(splits)
    in_test, in_train = ((frame["split"] == name).to_numpy() for name in ("test", "train"))
    return (runs.count_copied(in_test, in_train) / np.maximum(words, 1))[in_test]


def leakage_report(splits: DatasetDict) -> pd.DataFrame:
    """How many held-out rows have a relative in train, and how many words of answers are verbatim there.

    Returns:
        per held-out split and check a row: split, check, rows (that the check applies to; the checks of words
        count words), in_train, percent.
    """
    frame, runs, words = join_splits(splits)
    in_train = (frame["split"] == "train").to_numpy()
    found = {check: (key != "", (key != "") & key.isin(set(key[in_train])))
             for check, key in link_keys(frame).items()}
    alike = spelled_alike(frame, in_train)
    found["disease spelled nearly alike (MedQuAD)"] = (frame["focus_area"] != "", alike)
    found["words of the answer in a run of 13"] = (words, runs.count_copied(~in_train, in_train))
    report = []
    for name in ("test", "validation"):
        held_out = frame["split"] == name
        for check, counts in found.items():
            rows, leaked = (int(count[held_out].sum()) for count in counts)
            report.append({"split": name, "check": check, "rows": rows, "in_train": leaked,
                           "percent": 100 * leaked / max(rows, 1)})
    return pd.DataFrame(report)
