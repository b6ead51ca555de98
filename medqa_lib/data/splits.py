"""Group-aware train/validation/test split and a leakage report.

Rows belong together if they share question, answer or disease, or if their answers are almost the same. All
of it is exact and rests on SHA-256 and sorting, so the same pairs give the same splits on any machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from medqa_lib.data.texts import text_key

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

COLUMNS = ("question", "answer", "source", "group", "choices", "focus_area")
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1  # each of validation and test
MIN_LINK_WORDS = 8  # shorter texts ("All of the above", "Which is true?") may repeat by coincidence


def sha256_text(*parts: str) -> str:
    """Hex digest of the parts; parts cannot run into each other."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


# --- what links two rows ------------------------------------------------------------------------------------


def question_key(question: str) -> str:
    """Key of a question; of a multiple-choice question that of its stem, if that is long."""
    stem = question.split("\n", 1)[0]
    return text_key(stem if len(stem.split()) >= MIN_LINK_WORDS else question)


def answer_key(answer: str) -> str:
    """Key of an answer of eight words or more, else ""."""
    return text_key(answer) if len(answer.split()) >= MIN_LINK_WORDS else ""


def shingle_matrix(answers: list[str]) -> sparse.csr_matrix:
    """(answers, shingles) of 0 and 1: which five words in a row are in which answer; rare shingles first.

    Shingles are numbered exactly (pairs of words, pairs of pairs, and the fifth word), so none collide.
    """

    def number_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return pd.factorize(left << 32 | right)[0].astype(np.int64)

    words = [text_key(answer).split() for answer in answers]
    answer_of = np.repeat(np.arange(len(words)), [len(row) for row in words])
    word = pd.factorize(np.array([word for row in words for word in row], dtype=object))[0].astype(np.int64)
    pair = number_pairs(word[:-1], word[1:])
    four = number_pairs(pair[:-2], pair[2:])
    five = number_pairs(four[:-1], word[4:])
    starts, ends = answer_of[:len(five)], answer_of[len(answer_of) - len(five):]
    within = starts == ends
    rows, (shingle, _) = starts[within], pd.factorize(five[within])
    by_rarity = np.argsort(np.bincount(shingle), kind="stable")
    places = (rows, np.argsort(by_rarity)[shingle])
    matrix = sparse.csr_matrix((np.ones(len(rows), np.int32), places), shape=(len(words), len(by_rarity)))
    matrix.data[:] = 1
    matrix.sort_indices()
    return matrix


def near_duplicates(answers: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of answers with a Jaccard similarity of word 5-shingles of at least 4/5, exactly.

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
    i, j = sparse.triu(prefixes @ prefixes.T, k=1).nonzero()
    shared = np.zeros(len(i), np.int64)
    for some in np.array_split(np.arange(len(i)), len(i) // 20_000 + 1):  # raw data has millions
        shared[some] = np.asarray(shingles[i[some]].multiply(shingles[j[some]]).sum(axis=1)).ravel()
    similar = 5 * shared >= 4 * (sizes[i] + sizes[j] - shared)
    return i[similar], j[similar]


def link_groups(pairs: pd.DataFrame) -> list[str]:
    """One id per row, equal for rows that share, directly or over others, question, answer or disease.

    The id is made of the texts of the group, so it does not depend on the order of rows.
    """
    keys = {"question": map(question_key, pairs["question"]), "answer": map(answer_key, pairs["answer"]),
            "focus_area": map(text_key, pairs["focus_area"])}
    first: dict[tuple[str, str], int] = {}
    links = [(first.setdefault((kind, key), row), row)
             for kind, column in keys.items() for row, key in enumerate(column) if key]
    links = np.array([*links, *zip(*near_duplicates(pairs["answer"].tolist()), strict=True)], dtype=np.int64)
    shape = (len(pairs), len(pairs))
    graph = sparse.coo_matrix((np.ones(len(links)), links.reshape(-1, 2).T), shape=shape)
    component = connected_components(graph, directed=False)[1]
    texts = zip(pairs["question"], pairs["answer"], strict=True)
    digests = pd.Series([sha256_text(question, answer)[:16] for question, answer in texts])
    return digests.groupby(component).transform("min").tolist()


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
    return [split_of[group] for group in groups]


def split_pairs(pairs: pd.DataFrame, seed: int = 42, by: str = "group") -> DatasetDict:
    """Split 80/10/10 by leakage group, or row by row (`by="random"`), as we assume the original report did.

    Rows of a split are in an order that the seed decides, so its first n rows are a random sample of it.

    Raises:
        ValueError: `by` is neither, a column of `merge_sources` is missing, or a split is left empty.
    """
    from datasets import Dataset, DatasetDict

    if by not in ("group", "random"):
        raise ValueError(f"Cannot split by {by!r}; expected 'group' or 'random'.")
    if missing := [name for name in COLUMNS if name not in pairs.columns]:
        raise ValueError(f"The pairs lack the columns {missing}; make them with merge_sources or pairs_from.")
    order = [sha256_text(str(seed), *row) for row in zip(pairs["question"], pairs["answer"], strict=True)]
    units = pairs["group"].tolist() if by == "group" else order
    split_of = assign_splits(units, pairs["source"].tolist(), seed)
    if empty := [name for name in SPLITS if name not in split_of]:
        raise ValueError(f"{len(pairs)} pairs in {pairs['group'].nunique()} groups are too few for 80/10/10: "
                         f"{', '.join(empty)} would be empty. Give more or smaller groups.")
    rows = pairs[list(COLUMNS)].assign(split=split_of, order=order).sort_values("order")
    return DatasetDict({name: Dataset.from_dict({column: part[column].tolist() for column in COLUMNS})
                        for name in SPLITS for part in [rows[rows["split"] == name]]})


@functools.lru_cache(maxsize=16)
def hash_split(split: Dataset) -> str:
    """SHA-256 of the content, not of the Arrow file: one JSON line per row, cells in the order of COLUMNS."""
    digest, columns = hashlib.sha256(), split[:]
    for row in zip(*(columns[name] for name in COLUMNS), strict=True):
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def hash_splits(splits: DatasetDict) -> dict[str, str]:
    """`hash_split` of every split, by name; each is computed once per process."""
    return {name: hash_split(split) for name, split in splits.items()}


def leakage_report(splits: DatasetDict) -> pd.DataFrame:
    """How many held-out rows have a relative in train: same question, answer, disease, near-duplicate answer.

    Returns:
        per held-out split and check a row: split, check, rows (that the check applies to), in_train, percent.
    """
    return _leakage_report(*(splits[name] for name in SPLITS)).copy()


@functools.lru_cache(maxsize=4)
def _leakage_report(*splits: Dataset) -> pd.DataFrame:
    frames = [split.to_pandas().assign(split=name) for name, split in zip(SPLITS, splits, strict=True)]
    frame = pd.concat(frames, ignore_index=True)
    in_train = frame["split"] == "train"
    keys = {"same question": frame["question"].map(question_key),
            "same answer (8 words or more)": frame["answer"].map(answer_key),
            "same disease (MedQuAD)": frame["focus_area"].map(text_key)}
    found = {check: (key != "", key.isin(set(key[in_train]))) for check, key in keys.items()}
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
