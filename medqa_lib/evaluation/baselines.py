"""Baselines: what a score is worth shows only beside what costs nothing. None of them trains.

`python -m medqa_lib.evaluation.baselines` makes all of them. With names of runs, such as exp_005, it asks
their tuned models again, after the nearest training question with its answer: exp_005_one_shot.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from medqa_lib import metrics
from medqa_lib.config import Profile, current_profile, get_experiment, home_dir
from medqa_lib.data.prepare import prepare_splits
from medqa_lib.evaluation import run as evaluation
from medqa_lib.evaluation.answers import Answer
from medqa_lib.evaluation.generation import generate_records
from medqa_lib.evaluation.results import RunResult, describe_environment, find_finished, save_run
from medqa_lib.model import load_base_model, load_merged, load_tokenizer
from medqa_lib.prompts import encode_chat_prompt, format_example, format_prompt, strip_eos
from medqa_lib.reasons import user_errors

BASELINES = {
    "baseline_chat_template": "the untuned model, asked in the chat template that it was released with",
    "baseline_chat_template_without_nf4": "the untuned model without NF4, asked in its chat template",
    "baseline_few_shot": "the untuned model, asked after three training questions with their answers",
    "baseline_few_shot_without_nf4": "the untuned model without NF4, asked after the same three questions",
    "baseline_one_shot": "the untuned model, asked after the nearest training question with its answer",
    "baseline_untuned_cut": "the untuned model's answers, cut to the length of the reference",
    "baseline_nearest_answer": "no model: the answer of the most similar training question (TF-IDF)",
    "baseline_shuffled_reference": "no model: the reference of another disease, asked in the same words",
    "baseline_random_option": "no model: any of the options, multiple choice only (expected scores)",
}
SHOT_WORDS = 200  # of an answer in a prompt: with the longest question and 512 new tokens it fits 2,048


def run_baselines(splits=None, profile: Profile | None = None,
                  home: Path | None = None) -> dict[str, RunResult]:
    """Score the baselines on the questions that the untuned model answered; finished ones are read instead.

    A model without a chat template has no `baseline_chat_template`, a test without options no
    `baseline_random_option`. Those that generate nothing have no answers to the sample questions.

    Returns:
        Run name -> result. Its metrics hold no validation loss, and no EOS rate where nothing was generated.
    """
    profile, home = profile or current_profile(), home or home_dir()
    splits = splits or prepare_splits(home=home)
    identity = evaluation.run_base(splits, profile, home).config["identity"]
    contexts = [evaluation.RunContext(name, splits, profile, home, identity) for name in BASELINES]
    runs = {each.name: _find_or_score(each, BASELINES[each.name]) for each in contexts}
    return {name: run for name, run in runs.items() if run}


def run_one_shot(name: str, splits=None, profile: Profile | None = None,
                 home: Path | None = None) -> RunResult:
    """The tuned model of a finished run, asked after the nearest training question with its answer."""
    profile, home = profile or current_profile(), home or home_dir()
    experiment = profile.scale(get_experiment(name))
    splits = splits or prepare_splits(by=experiment.split, home=home)
    identity = evaluation.result_identity(experiment, profile, splits)
    context = evaluation.RunContext(f"{name}_one_shot", splits, profile, home, identity)
    description = f"{name}, asked after the nearest training question with its answer"
    return _find_or_score(context, description, home / "adapters" / profile.model_slug / name)


def _find_or_score(context: evaluation.RunContext, description: str,
                   adapter_dir: Path | None = None) -> RunResult | None:
    """The finished run, or one answered, scored and written now; None where it does not apply."""
    if finished := find_finished(context.folder, context.identity):
        return finished
    test = evaluation.choose_test_questions(context.splits["test"], context.profile)
    is_random = context.name == "baseline_random_option"
    answers = [] if is_random else _answer(context, test, adapter_dir)
    if answers is None or is_random and not any(test["choices"]):
        return None
    scores = (score_random_option(context, test) if is_random
              else evaluation.score_test(context, test, answers[:len(test)]))
    samples, own = [], {}
    if answers[len(test):]:
        samples, own["red_lines_crossed"] = evaluation.read_own_answers(answers[len(test):])
    else:
        scores = scores.drop(columns="eos_rate")
    config = {"identity": context.identity, "description": description, **describe_environment()}
    numbers = {**metrics.summarize_scores(scores), "n_test": len(scores), **own}
    return save_run(context.folder, config, numbers, scores, samples=samples)


def _answer(context: evaluation.RunContext, test, adapter_dir: Path | None) -> list[Answer] | None:
    """Answers to the test questions, and to our own where a model is asked; None without a chat template."""
    profile, train, questions = context.profile, context.splits["train"], list(test["question"])
    if context.name == "baseline_nearest_answer":
        answers = list(train["answer"])
        return [Answer(answers[row], True, 0) for row in find_nearest(train["question"], questions)]
    if context.name == "baseline_shuffled_reference":
        return [Answer(text, True, 0) for text in shuffle_references(test)]
    tokenizer = load_tokenizer(profile)
    if context.name == "baseline_untuned_cut":
        base = dataclasses.replace(context, name="base")
        answers = generate_records(None, tokenizer, questions, profile.max_new_tokens, base.answers())
        return [Answer(" ".join(answer.text.split()[:len(reference.split())]), True, 0)
                for answer, reference in zip(answers, test["answer"], strict=True)]
    questions += evaluation.OWN_QUESTIONS
    if context.name.startswith("baseline_chat_template"):
        if not tokenizer.chat_template:
            return None
        prompts = [encode_chat_prompt(tokenizer, each) for each in questions]
    else:
        fixed = choose_shots(train) if context.name.startswith("baseline_few_shot") else None
        shots = [fixed or [row] for row in find_nearest(train["question"], questions)]
        prompts = [encode_shots(tokenizer, train, *each) for each in zip(shots, questions, strict=True)]
    base = load_base_model(profile, evaluation.results.has_nf4(context.name))
    answers = generate_records(load_merged(adapter_dir, profile, base), tokenizer, prompts,
                               profile.max_new_tokens, context.answers(adapter_dir))
    return list(map(end_at_marker, answers))


def find_nearest(train_questions: Sequence[str], questions: Sequence[str]) -> list[int]:
    """For each question the row of the training question with the largest cosine of TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    train, asked = vectorizer.fit_transform(train_questions), vectorizer.transform(questions)
    return [int(row) for start in range(0, len(questions), 256)
            for row in (asked[start:start + 256] @ train.T).toarray().argmax(axis=1)]


def choose_shots(train) -> list[int]:
    """The first three training rows, whose order is random, with a free question and 20 to 80 words."""
    rows = zip(train["choices"], train["answer"], strict=True)
    return [row for row, (choices, answer) in enumerate(rows)
            if not choices and 20 <= len(answer.split()) <= 80][:3]


def encode_shots(tokenizer, train, rows: Sequence[int], question: str) -> list[int]:
    """(T,) ids of the training rows with their answers, then of the question's prompt.

    An answer over SHOT_WORDS ends with its last sentence within them.
    """
    texts = []
    for row in rows:
        answer = train[row]["answer"]
        if len(words := answer.split()) > SHOT_WORDS:
            cut = " ".join([*words[:SHOT_WORDS], ""])
            answer = cut[:cut.rfind(". ") + 1] or cut
        texts.append(format_example(train[row]["question"], answer))
    text = "\n\n".join([*texts, format_prompt(question)])
    return strip_eos(tokenizer, tokenizer([text], split_special_tokens=True)["input_ids"])[0]


def end_at_marker(answer: Answer) -> Answer:
    """The answer up to a next question: after examples, that is how an untuned model ends."""
    text, marker, _ = answer.text.partition("### Instruction")
    return Answer(text.strip(), answer.stopped or bool(marker), answer.tokens)


def shuffle_references(test) -> list[str]:
    """For each question the reference of the next one of another group that is asked in the same words but
    for the disease; if there is none, of the next one of its source, with or without options as it is."""
    rows = test.to_pandas()
    words = [question.replace(disease, "") if disease else "" for question, disease
             in zip(rows["question"], rows["focus_area"], strict=True)]
    kinds, groups = list(zip(rows["source"], rows["choices"] != "", strict=True)), list(rows["group"])

    def find(row: int, alike: Sequence) -> int | None:
        return next((other % len(rows) for other in range(row + 1, row + len(rows))
                     if alike[other % len(rows)] == alike[row]
                     and groups[other % len(rows)] != groups[row]), None)

    found = [find(row, words) if words[row] else None for row in range(len(rows))]
    found = [find(row, kinds) if other is None else other for row, other in enumerate(found)]
    return ["" if other is None else rows["answer"][other] for other in found]


def score_random_option(context: evaluation.RunContext, test) -> pd.DataFrame:
    """Scores of the multiple-choice questions, each the mean over answering with any of its options."""
    options = {row: json.loads(cell)["options"] for row, cell in enumerate(test["choices"]) if cell}
    counts = np.array(list(map(len, options.values())))
    answers = [Answer(option, True, 0) for texts in options.values() for option in texts]
    scores = evaluation.score_test(context, test.select(np.repeat(list(options), counts)), answers)
    how = {name: "mean" if pd.api.types.is_numeric_dtype(scores[name]) else "first" for name in scores}
    scores = scores.groupby(np.repeat(np.arange(len(counts)), counts)).agg(how)
    return scores.assign(mcq_asked=1, mcq_correct=1 / counts, mcq_chance=1 / counts)


if __name__ == "__main__":
    with user_errors():
        for each in map(run_one_shot, sys.argv[1:]) if sys.argv[1:] else run_baselines().values():
            print(f"{each.name}: ROUGE-2 {each.metrics['rouge2']:.4f}, results in {each.folder}")
