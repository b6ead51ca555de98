"""The metric panel: what an answer shares with its reference, and how it reads.

`score_answers` gives a row per example, `summarize_scores` the numbers of a table; `evaluation.significance`
resamples the rows, `evaluation/evaluate_metric.py` is the panel as an `evaluate.Metric`.

Units: ROUGE, token F1, BERTScore and shares are in 0..1, BLEU in 0..100, readability in US school grades.
An empty answer or reference scores 0 in every metric (but two empty ones have token F1 = 1, as in SQuAD 2.0).
"""

from __future__ import annotations

import functools
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pandas as pd
import regex
from tqdm import tqdm

HIGHEST_GRADE = 24.0  # an answer without a full stop is one endless sentence: grade 8,811 was seen
BLEU_COLUMNS = ("bleu_hyp_len", "bleu_ref_len",
                *(f"bleu_{part}_{n}" for part in ("match", "total") for n in range(1, 5)))

# Metric -> (label with unit, direction: +1 higher is better, -1 lower is better, 0 only describes).
METRICS = {
    "rouge1": ("ROUGE-1 F1", 1),
    "rouge2": ("ROUGE-2 F1", 1),
    "rougeL": ("ROUGE-L F1", 1),
    "bleu": ("BLEU (0-100)", 1),
    "token_f1": ("Token F1", 1),
    "bertscore_f1": ("BERTScore F1", 1),
    "mcq_accuracy": ("Multiple choice (share correct)", 1),
    "eos_rate": ("Ends with EOS (share)", 1),
    "repeated_4gram_share": ("Repeated 4-grams (share)", -1),
    "question_copy_share": ("Copied from question (share)", -1),
    "words": ("Length (words)", 0),
    "length_ratio": ("Length / reference", 0),
    "flesch_kincaid": ("Flesch-Kincaid (grade)", 0),
    "smog": ("SMOG (grade)", 0),
}
# They read English alone. ROUGE takes words of other scripts whole; where no spaces part them, characters.
LATIN_ONLY = ("bertscore_f1", "flesch_kincaid", "smog")
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+")
_SPACELESS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
# Metric -> the columns that are summed over examples first; any other metric is the mean of its own column.
CORPUS_METRICS = {"bleu": BLEU_COLUMNS, "length_ratio": ("words", "reference_words"),
                  "mcq_accuracy": ("mcq_correct", "mcq_asked")}


def score_answers(predictions: Sequence[str], references: Sequence[str],
                  questions: Sequence[str] | None = None, encoder: str | None = None,
                  stopped: Sequence[bool] | None = None) -> pd.DataFrame:
    """Score each answer against its reference.

    Args:
        predictions, references: N texts each.
        questions: N texts; they add `question_copy_share`.
        encoder: a key of `standin.ENCODERS`; it adds `bertscore_f1`. None skips BERTScore.
        stopped: N flags, whether the model ended the answer with EOS; they add `eos_rate`.
    Returns:
        N rows: the columns of METRICS; for those of CORPUS_METRICS the columns that are summed instead.
        LATIN_ONLY are left out, with a line, where most letters of the references are others.
    Raises:
        ValueError: the lengths differ, or the encoder is unknown.
        RuntimeError: the encoder can be neither downloaded nor found in the cache.
    Example:
        >>> score_answers(["Rest and fluids"], ["Rest, fluids"]).loc[0, "rouge1"]
        0.8
    """
    letters = [letter.isascii() for text in references for letter in text if letter.isalpha()]
    is_latin = 2 * sum(letters) >= len(letters)
    if not is_latin:
        print("The references are not in Latin letters: BERTScore and readability are left out.")
    predictions, references, questions = (
        texts if texts is None else [_SPACELESS.sub(r" \g<0> ", text) for text in texts]
        for texts in (predictions, references, questions))
    pairs = list(zip(predictions, references, strict=True))
    bar = tqdm(pairs, "scoring", unit="answer", leave=False, file=sys.stdout, disable=len(pairs) < 200)
    scores = pd.DataFrame([_score_pair(*pair, is_latin) for pair in bar])
    if encoder and is_latin:
        scores["bertscore_f1"] = _score_bert(pairs, encoder)
    if questions is not None:
        scores["question_copy_share"] = [_share_copied(answer, question) for answer, question
                                         in zip(predictions, questions, strict=True)]
    if stopped is not None:
        scores["eos_rate"] = list(map(float, stopped))
    return scores[[name for name in (*METRICS, "reference_words", *BLEU_COLUMNS)
                   if name in scores and (is_latin or name not in LATIN_ONLY)]]


def corpus_metrics(*args, **kwargs) -> dict[str, float]:
    """The panel as one number per metric: `summarize_scores` of `score_answers`."""
    return summarize_scores(score_answers(*args, **kwargs))


def summarize_scores(scores: pd.DataFrame) -> dict[str, float]:
    """Means over examples, CORPUS_METRICS from their sums, and `n`. Other columns are left out."""
    if scores.empty:
        raise ValueError("There are 0 scored answers; expected at least 1. Check the split.")
    sums = {name: scores[list(columns_of(name))].to_numpy(float).sum(axis=0)
            for name in METRICS if {*columns_of(name)} <= {*scores}}
    return {name: float(evaluate_sums(name, sums[name], len(scores))) for name in sums} | {"n": len(scores)}


def columns_of(metric: str) -> tuple[str, ...]:
    """The columns of a score frame that `evaluate_sums` needs the sums of."""
    return CORPUS_METRICS.get(metric, (metric,))


def evaluate_sums(metric: str, sums: np.ndarray, examples: np.ndarray | int) -> np.ndarray:
    """(...) values of a metric from (..., K) sums of its columns over (...) numbers of examples."""
    if metric == "bleu":
        return bleu_from_statistics(sums)
    if metric in CORPUS_METRICS:  # a ratio of sums: short references would dominate a mean of ratios
        return sums[..., 0] / np.maximum(sums[..., 1], 1)
    return sums[..., 0] / examples


def bleu_from_statistics(statistics: np.ndarray) -> np.ndarray:
    """Corpus BLEU with sacrebleu's default "exp" smoothing, for many sets of summed statistics at once.

    Args:
        statistics: (..., 10) in the order of BLEU_COLUMNS.
    Returns:
        (...) BLEU in 0..100, equal to `sacrebleu.corpus_bleu` on the same sums.
    """
    hyp_len, ref_len = statistics[..., 0], statistics[..., 1]
    match, total = statistics[..., 2:6], statistics[..., 6:10]
    # An order without a match counts as 1 / 2^k of a match, k being the number of such orders so far.
    smooth = 0.5 ** np.cumsum(match == 0, axis=-1)
    precision = np.where(match == 0, smooth, match) / np.maximum(total, 1)
    brevity = np.exp(np.minimum(0.0, 1 - ref_len / np.maximum(hyp_len, 1)))
    defined = (match.sum(axis=-1) > 0) & (total.min(axis=-1) > 0)
    return np.where(defined, 100 * brevity * np.exp(np.log(precision).mean(axis=-1)), 0.0)


def _score_pair(prediction: str, reference: str, is_latin: bool) -> dict[str, float]:
    import textstat

    words = prediction.split()
    bleu = _bleu_scorer().sentence_score(prediction, [reference])
    statistics = (bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals)
    return {
        **_score_rouge(*map(_rouge_tokenizer() if is_latin else _WORD.findall, (prediction, reference))),
        "token_f1": _score_token_f1(prediction, reference),
        "repeated_4gram_share": _share_repeated(words),
        "words": len(words), "reference_words": len(reference.split()),
        "flesch_kincaid": min(HIGHEST_GRADE, textstat.flesch_kincaid_grade(prediction)),
        "smog": min(HIGHEST_GRADE, textstat.smog_index(prediction)),
        **dict(zip(BLEU_COLUMNS, statistics, strict=True)),
    }


@functools.cache
def _bleu_scorer():
    import sacrebleu

    return sacrebleu.BLEU(effective_order=True)  # only silences a warning: the counts do not depend on it


@functools.cache
def _rouge_tokenizer():
    """rouge_score's, with a cache of stems: they take most of its time."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score import tokenize

    stemmer = SimpleNamespace(stem=functools.lru_cache(maxsize=100_000)(PorterStemmer().stem))
    return lambda text: tokenize.tokenize(text, stemmer)


def _score_rouge(tokens: Sequence[str], others: Sequence[str]) -> dict[str, float]:
    """F1 of shared words, pairs of words and of the longest common subsequence, as in rouge_score."""
    scores = {f"rouge{n}": _f1(_list_ngrams(tokens, n), _list_ngrams(others, n)) for n in (1, 2)}
    common = count_common_subsequence(tokens, others)
    return scores | {"rougeL": 2 * common / max(1, len(tokens) + len(others))}


def _f1(items: Sequence, others: Sequence) -> float:
    """F1 of two bags: shared items count as often as they are in both."""
    return 2 * (Counter(items) & Counter(others)).total() / max(1, len(items) + len(others))


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


def _score_token_f1(prediction: str, reference: str) -> float:
    """SQuAD's F1: bags of lower-case words without punctuation and articles."""
    tokens, others = _normalize_words(prediction), _normalize_words(reference)
    return _f1(tokens, others) if tokens or others else 1.0


def _normalize_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _list_ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _share_repeated(words: Sequence[str]) -> float:
    """Share of the 4-grams that have stood in the same answer before."""
    ngrams = _list_ngrams(words, 4)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _share_copied(answer: str, question: str) -> float:
    """Share of the answer's words inside a verbatim copy of 4 words of the question (or of all its words)."""
    words, question_words = _normalize_words(answer), _normalize_words(question)
    n = min(4, len(question_words))
    if not words or n == 0:
        return 0.0
    asked = set(_list_ngrams(question_words, n))
    starts = [start for start, ngram in enumerate(_list_ngrams(words, n)) if ngram in asked]
    return len({start + k for start in starts for k in range(n)}) / len(words)


def _score_bert(pairs: Sequence[tuple[str, str]], encoder: str) -> np.ndarray:
    """(N,) BERTScore F1, not rescaled, 32 pairs of similar length at a time."""
    from bert_score import BERTScorer

    from medqa_lib.standin import ENCODERS, fetch_encoder

    scorer = BERTScorer(model_type=fetch_encoder(encoder), num_layers=ENCODERS[encoder])
    scores = np.zeros(len(pairs))
    order = [row for row, pair in enumerate(pairs) if pair[0].strip() and pair[1].strip()]
    order.sort(key=lambda row: max(map(len, pairs[row])), reverse=True)
    for start in tqdm(range(0, len(order), 32), desc="BERTScore", unit="batch", leave=False, file=sys.stdout,
                      disable=len(order) < 200):
        rows = order[start:start + 32]
        texts, references = zip(*(pairs[row] for row in rows), strict=True)
        scores[rows] = scorer.score(list(texts), list(references))[2].numpy()
    return scores
