import json

import pandas as pd
import pytest
import torch
from datasets import Dataset

from medqa_lib.config import PROFILES
from medqa_lib.evaluation import exam
from medqa_lib.evaluation.retrieval import Index
from medqa_lib.model import load_base_model, load_tokenizer

SOURCES = {
    "afrimedqa": pd.DataFrame(
        [
            (
                "a",
                "mcq",
                "Which metal is in  blood?",
                {"option1": "Iron", "option2": "N/A", "option3": "Zinc"},
                "option3",
            ),
            (
                "b",
                "mcq",
                "Which two?",
                {"option1": "One", "option2": "Two", "option3": "Three"},
                "option2,option3",
            ),
            ("no key", "mcq", "Which one?", {"option1": "One", "option2": "Two"}, ""),
            ("crowd", "mcq", "Which one?", {"option1": "One", "option2": "Two"}, "option1"),
            ("free", "saq", "Why?", {}, ""),
        ],
        columns=["sample_id", "question_type", "question", "answer_options", "correct_answer"],
    ).assign(official=["test", "test", "test", "train", "test"])
}
SOURCES["afrimedqa"]["answer_options"] = SOURCES["afrimedqa"]["answer_options"].map(json.dumps)


@pytest.fixture
def exams(tmp_path, monkeypatch):
    options = "{'A': 'Rest', 'B': 'Aspirin', 'C': 'Ice', 'D': 'Surgery'}"
    table = pd.DataFrame(
        {"sample_id": ["m"], "question": ["What helps?"], "options": [options], "correct_answer": ["B"]}
    )
    (tmp_path / "benchmarks").mkdir()
    table.to_csv(tmp_path / "benchmarks" / exam.MEDQA_FILE, index=False)
    monkeypatch.setenv("MEDQA_DATA_DIR", str(tmp_path))
    return exam.load_exams(SOURCES)


def test_official_questions_with_a_key_are_asked_without_empty_options(exams):
    assert exams["sample_id"].tolist() == ["a", "b", "m"]
    assert exams["exam"].tolist() == ["afrimedqa", "afrimedqa", "medqa"]
    assert exams["options"].tolist() == [
        ["Iron", "Zinc"],
        ["One", "Two", "Three"],
        ["Rest", "Aspirin", "Ice", "Surgery"],
    ]
    assert exams["correct"].tolist() == [1, 1, 1]


def test_letters_and_options_are_chosen_by_their_likelihood(exams):
    """Against the model's own next-token probabilities, question by question."""
    profile = PROFILES["smoke"]
    model, tokenizer = load_base_model(profile).eval(), load_tokenizer(profile)

    def score(prompt, text):
        start = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + text)["input_ids"]
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        start = start[:-1] if start[-1] == tokenizer.eos_token_id else start
        with torch.no_grad():
            log = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = range(len(start), len(ids))
        return sum(float(log[place - 1, ids[place]]) for place in places) / len(text)

    found = exam.take_exam(model, tokenizer, exams[::-1])[::-1]
    for row, asked in zip(found.to_dict("records"), exams.to_dict("records"), strict=True):
        letters = "ABCD"[: len(asked["options"])]
        listed = "\n".join(
            f"{letter}. {text}" for letter, text in zip(letters, asked["options"], strict=True)
        )
        prompt = f"### Instruction:\n{' '.join(asked['question'].split())}\n{listed}\n\n### Response:\n"
        for protocol, texts in (("letter", letters), ("option", asked["options"])):
            scores = [score(prompt, text) for text in texts]
            assert row[protocol] == (scores.index(max(scores)) == asked["correct"])
        assert row["chance"] == pytest.approx(1 / len(letters)) and row["sample_id"] == asked["sample_id"][:16]


def test_passages_come_before_the_questions_with_their_options(exams, monkeypatch):
    train = Dataset.from_dict({"question": ["What helps a sprain?"], "answer": ["Ice helps."], "group": ["g"]})
    asked = []
    nothing = pd.DataFrame({"mcq_correct": [0.0]})
    monkeypatch.setattr(exam, "score_options", lambda model, tokenizer, questions, choices: asked.extend(questions) or nothing)
    exam.take_exam(None, None, exams[exams["exam"] == "medqa"], Index(train))
    prompt = "[1] What helps a sprain?\nIce helps.\n\nQuestion: What helps?\nA. Rest\nB. Aspirin\nC. Ice\nD. Surgery"
    assert asked == [prompt, prompt]  # by letter, by option
