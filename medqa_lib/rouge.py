"""rouge_score's ROUGE, the same numbers several times sooner."""

import functools
import re
from collections import Counter
from collections.abc import Sequence


def tokenize_rouge(text: str) -> list[str]:
    """rouge_score's tokens: runs of ASCII letters and digits, those over three characters stemmed."""
    return [_stem(token) if len(token) > 3 else token for token in re.findall("[a-z0-9]+", text.lower())]


@functools.lru_cache(maxsize=100_000)  # stems take most of ROUGE's time
def _stem(token: str) -> str:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem(token)


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
