"""Passages of training answers before a question: found by BM25 over their own questions, numbered, cited.

A supported sentence says what a passage says. It need not be true of the disease that was asked about.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medqa_lib.evaluation.facts import find_genes, find_modes, find_numbers

WORDS, PASSAGES, TITLE_WORDS = 100, 2, 30  # of a passage; before a question; of a passage's own question
K1, B = 1.2, 0.75  # BM25's usual constants
SUPPORTED = 0.5  # share of a sentence's words that a passage must have
ENOUGH = 0.05  # share of supported sentences below which an answer has no source; notebook 23 chooses it
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Passage:
    """Up to WORDS words of a training answer. `similarity`: its share of the largest score, 0 to 1."""

    title: str
    text: str
    similarity: float = 0.0


class Index:
    """BM25 (Robertson and Zaragoza 2009) over the questions of a training split; it needs no network."""

    def __init__(self, train):
        from sklearn.feature_extraction.text import CountVectorizer

        self.train, self.groups = train, pd.Series(range(len(train))).groupby(list(train["group"])).indices
        self.counter = CountVectorizer()
        counts = self.counter.fit_transform(train["question"]).astype(float).tocsr()
        rows, words = counts.shape
        found = np.bincount(counts.indices, minlength=words)
        rarity = np.log(1 + (rows - found + 0.5) / (found + 0.5))
        length = np.asarray(counts.sum(axis=1)).ravel()
        norm = np.repeat(K1 * (1 - B + B * length / length.mean()), np.diff(counts.indptr))
        counts.data = rarity[counts.indices] * counts.data * (K1 + 1) / (counts.data + norm)
        self.weights, self.rarity = counts, rarity

    def find(self, questions: Sequence[str], groups: Sequence[str] | None = None,
             kind: str = "nearest") -> list[list[Passage]]:
        """For each question PASSAGES passages, those of its own group left out.

        Args:
            kind: "nearest", "random", "none", or "mixed": every third question gets random ones, distractors
                only, so that training shows passages that do not help, too (RAFT, Zhang et al. 2024).
        """
        if kind == "none":
            return [[] for _ in questions]
        rng = np.random.default_rng(42)
        asked, found = self.counter.transform(questions).astype(float), []
        best = np.maximum(asked @ (self.rarity * (K1 + 1)), 1e-9)  # no answer's score is larger
        for start in range(0, len(questions), 256):
            scores = (asked[start:start + 256] @ self.weights.T).toarray()
            for row, score in enumerate(scores, start):
                if kind == "random" or kind == "mixed" and row % 3 == 2:
                    score = rng.random(len(score)) * 1e-6
                if groups is not None:
                    score[self.groups.get(groups[row], [])] = -1
                found.append(self._read(score, best[row]))
        return found

    def _read(self, score: np.ndarray, best: float) -> list[Passage]:
        passages = []
        for _ in range(min(PASSAGES, len(score))):
            place = int(score.argmax())  # of equal ones the first
            row, similarity = self.train[place], float(score[place] / best)
            score[place] = -1
            title = " ".join(row["question"].split()[:TITLE_WORDS])
            passages += [Passage(title, text, similarity) for text in cut_passages(row["answer"])
                         if similarity > 0]
        return passages[:PASSAGES]


def add_passages(split, index: Index, kind: str = "nearest"):
    """The split with passages of other groups before its questions."""
    questions = list(split["question"])
    found = index.find(questions, list(split["group"]), kind)
    return split.remove_columns("question").add_column("question", list(map(ask, questions, found)))


def prepare_training(splits, kind: str) -> dict:
    """Train and validation rows with passages; of the former every third has random ones in any case."""
    index = Index(splits["train"])
    return {"train": add_passages(splits["train"], index, "mixed" if kind == "nearest" else kind),
            "validation": add_passages(splits["validation"], index, kind)}


def cut_passages(answer: str) -> list[str]:
    """The answer in pieces of whole sentences, up to WORDS words each; a longer sentence is cut."""
    pieces: list[list[str]] = [[]]
    for sentence in _SENTENCES.split(answer):
        words = sentence.split()
        for start in range(0, len(words), WORDS):
            part = words[start:start + WORDS]
            if len(pieces[-1]) + len(part) > WORDS:
                pieces.append([])
            pieces[-1] += part
    return [" ".join(piece) for piece in pieces if piece]


def ask(question: str, passages: Sequence[Passage]) -> str:
    """The question with its passages in front: `prompts.format_prompt` makes the instruction of it."""
    texts = [f"[{number}] {each.title}\n{each.text}" for number, each in enumerate(passages, 1)]
    return "\n\n".join([*texts, f"Question: {question}"]) if texts else question


def cite(answer: str, passages: Sequence[Passage], question: str = "") -> list[tuple[str, int | None]]:
    """Each sentence with the number of the first passage that supports it: 0 for none, None for no claim."""
    known = _find_words(question)
    return [(sentence, _find_support(sentence, passages, known))
            for sentence in _SENTENCES.split(answer.strip()) if sentence]


def mark(answer: str, passages: Sequence[Passage], question: str = "") -> str:
    """The answer, after each sentence the number of its passage or "[no source]"."""
    marks = {None: "", 0: " [no source]"}
    return " ".join(sentence + marks.get(number, f" [{number}]")
                    for sentence, number in cite(answer, passages, question))


def has_source(answer: str, passages: Sequence[Passage], question: str = "") -> bool:
    """Whether passages support enough of an answer's sentences."""
    sentences, supported = _count_supported(answer, passages, question)
    return supported >= ENOUGH * max(1, sentences)


def check_answers(index: Index, questions: Sequence[str], answers: Sequence[str]) -> pd.DataFrame:
    """Per answer: the best passage's similarity, sentences that claim something, those of them supported.

    The passages are the nearest ones, whatever the model was shown.
    """
    rows = []
    for question, answer, passages in zip(questions, answers, index.find(questions), strict=True):
        similarity = max((each.similarity for each in passages), default=0.0)
        rows.append((similarity, *_count_supported(answer, passages, question)))
    return pd.DataFrame(rows, columns=["similarity", "sentences", "supported"])


def cite_samples(index: Index, samples: Sequence[dict]) -> list[dict]:
    """Samples, each with its nearest passages' titles (12 words) and what `cite` gives for its sentences."""
    found = index.find([each["question"] for each in samples])
    return [each | {"passages": [" ".join(passage.title.split()[:12]) for passage in passages],
                    "support": [number for _, number in cite(each["answer"], passages, each["question"])]}
            for each, passages in zip(samples, found, strict=True)]


def _count_supported(answer: str, passages: Sequence[Passage], question: str) -> tuple[int, int]:
    numbers = [number for _, number in cite(answer, passages, question) if number is not None]
    return len(numbers), sum(number > 0 for number in numbers)


def _find_support(sentence: str, passages: Sequence[Passage], known: set[str]) -> int | None:
    """A passage supports a sentence if it states all of its facts and half of its unknown words."""
    words, facts = _find_words(sentence) - known, _find_facts(sentence)
    if not words and not facts:
        return None
    for number, each in enumerate(passages, 1):
        text = f"{each.title} {each.text}"
        if facts <= _find_facts(text) and len(words & _find_words(text)) >= SUPPORTED * len(words):
            return number
    return 0


def _find_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def _find_facts(text: str) -> set:
    return find_modes(text) | find_genes(text) | find_numbers(text)
