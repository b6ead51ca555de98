"""Base and tuned models answer the same questions through the same code, and the answers are scored."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import os
import time
from pathlib import Path

import pandas as pd
import torch

from medqa_lib import metrics
from medqa_lib.config import Experiment, Profile, current_profile, home_dir
from medqa_lib.data.prepare import hash_splits, prepare_splits
from medqa_lib.evaluation import generation, likelihood
from medqa_lib.evaluation.results import (
    RunResult,
    describe_environment,
    find_finished,
    question_id,
    run_folder,
    run_identity,
    save_run,
)
from medqa_lib.labels import UNUSABLE, encode_split
from medqa_lib.model import check_eos_token, load_base_model, load_merged, load_tokenizer

# Written for this project, none of them from a data set: each run's answers to them may be shown.
SAMPLE_QUESTIONS = (
    "What is high blood pressure?",
    "What are the symptoms of iron deficiency anaemia?",
    "How is malaria diagnosed?",
    "How can type 2 diabetes be prevented?",
    "What are the treatments for asthma?",
    "Is sickle cell disease inherited?",
    "Who is at risk for osteoporosis?",
    "What should I do if I think I am having a heart attack?",
    "Can I take antibiotics for a cold?",
    "A patient on warfarin has an INR of 8 and no bleeding. Which drug reverses the effect?\nA. Protamine\nB. Vitamin K\n"
    "C. Naloxone\nD. Flumazenil",
)

# Questions and new tokens with which NF4 + adapter is asked beside the merged model. It is slow: on a GPU a quarter of a second a token
# for all questions together, on two cores a third, and there four runs of the main job may take 15 seconds longer, not more.
MERGE_CHECK = {"cuda": (64, 64), "cpu": (4, 10)}


def count_test_questions(test, profile: Profile) -> int | None:
    """How many test rows a run answers here, None for all: what the profile says, else all on a large GPU and 300 on a small one."""
    if profile.test_questions is None and len(test) > 300 and torch.cuda.is_available() \
            and torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        return 300
    return profile.test_questions


def choose_test_questions(test, profile: Profile):
    """The test rows that a run answers: a sample that depends on nothing but the split and `count_test_questions`."""
    n = count_test_questions(test, profile)
    return test if n is None or n >= len(test) else test.shuffle(seed=42).select(range(n))


def result_identity(experiment: Experiment | None, profile: Profile, splits) -> dict:
    """`run_identity` of a result: it says how many test questions were answered, so a small GPU's is not set beside a large one's.

    A checkpoint's identity leaves that open: its training may go on on another GPU.
    """
    profile = dataclasses.replace(profile, test_questions=count_test_questions(splits["test"], profile))
    return run_identity(experiment, profile, hash_splits(splits))


def encode_validation(tokenizer, validation, profile: Profile):
    """Validation rows with aligned labels, whatever policy a run trains on: the loss that is compared. Says which rows are left out."""
    if profile.validation_pairs is not None and profile.validation_pairs < len(validation):
        validation = validation.shuffle(seed=42).select(range(profile.validation_pairs))
    limit = profile.max_length or 512
    encoded, counts = encode_split(tokenizer, validation, limit, policy="aligned")
    lost = [f"{counts[name]} ({reason})" for name, reason in UNUSABLE.items() if name in counts]
    if lost and not int(os.environ.get("RANK", "0")):
        print_once(f"Validation loss is over {counts['kept']} of {counts['rows']} pairs; left out at {limit} tokens: {', '.join(lost)}")
    return encoded


@functools.cache
def print_once(line: str) -> None:
    """Print a line unless this process has printed it before: training and evaluation encode the same rows."""
    print(line)


def run_base(splits=None, profile: Profile | None = None, home: Path | None = None, name: str = "base") -> RunResult:
    """Evaluate the untuned model; a finished evaluation of the same model, data, profile and test questions is read instead."""
    profile, home = profile or current_profile(), home or home_dir()
    splits = splits or prepare_splits(home=home)
    identity = result_identity(None, profile, splits)
    folder = run_folder(name, profile, home)
    return find_finished(folder, identity) or evaluate_run(folder, None, splits, profile, home, {"identity": identity})


def evaluate_run(folder: Path, adapter_dir: Path | None, splits, profile: Profile, home: Path, config: dict,
                 losses: pd.DataFrame | None = None, training: dict | None = None) -> RunResult | None:
    """Answer the test questions, score them and write the run's folder.

    Under `accelerate launch` every process answers its share; the first one scores and writes, the others return None.

    Args:
        folder: where the results go; its name is the run's name.
        adapter_dir: the trained adapter, None for the base model.
        config: goes into config.json, with the environment.
        losses: training's loss history; the base has its validation loss only.
        training: numbers of the training run for metrics.json.
    """
    tokenizer = load_tokenizer(profile)
    test = choose_test_questions(splits["test"], profile)
    base, questions = load_base_model(profile), list(test["question"])
    check_eos_token(base, tokenizer)
    unmerged = answer_unmerged(base, adapter_dir, questions, profile) if adapter_dir else []
    model = load_merged(adapter_dir, profile, base)
    validation = encode_validation(tokenizer, splits["validation"], profile)
    loss = likelihood.completion_loss(model, validation)
    store = generation.AnswerStore(home / "answers" / profile.model_slug / f"{folder.name}.jsonl")
    adapter = generation.hash_adapter(adapter_dir)
    start = time.perf_counter()
    answers = generation.generate_records(model, tokenizer, questions, profile.max_new_tokens, store=store, adapter_hash=adapter)
    answer_time_s = time.perf_counter() - start
    shown = generation.generate_answers(model, tokenizer, SAMPLE_QUESTIONS, profile.max_new_tokens, store=store, adapter_hash=adapter)
    options = likelihood.score_options(model, tokenizer, questions, list(test["choices"]))
    del model, base
    gc.collect()
    torch.cuda.empty_cache()
    if int(os.environ.get("RANK", "0")):
        return None
    agreement = compare_merge(tokenizer, answers, unmerged, profile) if unmerged else {}
    scores = score_test(test, answers, profile)
    if options["mcq_asked"].any():
        scores = pd.concat([scores, options], axis=1)
    numbers = {**metrics.summarize_scores(scores), "n_test": len(scores), "validation_loss": loss, "perplexity": math.exp(loss),
               "n_validation": len(validation), **summarize_options(options), "answer_time_s": answer_time_s,
               "answer_tokens": sum(answer.tokens for answer in answers), **agreement, **(training or {})}
    if losses is None:
        losses = pd.DataFrame([{"step": 0, "split": "validation", "loss": loss, "learning_rate": None, "tokens": 0}])
    samples = [{"question": question, "answer": answer} for question, answer in zip(SAMPLE_QUESTIONS, shown, strict=True)]
    return save_run(folder, {**config, **describe_environment()}, numbers, scores, losses, samples)


def summarize_options(options: pd.DataFrame) -> dict:
    """How many multiple-choice questions `score_options` saw, and the share that guessing gets right."""
    asked = int(options["mcq_asked"].sum())
    return {"mcq_questions": asked, **({"mcq_chance": float(options["mcq_chance"].sum() / asked)} if asked else {})}


def merge_check_size(profile: Profile) -> tuple[int, int]:
    """Questions and new tokens of MERGE_CHECK on this machine."""
    questions, new_tokens = MERGE_CHECK["cuda" if torch.cuda.is_available() else "cpu"]
    return questions, min(new_tokens, profile.max_new_tokens)


def answer_unmerged(base, adapter_dir: Path, questions: list[str], profile: Profile) -> list[generation.Answer]:
    """What NF4 + adapter, the model as it was trained, answers to the first of the questions: see MERGE_CHECK.

    Args:
        base: of `load_base_model`; it comes back without the adapter.
    """
    from peft import PeftModel

    number, new_tokens = merge_check_size(profile)
    model = PeftModel.from_pretrained(base, str(adapter_dir))
    answers = generation.generate_records(model, load_tokenizer(profile), questions[:number], new_tokens)
    model.unload()
    return answers


def compare_merge(tokenizer, merged: list[generation.Answer], unmerged: list[generation.Answer], profile: Profile) -> dict:
    """Agreement of the merged model's answers, which are scored, with those of `answer_unmerged`; prints it.

    Returns:
        For metrics.json: `merge_identical` and `merge_first_16` (shares: see `generation.compare_starts`), `merge_questions` and
        `merge_new_tokens` (where the answers of NF4 + adapter were cut).
    """
    new_tokens = merge_check_size(profile)[1]
    found = generation.compare_starts(tokenizer, merged[: len(unmerged)], unmerged)
    print(f"Merged against NF4 + adapter, {len(unmerged)} questions, {new_tokens} tokens: {found['identical']:.1%} of the answers "
          f"identical, {found['first_16']:.1%} of the first {min(16, new_tokens)} tokens")
    return {**{f"merge_{name}": share for name, share in found.items()}, "merge_questions": len(unmerged), "merge_new_tokens": new_tokens}


def score_test(test, answers, profile: Profile) -> pd.DataFrame:
    """score_answers' frame, with what identifies a row but does not show it."""
    references = list(test["answer"])
    scores = metrics.score_answers([answer.text for answer in answers], references, questions=list(test["question"]),
                                   encoder=profile.bertscore_encoder, stopped=[answer.stopped for answer in answers])
    about = pd.DataFrame({"question_id": [question_id(question) for question in test["question"]], "source": list(test["source"]),
                          "group": [str(group) for group in test["group"]]})
    return pd.concat([about, scores.reset_index(drop=True)], axis=1)
