"""Baselines: what a score is worth shows only beside what costs nothing.

`python -m medqa_lib.evaluation.baselines` writes them as runs beside the untuned model's. None of them
trains, one generates.
"""

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
    sample
    questions: the nearest answer would be a row of a data set, and the sample questions have no reference to
        cut by.

    Returns:
        Run name -> result. Its metrics hold no validation loss, and no EOS rate where nothing was generated.
    """
    profile, home = profile or current_profile(), home or home_dir()
    splits = splits or prepare_splits(home=home)
    identity = evaluation.run_base(splits, profile, home).config["identity"]
    lines = {}
    for name, description in BASELINES.items():
        context = evaluation.RunContext(name, splits, profile, home, identity)
        lines[name] = find_finished(context.folder, identity)
        answers = None if lines[name] else _answer(context)
        if answers:
            test = evaluation.choose_test_questions(splits["test"], profile)
            scores = evaluation.score_test(test, answers[:len(test)], profile)
            if name != "baseline_chat_template":
                scores = scores.drop(columns="eos_rate")
            numbers = {**metrics.summarize_scores(scores), "n_test": len(scores)}
            samples = [{"question": question, "answer": answer.text} for question, answer
                       in zip(evaluation.SAMPLE_QUESTIONS, answers[len(test):], strict=False)]
            config = {"identity": identity, "description": description, **describe_environment()}
            lines[name] = save_run(context.folder, config, numbers, scores, samples=samples)
    return {name: run for name, run in lines.items() if run}


def find_nearest_answers(train_questions: Sequence[str], train_answers: Sequence[str],
                         questions: Sequence[str]) -> list[str]:
    """For each question the answer of the training question with the largest cosine of TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    train = vectorizer.fit_transform(train_questions)
    asked = vectorizer.transform(questions)
    return [train_answers[row] for start in range(0, len(questions), 256)
            for row in (asked[start:start + 256] @ train.T).toarray().argmax(axis=1)]


def cut_words(answer: str, reference: str) -> str:
    """The first words of the answer, as many as the reference has."""
    return " ".join(answer.split()[:len(reference.split())])


def _answer(context: evaluation.RunContext) -> list[Answer] | None:
    """A baseline's answers to the test questions (and the samples); None without a chat template."""
    profile, splits = context.profile, context.splits
    test, tokenizer = evaluation.choose_test_questions(splits["test"], profile), load_tokenizer(profile)
    questions = list(test["question"])
    if context.name == "baseline_nearest_answer":
        train = splits["train"]
        nearest = find_nearest_answers(list(train["question"]), list(train["answer"]), questions)
        return [Answer(text, True, 0) for text in nearest]
    if context.name == "baseline_untuned_cut":
        store = evaluation.RunContext("base", splits, profile, context.home, context.identity).answers()
        answers = generate_records(None, tokenizer, questions, profile.max_new_tokens, store)
        return [Answer(cut_words(answer.text, reference), True, 0)
                for answer, reference in zip(answers, test["answer"], strict=True)]
    if not tokenizer.chat_template:
        return None
    prompts = [encode_chat_prompt(tokenizer, each) for each in (*questions, *evaluation.SAMPLE_QUESTIONS)]
    model = load_merged(None, profile)
    return generate_records(model, tokenizer, prompts, profile.max_new_tokens, context.answers())


if __name__ == "__main__":
    for run_name, result in run_baselines().items():
        print("{}: ROUGE-L {rougeL:.4f}, BLEU {bleu:.2f}".format(run_name, **result.metrics))
