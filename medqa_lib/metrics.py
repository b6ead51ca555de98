"""The metric panel: what an answer shares with its reference, and how it reads.

`score_answers` gives a row per example, `summarize_scores` the numbers of a table; `evaluation.significance`
resamples the rows, `evaluation/evaluate_metric.py` is the panel as an `evaluate.Metric`.

Units: ROUGE, token F1, BERTScore and shares are in 0..1, BLEU and chrF in 0..100, readability in US school
grades. An empty answer or reference scores 0 in every metric (but two empty ones have token F1 = 1, as in
SQuAD 2.0). Of several references the best counts; BLEU takes their n-grams together.
"""

import functools
import re
import string
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd
import regex
from tqdm import tqdm

from medqa_lib.rouge import f1, list_ngrams, score_rouge, tokenize_rouge

HIGHEST_GRADE = 24.0  # an answer without a full stop is one endless sentence: grade 8,811 was seen
BLEU_COLUMNS = ("bleu_hyp_len", "bleu_ref_len",
                *(f"bleu_{part}_{n}" for part in ("match", "total") for n in range(1, 5)))

# Metric -> (label with unit, direction: +1 higher is better, -1 lower is better, 0 only describes).
METRICS = {
    "rouge1": ("ROUGE-1 F1", 1),
    "rouge2": ("ROUGE-2 F1", 1),
    "rougeL": ("ROUGE-L F1", 1),
    "bleu": ("BLEU (0-100)", 1),
    "bleu_brevity_penalty": ("BLEU's brevity penalty", 0),
    "sentence_bleu": ("Sentence BLEU (0-100)", 1),
    "chrf": ("chrF (0-100)", 1),
    "token_f1": ("Token F1", 1),
    "bertscore_f1": ("BERTScore F1", 1),
    "mcq_accuracy": ("Multiple choice (share correct)", 1),
    "fact_accuracy": ("Facts right (share of asked)", 1),
    "fact_errors": ("Wrong facts per fact asked", -1),
    "unsupported_numbers": ("Numbers not in the reference (share)", -1),
    "recited": ("Recited from training (share)", 0),
    "support": ("Supported by the nearest passages (share of sentences)", 0),
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
CORPUS_METRICS = {"bleu": BLEU_COLUMNS, "bleu_brevity_penalty": BLEU_COLUMNS[:2],
                  "length_ratio": ("words", "reference_words"), "mcq_accuracy": ("mcq_correct", "mcq_asked"),
                  "fact_accuracy": ("fact_right", "fact_asked"), "fact_errors": ("fact_wrong", "fact_asked"),
                  "unsupported_numbers": ("numbers_unsupported", "numbers_stated"),
                  "support": ("supported", "sentences")}


def score_answers(predictions: Sequence[str], references: Sequence[str | Sequence[str]],
                  questions: Sequence[str] | None = None, encoder: str | None = None,
                  stopped: Sequence[bool] | None = None) -> pd.DataFrame:
    """Score each answer against its reference.

    Args:
        predictions: N texts.
        references: N texts, or lists of them: the reference, then further ones.
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
    references = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    letters = [letter.isascii() for texts in references for letter in texts[0] if letter.isalpha()]
    is_latin = 2 * sum(letters) >= len(letters)
    if not is_latin:
        print("The references are not in Latin letters: BERTScore and readability are left out.")
    space = functools.partial(_SPACELESS.sub, r" \g<0> ")
    predictions, references = map(space, predictions), [list(map(space, texts)) for texts in references]
    pairs = list(zip(predictions, references, strict=True))
    bar = tqdm(pairs, "scoring", unit="answer", leave=False, file=sys.stdout, disable=len(pairs) < 200)
    scores = pd.DataFrame([_score_pair(*pair, is_latin) for pair in bar])
    if encoder and is_latin:
        scores["bertscore_f1"] = _score_bert(pairs, encoder)
    if questions is not None:
        scores["question_copy_share"] = [_share_copied(answer, space(question)) for (answer, _), question
                                         in zip(pairs, questions, strict=True)]
    if stopped is not None:
        scores["eos_rate"] = list(map(float, stopped))
    return scores[[name for name in (*METRICS, "reference_words", *BLEU_COLUMNS)
                   if name in scores and (is_latin or name not in LATIN_ONLY)]]


def corpus_metrics(*args, **kwargs) -> dict[str, float]:
    """The panel as one number per metric: `summarize_scores` of `score_answers`."""
    return summarize_scores(score_answers(*args, **kwargs))


def summarize_scores(scores: pd.DataFrame) -> dict[str, float]:
    """Means over the rows of `count_rows`, CORPUS_METRICS from their sums, and `n`, the free questions."""
    if scores.empty:
        raise ValueError("There are 0 scored answers; expected at least 1. Check the split.")
    counted = {name: count_rows(name, scores) for name in METRICS if {*columns_of(name)} <= {*scores}}
    sums = {name: rows @ scores[[*columns_of(name)]].to_numpy(float) for name, rows in counted.items()}
    numbers = {name: float(evaluate_sums(name, sums[name], rows.sum())) for name, rows in counted.items()}
    return numbers | {"n": int(count_rows("", scores).sum())}


def count_rows(metric: str, scores: pd.DataFrame) -> np.ndarray:
    """(N,) 1.0 for rows that the metric is about, else 0.0. Texts of multiple-choice questions never count.

    Without a column `kind`, or without a free question, all rows do.
    """
    if metric == "mcq_accuracy":
        return scores["mcq_asked"].to_numpy(float)
    free = (scores["kind"] == "free").to_numpy(float) if "kind" in scores else np.zeros(len(scores))
    return free if free.any() else np.ones(len(scores))


def columns_of(metric: str) -> tuple[str, ...]:
    """The columns of a score frame that `evaluate_sums` needs the sums of."""
    return CORPUS_METRICS.get(metric, (metric,))


def evaluate_sums(metric: str, sums: np.ndarray, examples: np.ndarray | int) -> np.ndarray:
    """(...) values of a metric from (..., K) sums of its columns over (...) numbers of examples."""
    if metric == "bleu":
        return bleu_from_statistics(sums)
    if metric == "bleu_brevity_penalty":
        return penalize_brevity(sums)
    if metric in CORPUS_METRICS:  # a ratio of sums: short references would dominate a mean of ratios
        return sums[..., 0] / np.maximum(sums[..., 1], 1)
    return sums[..., 0] / np.maximum(examples, 1)


def bleu_from_statistics(statistics: np.ndarray) -> np.ndarray:
    """Corpus BLEU with sacrebleu's default "exp" smoothing, for many sets of summed statistics at once.

    Args:
        statistics: (..., 10) in the order of BLEU_COLUMNS.
    Returns:
        (...) BLEU in 0..100, equal to `sacrebleu.corpus_bleu` on the same sums.
    """
    match, total = statistics[..., 2:6], statistics[..., 6:10]
    # An order without a match counts as 1 / 2^k of a match, k being the number of such orders so far.
    smooth = 0.5 ** np.cumsum(match == 0, axis=-1)
    precision = np.where(match == 0, smooth, match) / np.maximum(total, 1)
    defined = (match.sum(axis=-1) > 0) & (total.min(axis=-1) > 0)
    bleu = 100 * penalize_brevity(statistics) * np.exp(np.log(precision).mean(axis=-1))
    return np.where(defined, bleu, 0.0)


def penalize_brevity(statistics: np.ndarray) -> np.ndarray:
    """(...) BLEU's factor for answers that are shorter than their references, from (..., 2 or more) sums."""
    return np.exp(np.minimum(0.0, 1 - statistics[..., 1] / np.maximum(statistics[..., 0], 1)))


def _score_pair(prediction: str, references: Sequence[str], is_latin: bool) -> dict[str, float]:
    import sacrebleu
    import textstat
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    bleu, words = sacrebleu.sentence_bleu(prediction, references), prediction.split()
    split = [Tokenizer13a()(text).split() for text in (prediction, *references)]
    tokens = [tokenize_rouge(text) if is_latin else _WORD.findall(text) for text in (prediction, *references)]
    overlaps = [{**score_rouge(tokens[0], others), "token_f1": _score_token_f1(prediction, text)}
                for text, others in zip(references, tokens[1:], strict=True)]
    return {
        **{name: max(overlap[name] for overlap in overlaps) for name in overlaps[0]},
        "sentence_bleu": 100 * sentence_bleu(split[1:], split[0],
                                             smoothing_function=SmoothingFunction().method1),
        "chrf": sacrebleu.sentence_chrf(prediction, references).score,
        "repeated_4gram_share": _share_repeated(words),
        "words": len(words), "reference_words": len(references[0].split()),
        "flesch_kincaid": min(HIGHEST_GRADE, textstat.flesch_kincaid_grade(prediction)),
        "smog": min(HIGHEST_GRADE, textstat.smog_index(prediction)),
        **dict(zip(BLEU_COLUMNS, (bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals), strict=True)),
    }


def _score_token_f1(prediction: str, reference: str) -> float:
    """SQuAD's F1: bags of lower-case words without punctuation and articles."""
    tokens, others = _normalize_words(prediction), _normalize_words(reference)
    return f1(tokens, others) if tokens or others else 1.0


def _normalize_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _share_repeated(words: Sequence[str]) -> float:
    """Share of the 4-grams that have stood in the same answer before."""
    ngrams = list_ngrams(words, 4)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _share_copied(answer: str, question: str) -> float:
    """Share of the answer's words inside a verbatim copy of 4 words of the question (or of all its words)."""
    words, question_words = _normalize_words(answer), _normalize_words(question)
    n = min(4, len(question_words))
    if not words or n == 0:
        return 0.0
    asked = set(list_ngrams(question_words, n))
    starts = [start for start, ngram in enumerate(list_ngrams(words, n)) if ngram in asked]
    return len({start + k for start in starts for k in range(n)}) / len(words)


def _score_bert(pairs: Sequence[tuple[str, list[str]]], encoder: str) -> np.ndarray:
    """(N,) BERTScore F1, not rescaled, 32 pairs of similar length at a time."""
    from bert_score import BERTScorer

    from medqa_lib.standin import ENCODERS, fetch_encoder

    scorer = BERTScorer(model_type=fetch_encoder(encoder), num_layers=ENCODERS[encoder])
    scores = np.zeros(len(pairs))
    order = [row for row, (answer, texts) in enumerate(pairs) if answer.strip() and texts[0].strip()]
    order.sort(key=lambda row: max(map(len, [pairs[row][0], *pairs[row][1]])), reverse=True)
    for start in tqdm(range(0, len(order), 32), desc="BERTScore", unit="batch", leave=False, file=sys.stdout,
                      disable=len(order) < 200):
        rows = order[start:start + 32]
        answers, references = zip(*(pairs[row] for row in rows), strict=True)
        scores[rows] = scorer.score(list(answers), list(references))[2].numpy()
    return scores
