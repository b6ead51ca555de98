"""BM25 by hand, and passages."""

import math

import pytest
from datasets import Dataset

from medqa_lib.evaluation import retrieval
from medqa_lib.evaluation.retrieval import Passage

TRAIN = Dataset.from_dict({
    "question": ["What is gout?", "What is asthma?", "What are treatments for asthma?"],
    "answer": ["Urate crystals.", "A disease of the airways.", "Inhaled steroids."],
    "group": ["a", "b", "b"], "source": ["medquad"] * 3})


def test_scores_are_bm25s():
    [found] = retrieval.Index(TRAIN).find(["gout"])
    # one word, in one of three questions; their lengths are 3, 3 and 5 words
    rarity = math.log(1 + 2.5 / 1.5)
    score = rarity * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / (11 / 3)))
    assert [each.text for each in found] == ["Urate crystals."]
    assert found[0].similarity == pytest.approx(score / (2.2 * rarity))


def test_own_group_is_left_out_in_every_chunk():
    index = retrieval.Index(TRAIN)
    nearest = index.find(["What are treatments for asthma?"])[0]
    assert [each.text for each in nearest] == ["Inhaled steroids.", "A disease of the airways."]
    others = index.find(["What are treatments for asthma?"] * 300, ["b"] * 300)
    assert {each.text for found in others for each in found} == {"Urate crystals."}


def test_passages_end_with_sentences_and_lose_no_word():
    answer = "One two. " * 40 + "word " * 130 + "end. Last."
    pieces = retrieval.cut_passages(answer)
    assert " ".join(pieces) == " ".join(answer.split())
    assert [len(piece.split()) for piece in pieces] == [80, 100, 32]
    assert retrieval.cut_passages("  ") == []


def test_ask_puts_passages_before_the_question():
    assert retrieval.ask("Flu?", []) == "Flu?"
    text = retrieval.ask("Flu?", [Passage("Gout?", "Urate."), Passage("Cold?", "A virus.")])
    assert text == "[1] Gout?\nUrate.\n\n[2] Cold?\nA virus.\n\nQuestion: Flu?"


def test_every_third_training_question_gets_random_passages():
    found = retrieval.Index(TRAIN).find(["gout"] * 300, kind="mixed")
    texts = [[each.text for each in passages] for passages in found]
    others, thirds = [each for row, each in enumerate(texts) if row % 3 != 2], texts[2::3]
    assert all(each == ["Urate crystals."] for each in others)
    assert {text for each in thirds for text in each} == set(TRAIN["answer"])
