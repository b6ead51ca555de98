"""What links two rows, against hand-worked cases and brute force."""

import random

import numpy as np
import pandas as pd
import pytest

from medqa_lib.data.links import (
    Runs,
    disease_key,
    link_keys,
    question_key,
    similar_answers,
    similar_names,
    similar_stems,
)
from medqa_lib.data.texts import text_key


def rows_of(answers: list[str], **columns) -> pd.DataFrame:
    return pd.DataFrame({"question": "", "answer": answers, "source": "medquad", "focus_area": "", **columns})


def runs_of(text: str, n: int) -> list[str]:
    """Independent of links.py: joined words."""
    words = text_key(text).split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def random_texts(n: int, vocabulary: int, length: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    word = "w{}".format
    texts = [[word(generator.randrange(vocabulary)) for _ in range(generator.randrange(1, length))] for _ in range(n)]
    return [" ".join(a + b[: len(b) // 2] + c) for a, b, c in zip(texts, texts[7:], texts[3:], strict=False)]


def test_similar_answers_agrees_with_brute_force():
    answers = list(dict.fromkeys(random_texts(120, 60, 70)))
    expected, runs = set(), [set(runs_of(answer, 8)) for answer in answers]
    for i in range(len(answers)):
        for j in range(i + 1, len(answers)):
            pair = runs[i], runs[j]
            shared = len(pair[0] & pair[1])
            if shared and (2 * shared >= min(map(len, pair)) or shared >= 100):
                expected.add((i, j))
    assert set(zip(*similar_answers(rows_of(answers)).tolist(), strict=True)) == expected and len(expected) > 10


def test_similar_answers_takes_half_of_the_shorter_or_a_paragraph():
    words = [f"w{i}" for i in range(400)]
    half, less = words[:20], words[100:120]  # 13 runs of 8 words: 7 of the first 14 words, 6 of 13
    paragraph = words[200:307]  # 100 runs
    answers = [half, half[:14] + ["x"] * 90, less, less[:13] + ["y"] * 90]
    answers += [paragraph + [f"p{i}" for i in range(200)], paragraph + [f"q{i}" for i in range(200)]]
    answers += [[f"r{i}" for i in range(200)] + paragraph[1:]]
    found = similar_answers(rows_of([" ".join(answer) for answer in answers]))
    assert found.T.tolist() == [[0, 1], [4, 5]]


@pytest.mark.parametrize("answers", [[], [""], ["too short"], ["one two three four five six seven eight"]])
def test_similar_answers_finds_none_among_none(answers):
    assert similar_answers(rows_of(answers)).shape == (2, 0)


@pytest.mark.parametrize(("diseases", "pairs"), [(19, 19 * 18 // 2), (20, 0)])
def test_a_text_under_twenty_diseases_links_none_of_them(diseases, pairs):
    template = "Each child of an affected parent has a chance of one half"
    rows = rows_of([f"{template} x{i}" for i in range(diseases)], focus_area=[f"d{i}" for i in range(diseases)])
    assert similar_answers(rows).shape == (2, pairs)
    same = link_keys(rows.assign(answer=template))["same answer (8 words or more)"]
    assert set(same) == ({text_key(template)} if pairs else {""})
    one_disease = rows.assign(focus_area=["Disease A", "disease A (type 1)"] * 10 if diseases == 20 else "A")
    assert similar_answers(one_disease).shape[1] == diseases * (diseases - 1) // 2


def test_count_copied_agrees_with_brute_force():
    answers = random_texts(80, 30, 60, seed=2)
    others = np.arange(len(answers)) % 3 == 0
    there = {run for text, is_other in zip(answers, others, strict=True) if is_other for run in runs_of(text, 13)}
    expected = []
    for text, is_other in zip(answers, others, strict=True):
        inside = {i + k for i, run in enumerate(runs_of(text, 13)) if run in there for k in range(13)}
        expected.append(0 if is_other else len(inside))
    assert Runs(rows_of(answers), 13).count_copied(~others, others).tolist() == expected and sum(expected) > 100


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Diabetes Type 1", "type 1 diabetes", True),
        ("Type 1 diabetes", "type 2 diabetes", False),
        ("Heart Valve Diseases", "heart valve disease", True),
        ("Jervell and Lange-Nielsen syndrome", "Jervell Lange-Nielsen", True),
        ("Ring chromosome 20 (syndrome)", "Ring chromosome 20 syndrome", True),
        ("Syndrome", "Disease", False),
    ],
)
def test_disease_key_is_the_same_under_other_names(left, right, same):
    assert (disease_key(left) == disease_key(right)) == same and disease_key(left)


def test_question_key_is_that_of_a_long_stem():
    stem = "A man has fever and cough since two weeks. Which test?"
    assert question_key(f"{stem}\nA. X-ray\nB. Sputum") == question_key(f"{stem}\nA. Sputum\nB. Nothing")
    assert question_key("Which is true?\nA. This\nB. That") != question_key("Which is true?\nA. One\nB. Two")


def test_similar_stems_joins_near_equal_questions_of_afrimedqa_alone():
    stems = ["Pseudomembranous colitis is caused by", "pseudomembranous colitis is caused by:", "Gout is caused by"]
    questions = [f"{stem}\nA. {i}\nB. {i}b" for i, stem in enumerate(stems)]
    rows = rows_of(["x"] * 6, question=questions * 2, source=["medquad"] * 3 + ["afrimedqa"] * 3)
    assert similar_stems(rows).T.tolist() == [[3, 4]]
    assert similar_stems(rows[:3]).shape == (2, 0)


def test_similar_names_joins_the_first_rows_of_diseases_spelled_alike():
    names = ["Foodborne Illness", "Gout", "Foodborne Illnesses", "foodborne illnesses", "Wilson disease", ""]
    assert similar_names(rows_of(["x"] * 6, focus_area=names)).T.tolist() == [[0, 2]]
    own = rows_of(["x"] * 2, focus_area=["patient 101", "patient 102"], source="own")
    assert similar_names(own).shape == (2, 0)
