"""Group-aware train/validation/test split and a leakage report.

Rows belong together if they share question, answer or disease, or if their answers are almost the same. All
of it is exact and rests on SHA-256 and sorting, so the same pairs give the same splits on any machine.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from medqa_lib.data.cleaning import Row
from medqa_lib.data.texts import count_words, text_key

COLUMNS = ("question", "answer", "references", "source", "group", "choices", "focus_area", "official")
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1  # each of validation and test
MIN_LINK_WORDS = 8  # shorter texts ("All of the above", "Which is true?") may repeat by coincidence


def to_json(*cells: str) -> bytes:
    """The cells as one line to hash: they cannot run into each other."""
    return json.dumps(cells, ensure_ascii=False).encode("utf-8", "surrogatepass")


def sha256_text(*parts: str) -> str:
    """Hex digest of the parts."""
    return hashlib.sha256(to_json(*parts)).hexdigest()


# --- what links two rows ------------------------------------------------------------------------------------


def question_key(question: str) -> str:
    """Key of a question; of a multiple-choice question that of its stem, if that is long."""
    stem = question.split("\n", 1)[0]
    return text_key(stem if count_words(stem) >= MIN_LINK_WORDS else question)


def answer_key(answer: str) -> str:
    """Key of an answer of eight words or more, else ""."""
    return text_key(answer) if count_words(answer) >= MIN_LINK_WORDS else ""


def link_keys(pairs: pd.DataFrame) -> dict[str, pd.Series]:
    """Check -> the key per row. Rows with the same key are relatives; "" has none."""
    return {"same question": pairs["question"].map(question_key),
            "same answer (8 words or more)": pairs["answer"].map(answer_key),
            "same disease (MedQuAD)": pairs["focus_area"].map(lambda area: text_key(area) or area)}


def shingle_matrix(answers: list[str]) -> sparse.csr_matrix:
    """(answers, shingles) of 0 and 1: which five words in a row are in which answer; rare shingles first."""
    words = [text_key(answer).split() for answer in answers]
    answer_of = np.repeat(np.arange(len(words)), [len(row) for row in words])
    word = pd.factorize(np.array([word for row in words for word in row], dtype=object))[0].astype(np.int64)
    shingle = word
    for place in range(1, 5):  # number runs of two words, then of three, ...: exact, as a hash would not be
        shingle = pd.factorize(shingle[:-1] << 32 | word[place:])[0]
    within = answer_of[:-4] == answer_of[4:]
    rows, (shingle, _) = answer_of[:-4][within], pd.factorize(shingle[within])
    matrix = sparse.csr_matrix((np.ones(len(rows), np.int32), (rows, shingle)),
                               shape=(len(words), shingle.max(initial=-1) + 1))
    matrix = matrix[:, np.argsort(np.bincount(shingle), kind="stable")]
    matrix.data[:] = 1
    matrix.sort_indices()
    return matrix


def near_duplicates(answers: list[str], contained: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of answers with a Jaccard similarity of word 5-shingles of at least 4/5, exactly.

    With `contained` also pairs where one has all shingles of the other, so the rarest, which is its first.

    Prefix filter (Chaudhuri et al. 2006; Bayardo et al. 2007): two sets that are so similar, the smaller of n
    shingles, share at least ceil(4n/5); so, with each set sorted by rarity, they meet within their first
    n - ceil(4n/5) + 1. Only pairs that meet there, among rare shingles, are compared in full.

    Returns:
        (P,), (P,) places i < j of the pairs; answers under eight words take no part.
    """
    shingles = shingle_matrix([answer if answer_key(answer) else "" for answer in answers])
    sizes = np.diff(shingles.indptr)
    answer_of = np.repeat(np.arange(len(answers)), sizes)
    rank = np.arange(shingles.nnz) - shingles.indptr[answer_of]
    in_prefix = rank <= (sizes - (4 * sizes + 4) // 5)[answer_of]
    places = (answer_of[in_prefix], shingles.indices[in_prefix])
    prefixes = sparse.csr_matrix((np.ones(len(places[0]), np.int32), places), shape=shingles.shape)
    meet = prefixes @ (shingles if contained else prefixes).T
    i, j = sparse.triu(meet + meet.T, k=1).nonzero()
    parts = np.array_split(np.arange(len(i)), len(i) // 20_000 + 1)  # raw data has millions
    shared = np.concatenate([shingles[i[some]].multiply(shingles[j[some]]).sum(axis=1).A1 for some in parts])
    similar = 5 * shared >= 4 * (sizes[i] + sizes[j] - shared)
    if contained:
        similar |= shared == np.minimum(sizes[i], sizes[j])
    return i[similar], j[similar]


def link_groups(pairs: pd.DataFrame, contained: bool = False) -> list[str]:
    """One id per row, equal for rows that share, directly or over others, question, answer or disease.

    With `contained`, rows also share an answer if one is part of the other.

    The id is made of the texts of the group, so it does not depend on the order of rows.
    """
    links = [near_duplicates(pairs["answer"].tolist(), contained)]
    for key in link_keys(pairs).values():
        row = pd.Series(range(len(pairs)))[(key != "").to_numpy()]
        links.append((row, row.groupby(key.to_numpy()[row]).transform("first")))
    i, j = np.concatenate(links, axis=1)
    graph = sparse.coo_matrix((np.ones(len(i)), (i, j)), shape=(len(pairs), len(pairs)))
    component = connected_components(graph, directed=False)[1]
    digests = pd.Series(list(map(sha256_text, pairs["question"], pairs["answer"]))).str[:16]
    return digests.groupby(component).transform("min").tolist()


def make_pairs(rows: list[Row], funnel: list[dict], contained: bool = False) -> pd.DataFrame:
    """Cleaned rows as a frame with their leakage groups, and the funnel in its `attrs`."""
    pairs = pd.DataFrame(rows)
    pairs = pairs.assign(group=link_groups(pairs, contained))[list(COLUMNS)]
    pairs.attrs["funnel"] = funnel
    return pairs


# --- the split ----------------------------------------------------------------------------------------------


def assign_splits(groups: list[str], sources: list[str], seed: int) -> list[str]:
    """The split of each row: per source, groups in an order that the seed decides fill test, then validation.

    A group that no longer fits goes to the next; so each held-out split ends within a few rows of its tenth.
    """
    frame = pd.DataFrame({"group": groups, "source": sources})
    sizes = frame.groupby("group").agg(rows=("source", "size"), source=("source", "min"))
    sizes["order"] = [sha256_text(str(seed), group) for group in sizes.index]
    split_of = {}
    for _, stratum in sizes.sort_values("order").groupby("source"):
        room = dict.fromkeys(("test", "validation"), round(HELD_OUT_SHARE * stratum["rows"].sum()))
        for group, rows in stratum["rows"].items():
            split_of[group] = next((name for name, left in room.items() if rows <= left), "train")
            room[split_of[group]] = room.get(split_of[group], 0) - rows
    for name in ("test", "validation"):  # all groups are larger than a tenth: the smallest must do
        if name not in split_of.values():
            in_train = sizes[[split_of[group] == "train" for group in sizes.index]]
            split_of[in_train.sort_values(["rows", "order"]).index[0]] = name
    return [split_of[group] for group in groups]


def split_pairs(pairs: pd.DataFrame, seed: int = 42, by: str = "group") -> DatasetDict:
    """Split 80/10/10 by leakage group, or row by row (`by="random"`), as we assume the original report did.

    Rows of a split are in an order that the seed decides, so its first n rows are a random sample of it.
    """
    if by not in ("group", "random"):
        raise ValueError(f"Cannot split by {by!r}; expected 'group' or 'random'.")
    if missing := [name for name in COLUMNS if name not in pairs.columns]:
        raise ValueError(f"The pairs lack the columns {missing}; make them with merge_sources or pairs_from.")
    order = [sha256_text(str(seed), *row) for row in zip(pairs["question"], pairs["answer"], strict=True)]
    units = pairs["group"].tolist() if by == "group" else order
    if (count := len(set(units))) < 3:
        raise ValueError(f"All {len(pairs)} pairs are in {count} group{'s' * (count > 1)} of related rows; "
                         "expected 3 groups or more, one each for train, validation and test.")
    split_of = assign_splits(units, pairs["source"].tolist(), seed)
    rows = pairs.assign(split=split_of, order=order).sort_values("order")
    cells = {name: rows.loc[rows["split"] == name, list(COLUMNS)].to_dict("list") for name in SPLITS}
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in cells.items()})


def hash_splits(splits: DatasetDict) -> dict[str, str]:
    """SHA-256 of each split's content, not of its Arrow file: one JSON line per row, cells as in COLUMNS."""
    digests = {}
    for name, split in splits.items():
        cells = split[:]  # splits of the first cleaning have fewer columns
        rows = zip(*(cells[column] for column in COLUMNS if column in cells), strict=True)
        digests[name] = hashlib.sha256(b"".join(to_json(*row) + b"\n" for row in rows)).hexdigest()
    return digests


def leakage_report(splits: DatasetDict) -> pd.DataFrame:
    """How many held-out rows have a relative in train: same question, answer, disease, near-duplicate answer.

    Returns:
        per held-out split and check a row: split, check, rows (that the check applies to), in_train, percent.
    """
    frame = pd.concat([splits[name].to_pandas().assign(split=name) for name in SPLITS], ignore_index=True)
    in_train = frame["split"] == "train"
    found = {check: (key != "", key.isin(set(key[in_train]))) for check, key in link_keys(frame).items()}
    i, j = near_duplicates(frame["answer"].tolist())
    has_twin = frame.index.isin([*i[in_train[j]], *j[in_train[i]]])
    found["near-duplicate answer (8 words or more)"] = (found["same answer (8 words or more)"][0], has_twin)
    report = []
    for name in ("test", "validation"):
        for check, (applies, leaks) in found.items():
            asked = applies & (frame["split"] == name)
            rows, leaked = int(asked.sum()), int((asked & leaks).sum())
            report.append({"split": name, "check": check, "rows": rows, "in_train": leaked,
                           "percent": 100 * leaked / max(rows, 1)})
    return pd.DataFrame(report)
