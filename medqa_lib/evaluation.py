"""Base and tuned models answer the same questions through the same code, and the answers are scored."""

from __future__ import annotations

import gc
import math
import os
import time
from pathlib import Path

import pandas as pd
import torch

from medqa_lib import generation, likelihood, metrics
from medqa_lib.config import Profile, current_profile, home_dir
from medqa_lib.data import prepare_splits
from medqa_lib.labels import encode_split
from medqa_lib.model import load_merged, load_tokenizer
from medqa_lib.results import RunResult, describe_environment, find_finished, question_id, run_folder, run_identity, save_run

# Written for this project, none of them from a data set: each run's answers to them may be shown.
SHOWCASE_QUESTIONS = (
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


def choose_test_questions(test, profile: Profile):
    """The test rows that every run answers: all on a large GPU, a fixed sample of 300 on a small one.

    The sample depends on nothing but the split, so all runs answer the same questions.
    """
    n = profile.test_questions
    if n is None and torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        n = 300
    if n is None or n >= len(test):
        return test
    return test.shuffle(seed=42).select(range(n))


def encode_validation(tokenizer, validation, profile: Profile):
    """Validation rows with aligned labels, whatever policy a run trains on: the loss that is compared."""
    if profile.validation_pairs is not None and profile.validation_pairs < len(validation):
        validation = validation.shuffle(seed=42).select(range(profile.validation_pairs))
    encoded, _ = encode_split(tokenizer, validation, profile.max_length_tokens or 512, policy="aligned")
    return encoded


def run_base(splits=None, profile: Profile | None = None, home: Path | None = None, name: str = "base") -> RunResult:
    """Evaluate the untuned model; a finished evaluation of the same model, data and profile is read instead."""
    profile, home = profile or current_profile(), home or home_dir()
    splits = splits or prepare_splits(home=home)
    identity = run_identity(None, profile, data_hashes(splits))
    folder = run_folder(name, profile, home)
    return find_finished(folder, identity) or evaluate_run(folder, None, splits, profile, home, {"identity": identity})


def data_hashes(splits) -> dict:
    """Split name -> SHA-256 of its content."""
    from medqa_lib.splits import hash_split

    return {name: hash_split(split) for name, split in splits.items()}


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
    model = load_merged(adapter_dir, profile)
    validation = encode_validation(tokenizer, splits["validation"], profile)
    loss = likelihood.answer_loss(model, validation)
    store = generation.AnswerStore(home / "answers" / profile.model_slug / f"{folder.name}.jsonl")
    adapter = generation.hash_adapter(adapter_dir)
    start = time.perf_counter()
    answers = generation.generate_records(model, tokenizer, list(test["question"]), profile.max_new_tokens, store=store,
                                          adapter_hash=adapter)
    answer_time_s = time.perf_counter() - start
    shown = generation.generate_answers(model, tokenizer, SHOWCASE_QUESTIONS, profile.max_new_tokens, store=store, adapter_hash=adapter)
    options = likelihood.option_accuracy(model, tokenizer, list(test["question"]), list(test["choices"]))
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if int(os.environ.get("RANK", "0")):
        return None
    scores = score_test(test, answers, profile)
    numbers = {**metrics.summarize_scores(scores), "n_test": len(scores), "validation_loss": loss, "perplexity": math.exp(loss),
               "n_validation": len(validation), **options, "answer_time_s": answer_time_s,
               "answer_tokens": sum(answer.tokens for answer in answers), **(training or {})}
    if losses is None:
        losses = pd.DataFrame([{"step": 0, "split": "validation", "loss": loss, "learning_rate": None, "tokens": 0}])
    showcase = [{"question": question, "answer": answer} for question, answer in zip(SHOWCASE_QUESTIONS, shown, strict=True)]
    return save_run(folder, {**config, **describe_environment()}, numbers, scores, losses, showcase)


def score_test(test, answers, profile: Profile) -> pd.DataFrame:
    """score_answers' frame, with what identifies a row but does not show it."""
    references = list(test["answer"])
    scores = metrics.score_answers([answer.text for answer in answers], references, questions=list(test["question"]),
                                   encoder=profile.bertscore_encoder, stopped=[answer.stopped for answer in answers])
    about = pd.DataFrame({"question_id": [question_id(question) for question in test["question"]], "source": list(test["source"]),
                          "group": [str(group) for group in test["group"]], "reference_words": [len(text.split()) for text in references]})
    return pd.concat([about, scores.reset_index(drop=True)], axis=1)
