"""Passages of training answers before a question: found by BM25 over their own questions, and numbered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORDS, PASSAGES, TITLE_WORDS = 100, 2, 30  # of a passage; before a question; of a passage's own question
K1, B = 1.2, 0.75  # BM25's usual constants
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

        self.train, self.groups = train, np.array(train["group"])
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
            kind: "nearest", "random", or "mixed": every third question gets random ones, distractors only, so
                that training shows passages that do not help, too (RAFT, Zhang et al. 2024).
        """
        rng = np.random.default_rng(42)
        asked, found = self.counter.transform(questions).astype(float), []
        best = np.maximum(asked @ (self.rarity * (K1 + 1)), 1e-9)  # no answer's score is larger
        for start in range(0, len(questions), 256):
            scores = (asked[start:start + 256] @ self.weights.T).toarray()
            for row, score in enumerate(scores, start):
                if kind == "random" or kind == "mixed" and row % 3 == 2:
                    score = rng.random(len(score)) * 1e-6
                if groups is not None:
                    score[self.groups == groups[row]] = -1
                found.append(self._read(score, best[row]))
        return found

    def _read(self, score: np.ndarray, best: float) -> list[Passage]:
        passages = []
        for place in np.argsort(-score, kind="stable")[:PASSAGES]:
            row, similarity = self.train[int(place)], float(score[place] / best)
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
    """Train and validation rows with passages; of the former every third has random ones."""
    index = Index(splits["train"])
    return {"train": add_passages(splits["train"], index, "mixed"),
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
