"""Baselines: what a score is worth shows only beside what costs nothing. None trains, one generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medqa_lib import metrics
from medqa_lib.config import Profile, current_profile, home_dir
from medqa_lib.data.prepare import prepare_splits
from medqa_lib.evaluation import run as evaluation
from medqa_lib.evaluation.answers import Answer
from medqa_lib.evaluation.generation import generate_records
from medqa_lib.evaluation.results import RunResult, describe_environment, find_finished, save_run
from medqa_lib.model import load_merged, load_tokenizer
from medqa_lib.prompts import encode_chat_prompt

BASELINES = {
    "baseline_chat_template": "the untuned model, asked in the chat template that it was released with",
    "baseline_untuned_cut": "the untuned model's answers, cut to the length of the reference",
    "baseline_nearest_answer": "no model: the answer of the most similar training question (TF-IDF)",
}


def run_baselines(splits=None, profile: Profile | None = None,
                  home: Path | None = None) -> dict[str, RunResult]:
    """Score the baselines on the questions that the untuned model answered; finished ones are read instead.

    A model without a chat template has no `baseline_chat_template`. The other two have no answers to the
    sample questions: the nearest answer would be a row of a data set, and there is no reference to cut by.

    Returns:
        Run name -> result. Its metrics hold no validation loss, and no EOS rate where nothing was generated.
    """
    profile, home = profile or current_profile(), home or home_dir()
    splits = splits or prepare_splits(home=home)
    identity = evaluation.run_base(splits, profile, home).config["identity"]
    contexts = [evaluation.RunContext(name, splits, profile, home, identity) for name in BASELINES]
    runs = {each.name: find_finished(each.folder, identity) or _score_baseline(each) for each in contexts}
    return {name: run for name, run in runs.items() if run}


def _score_baseline(context: evaluation.RunContext) -> RunResult | None:
    """Answer, score and write one baseline; None without a chat template."""
    test = evaluation.choose_test_questions(context.splits["test"], context.profile)
    answers = _answer(context, test)
    if answers is None:
        return None
    scores = evaluation.score_test(context, test, answers[:len(test)])
    if context.name != "baseline_chat_template":
        scores = scores.drop(columns="eos_rate")
    config = {"identity": context.identity, "description": BASELINES[context.name], **describe_environment()}
    numbers, samples = {**metrics.summarize_scores(scores), "n_test": len(scores)}, []
    if own := answers[len(test):]:
        samples, numbers["red_lines_crossed"] = evaluation.read_own_answers(own)
    return save_run(context.folder, config, numbers, scores, samples=samples)


def _answer(context: evaluation.RunContext, test) -> list[Answer] | None:
    """Answers to the test questions, with a chat template to the samples, too; None if there is none."""
    profile, splits, questions = context.profile, context.splits, list(test["question"])
    if context.name == "baseline_nearest_answer":
        train = splits["train"]
        nearest = find_nearest_answers(list(train["question"]), list(train["answer"]), questions)
        return [Answer(text, True, 0) for text in nearest]
    tokenizer = load_tokenizer(profile)
    if context.name == "baseline_untuned_cut":
        store = evaluation.RunContext("base", splits, profile, context.home, context.identity).answers()
        answers = generate_records(None, tokenizer, questions, profile.max_new_tokens, store)
        return [Answer(cut_words(answer.text, reference), True, 0)
                for answer, reference in zip(answers, test["answer"], strict=True)]
    if not tokenizer.chat_template:
        return None
    prompts = [encode_chat_prompt(tokenizer, each) for each in (*questions, *evaluation.OWN_QUESTIONS)]
    model = load_merged(None, profile)
    return generate_records(model, tokenizer, prompts, profile.max_new_tokens, context.answers())


def find_nearest_answers(train_questions: Sequence[str], train_answers: Sequence[str],
                         questions: Sequence[str]) -> list[str]:
    """For each question the answer of the training question with the largest cosine of TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    train, asked = vectorizer.fit_transform(train_questions), vectorizer.transform(questions)
    return [train_answers[row] for start in range(0, len(questions), 256)
            for row in (asked[start:start + 256] @ train.T).toarray().argmax(axis=1)]


def cut_words(answer: str, reference: str) -> str:
    """The first words of the answer, as many as the reference has."""
    return " ".join(answer.split()[:len(reference.split())])
