"""rouge_score's ROUGE and sacrebleu's chrF, the same numbers four to twenty times sooner."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


def tokenize_rouge(text: str) -> list[str]:
    """rouge_score's tokens: runs of ASCII letters and digits, those over three characters stemmed."""
    stem = _stemmer()
    return [stem(token) if len(token) > 3 else token for token in re.findall("[a-z0-9]+", text.lower())]


@functools.cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return functools.lru_cache(maxsize=100_000)(PorterStemmer().stem)  # stems take most of ROUGE's time


def score_rouge(tokens: Sequence[str], others: Sequence[str]) -> dict[str, float]:
    """F1 of shared words, pairs of words and of the longest common subsequence, as in rouge_score."""
    scores = {f"rouge{n}": f1(list_ngrams(tokens, n), list_ngrams(others, n)) for n in (1, 2)}
    common = count_common_subsequence(tokens, others)
    return scores | {"rougeL": 2 * common / max(1, len(tokens) + len(others))}


def f1(items: Sequence, others: Sequence) -> float:
    """F1 of two bags: shared items count as often as they are in both."""
    return 2 * (Counter(items) & Counter(others)).total() / max(1, len(items) + len(others))


def list_ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def count_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one integer.

    Hyyro (2004), "Bit-parallel LCS-length computation revisited": rouge_score's number, much sooner.
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << index
    full = row = (1 << len(first)) - 1
    for token in second:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()


def score_chrf(answer: str, reference: str) -> float:
    """chrF2 (Popovic 2015) in 0..100: F of n-grams of 1 to 6 characters without spaces, recall twice."""
    texts = ["".join(text.split()) for text in (answer, reference)]
    letters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    letters = np.unique(letters, return_inverse=True)[1]
    first, second = letters[:len(texts[0])], letters[len(texts[0]):]
    grams, others, shares = first, second, []
    for order in range(1, 7):
        if not min(len(grams), len(others)):
            break
        ids = np.unique(np.concatenate([grams, others]), return_inverse=True)[1]  # every n-gram has a number
        grams, others = ids[:len(grams)], ids[len(grams):]
        counts = [np.bincount(each, minlength=len(ids)) for each in (grams, others)]
        shares.append(np.minimum(*counts).sum() / [len(grams), len(others)])
        grams, others = (some[:-1] << 21 | text[order:] for some, text in ((grams, first), (others, second)))
    precision, recall = np.mean(shares, axis=0) if shares else (0, 0)
    return float(500 * precision * recall / max(4 * precision + recall, 1e-12))
