"""What links two rows: a key that they share, or much of the answer's text.

A template (a paragraph on inheritance, say) stands under 20 diseases or more and links none of them.
"""

import re
from functools import cache

import numpy as np
import pandas as pd
from scipy import sparse

from medqa_lib.data.texts import count_words, text_key

MIN_LINK_WORDS = 8  # shorter texts ("All of the above", "Which is true?") may repeat by coincidence
PARAGRAPH_RUNS = 100  # as many shared runs of 8 words link two answers of any length
TEMPLATE_DISEASES = 20
MIN_NAME = 8  # letters: shorter names that differ in one are often two diseases
_VAGUE = {"syndrome", "disease", "disorder", "type", "the", "of", "and"}  # in the singular


def question_key(question: str) -> str:
    """Key of a question; of a multiple-choice question that of its stem, if that is long."""
    stem = question.split("\n", 1)[0]
    return text_key(stem if count_words(stem) >= MIN_LINK_WORDS else question)


def answer_key(answer: str) -> str:
    """Key of an answer of eight words or more, else ""."""
    return text_key(answer) if count_words(answer) >= MIN_LINK_WORDS else ""


@cache
def disease_key(name: str) -> str:
    """Key that a disease's names share: `"gaucher"` for "Gauchers disease (type 1)" and "Gaucher type"."""
    words = text_key(re.sub(r"\([^()]*\)", " ", name)).split()
    words = {word.rstrip("s") if len(word) > 3 else word for word in words}
    return " ".join(sorted(words - _VAGUE)) or text_key(name) or name


@cache
def spellings(name: str) -> set[str]:
    """Keys of which two names share one if they differ in spaces, hyphens or a letter."""
    key = "".join(word for word in text_key(name).split() if word not in _VAGUE)
    return {key, *(key[:i] + key[i + 1:] for i in range(len(key)))} if len(key) >= MIN_NAME else set()


def link_keys(pairs: pd.DataFrame) -> dict[str, pd.Series]:
    """Check -> the key per row. Rows with the same key are relatives; "" has none."""
    answer = pairs["answer"].map(answer_key)
    disease = pairs["focus_area"].map(disease_key)
    is_template = disease.groupby(answer).transform("nunique") >= TEMPLATE_DISEASES
    return {"same question": pairs["question"].map(question_key),
            "same answer (8 words or more)": answer.mask(is_template, ""),
            "same disease (MedQuAD)": disease}


class Runs:
    """The runs of n words in answers: run k has number `run[k]` and begins at word `place[k]` of row `of[k]`.

    `row` has the row of each word. A row without a disease counts with its answer where diseases are counted.
    """

    def __init__(self, pairs: pd.DataFrame, n: int):
        keys = pairs["answer"].map(text_key)
        words = [key.split() for key in keys]
        self.n, self.row = n, np.repeat(np.arange(len(words)), [len(row) for row in words])
        run = pd.factorize(np.array([word for row in words for word in row], dtype=object))[0]
        width = 1
        while width < n:  # number runs of two words, then of four, ...: exact, as a hash would not be
            step = min(width, n - width)
            run, width = pd.factorize(run[:-step].astype(np.int64) << 32 | run[step:])[0], width + step
        self.place = np.flatnonzero(self.row[:len(run)] == self.row[n - 1:])
        self.of, (self.run, numbers) = self.row[self.place], pd.factorize(run[self.place])
        self.count = len(numbers)
        disease = pairs["focus_area"].map(disease_key)
        self.disease = pd.factorize(disease.where(disease != "", keys))[0]

    def find_templates(self, among: np.ndarray) -> np.ndarray:
        """Mask of the numbers whose runs are templates among the rows of a mask."""
        under = pd.unique((self.run << 32 | self.disease[self.of])[among[self.of]])
        return np.bincount(under >> 32, minlength=self.count) >= TEMPLATE_DISEASES

    def count_copied(self, rows: np.ndarray, others: np.ndarray, templates: bool = True) -> np.ndarray:
        """(P,) how many words of each of the `rows` stand inside a run that the `others` have too (masks)."""
        is_there = np.zeros(self.count, bool)
        is_there[self.run[others[self.of]]] = True
        if not templates:
            is_there &= ~self.find_templates(rows | others)
        begins = self.place[is_there[self.run] & rows[self.of]]
        is_copied = np.zeros(len(self.row), bool)
        for step in range(self.n):
            is_copied[begins + step] = True
        return np.bincount(self.row[is_copied], minlength=len(rows))


def similar_answers(pairs: pd.DataFrame) -> np.ndarray:
    """(2, P) places i < j of answers that share half of the shorter one's runs of 8 words, or 100 runs.

    Templates count as not shared. Answers that share half of their runs of 13 words are among these.
    """
    once = np.flatnonzero(~pairs[["answer", "focus_area"]].duplicated())  # equal answers have a key
    runs = Runs(pairs.iloc[once], MIN_LINK_WORDS)
    cells = (np.ones(len(runs.run), np.int32), (runs.of, runs.run))
    matrix = sparse.csr_matrix(cells, (len(once), runs.count))
    matrix.data[:] = 1
    shared = matrix[:, ~runs.find_templates(np.ones(len(once), bool))]
    shared = sparse.triu(shared @ shared.T, k=1).tocoo()
    places = np.stack([shared.row, shared.col])
    shorter = np.diff(matrix.indptr)[places].min(axis=0)
    return once[places[:, (2 * shared.data >= shorter) | (shared.data >= PARAGRAPH_RUNS)]]


def near_equal(texts: pd.Series, cosine: float, **settings) -> np.ndarray:
    """(2, P) labels of texts whose TF-IDF vectors have this cosine or more; "" takes no part."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = texts[texts != ""]
    if texts.empty:
        return np.empty((2, 0), int)
    weights = TfidfVectorizer(**settings).fit_transform(texts.tolist())
    found = sparse.triu(weights @ weights.T, k=1).tocoo()
    is_close = found.data >= cosine - 1e-9  # rounding aside
    return texts.index.to_numpy()[np.stack([found.row, found.col])[:, is_close]]


def similar_stems(pairs: pd.DataFrame) -> np.ndarray:
    """(2, P) places of AfriMed-QA's questions whose stems are nearly equal."""
    questions = pairs["question"].reset_index(drop=True)[(pairs["source"] == "afrimedqa").to_numpy()]
    return near_equal(questions.str.split("\n").str[0].map(text_key), 0.9, token_pattern=r"\S+")


def similar_names(pairs: pd.DataFrame) -> np.ndarray:
    """(2, P) places of MedQuAD's diseases, the first row of each, whose names are spelled nearly alike."""
    names = pairs["focus_area"].reset_index(drop=True)[(pairs["source"] == "medquad").to_numpy()]
    names = names.map(disease_key).drop_duplicates()
    return near_equal(names, 0.75, analyzer="char_wb", ngram_range=(3, 3))
