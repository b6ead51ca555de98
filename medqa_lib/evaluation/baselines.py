"""Reference lines: what a score is worth shows only beside what costs nothing.

`python -m medqa_lib.evaluation.baselines` writes them as runs beside the base run. None of them trains, and only one generates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from medqa_lib import metrics
from medqa_lib.config import Profile, current_profile, home_dir
from medqa_lib.data.prepare import prepare_splits
from medqa_lib.evaluation import run as evaluation
from medqa_lib.evaluation.generation import Answer, AnswerStore, generate_records
from medqa_lib.evaluation.results import RunResult, describe_environment, find_finished, run_folder, save_run
from medqa_lib.model import load_merged, load_tokenizer
from medqa_lib.prompts import encode_chat_prompt

BASELINES = {
    "baseline_chat_template": "the untuned model, asked in the chat template that it was released with",
    "baseline_untuned_cut": "the untuned model's answers, cut to the length of the reference (which no real system knows)",
    "baseline_nearest_answer": "no model: the answer of the most similar training question (TF-IDF)",
}


def run_baselines(splits=None, profile: Profile | None = None, home: Path | None = None) -> dict[str, RunResult]:
    """Score the reference lines on the questions that the base run answered; finished ones are read instead.

    A model without a chat template has no `baseline_chat_template`. The other two have no samples answers: the nearest answer would
    be a row of a data set, and the samples questions have no reference to cut by.

    Returns:
        Run name -> result. Its metrics hold no validation loss, and no share of stopped answers where nothing was generated.
    """
    profile, home = profile or current_profile(), home or home_dir()
    splits = splits or prepare_splits(home=home)
    identity = evaluation.run_base(splits, profile, home).config["identity"]
    test = evaluation.choose_test_questions(splits["test"], profile)
    lines = {}
    for name, description in BASELINES.items():
        folder = run_folder(name, profile, home)
        lines[name] = find_finished(folder, identity)
        if lines[name] is None and (found := _answer_line(name, splits["train"], test, profile, home)):
            answers, samples = found
            scores = evaluation.score_test(test, answers, profile)
            if name != "baseline_chat_template":
                scores = scores.drop(columns="eos_rate")
            lines[name] = save_run(folder, {"identity": identity, "description": description, **describe_environment()},
                                   {**metrics.summarize_scores(scores), "n_test": len(scores)}, scores,
                                   pd.DataFrame(columns=["step", "split", "loss", "learning_rate", "tokens"]), samples)
    return {name: run for name, run in lines.items() if run}


def find_nearest_answers(train_questions: Sequence[str], train_answers: Sequence[str], questions: Sequence[str]) -> list[str]:
    """For each question the answer of the training question with the largest cosine of TF-IDF vectors; the first of equals."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    train = vectorizer.fit_transform(train_questions)
    asked = vectorizer.transform(questions)
    return [train_answers[row] for start in range(0, len(questions), 256)
            for row in (asked[start : start + 256] @ train.T).toarray().argmax(axis=1)]


def cut_words(answer: str, reference: str) -> str:
    """The first words of the answer, as many as the reference has."""
    return " ".join(answer.split()[: len(reference.split())])


def _answer_line(name: str, train, test, profile: Profile, home: Path) -> tuple[list[Answer], list[dict]] | None:
    """A line's answers to the test questions and to the samples; None if the model has no chat template."""
    questions, tokenizer = list(test["question"]), load_tokenizer(profile)
    store = home / "answers" / profile.model_slug
    if name == "baseline_nearest_answer":
        nearest = find_nearest_answers(list(train["question"]), list(train["answer"]), questions)
        return [Answer(text, True, 0) for text in nearest], []
    if name == "baseline_untuned_cut":
        answers = generate_records(None, tokenizer, questions, profile.max_new_tokens, store=AnswerStore(store / "base.jsonl"))
        return [Answer(cut_words(answer.text, reference), True, 0) for answer, reference in zip(answers, test["answer"], strict=True)], []
    if not tokenizer.chat_template:
        return None
    shown = list(evaluation.SAMPLE_QUESTIONS)
    answers = generate_records(load_merged(None, profile), tokenizer, questions + shown, profile.max_new_tokens,
                               store=AnswerStore(store / f"{name}.jsonl"), prompt=encode_chat_prompt)
    texts = [answer.text for answer in answers[len(questions) :]]
    return answers[: len(questions)], [{"question": q, "answer": text} for q, text in zip(shown, texts, strict=True)]


if __name__ == "__main__":
    for run_name, result in run_baselines().items():
        print(f"{run_name}: {BASELINES[run_name]}; ROUGE-L {result.metrics['rougeL']:.4f}, BLEU {result.metrics['bleu']:.2f}")
