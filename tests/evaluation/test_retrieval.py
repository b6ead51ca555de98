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
    many = Dataset.from_dict({name: list(TRAIN[name]) * 40 for name in TRAIN.column_names} | {"group": list(map(str, range(120)))})
    asked = {kind: retrieval.prepare_training({"train": many, "validation": TRAIN}, kind)["train"] for kind in ("nearest", "random")}
    about = {kind: ["[1] What is gout?" in text for text in split["question"][0::3]] for kind, split in asked.items()}
    assert all(about["nearest"]) and 0 < sum(about["random"]) < 40  # a run on random ones alone has no nearest ones


PASSAGES = [Passage("Gout?", "Urate crystals hurt 4 joints."), Passage("Cold?", "A virus. Caused by mutations in the ABC1 gene.")]


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        ("Crystals of urate.", 1),
        ("Urate hurts 5 joints.", 0),  # the number is in no passage
        ("The ABC1 gene causes mutations.", 2),
        ("Urate, swelling, fever, redness.", 0),  # one of four words
        ("It is so.", None),
        ("A cough.", None),  # the question's own word
    ],
)
def test_cite_gives_the_passage_that_states_facts_and_half_the_words(sentence, number):
    assert retrieval.cite(sentence, PASSAGES, "What is a cough?") == [(sentence, number)]


def test_marks_and_shares_are_of_whole_sentences():
    answer = "Urate hurts 4 joints. Rest helps a lot. So it is."
    assert retrieval.mark(answer, PASSAGES) == "Urate hurts 4 joints. [1] Rest helps a lot. [no source] So it is."
    assert retrieval.has_source(answer, PASSAGES) and not retrieval.has_source("Rest helps a lot.", PASSAGES)
    found = retrieval.check_answers(retrieval.Index(TRAIN), ["What is gout?"], ["Urate crystals. Pain. Inhaled steroids."])
    assert found.loc[0, ["sentences", "supported"]].tolist() == [3, 1]
    assert found.loc[0, "similarity"] == retrieval.Index(TRAIN).find(["What is gout?"])[0][0].similarity
