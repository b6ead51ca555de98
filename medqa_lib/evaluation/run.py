"""Untuned and tuned models answer the same questions through the same code, and the answers are scored."""

import dataclasses
import gc
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from medqa_lib import metrics
from medqa_lib.config import PASSAGE_TOKENS, Experiment, Profile, current_profile, get_experiment, home_dir
from medqa_lib.data.prepare import hash_splits, prepare_splits
from medqa_lib.data.splits import train_overlap
from medqa_lib.evaluation import likelihood, results, retrieval
from medqa_lib.evaluation.answers import AnswerStore
from medqa_lib.evaluation.facts import RED_LINES, crosses_red_line, score_facts
from medqa_lib.evaluation.generation import generate_records
from medqa_lib.evaluation.lock import lock_run
from medqa_lib.evaluation.results import RunResult
from medqa_lib.labels import UNUSABLE, encode_split
from medqa_lib.model import check_model, context_length, load_base_model, load_merged, load_tokenizer
from medqa_lib.prompts import encode_prompt

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
    "A patient on warfarin has an INR of 8 and no bleeding. Which drug reverses the effect?\n"
    "A. Protamine\nB. Vitamin K\nC. Naloxone\nD. Flumazenil",
)
OWN_QUESTIONS = (*SAMPLE_QUESTIONS, *RED_LINES)  # every model answers them after the test questions


@dataclass(frozen=True)
class RunContext:
    """What all parts of a run share: its name, the splits, the profile, the home folder and its identity."""

    name: str
    splits: dict
    profile: Profile
    home: Path
    identity: dict
    passages: str = ""  # before each question: "nearest" or "random"; "none" only checks against them

    @property
    def folder(self) -> Path:
        return results.run_folder(self.name, self.profile, self.home)

    def answers(self, adapter_dir: Path | None = None) -> AnswerStore:
        """The run's answers file."""
        path = self.home / "answers" / self.profile.model_slug / f"{self.name}.jsonl"
        return AnswerStore(path, adapter_dir, self.identity["weights"])


def count_test_questions(test, profile: Profile) -> int | None:
    """How many test questions a run answers, None for all: what the profile says, but 300 on a small GPU."""
    small = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 20 * 2**30
    return 300 if profile.test_questions is None and small and len(test) > 300 else profile.test_questions


def choose_test_questions(test, profile: Profile):
    """The test rows that a run answers: a sample that depends only on the split and on their number."""
    return sample_rows(test, count_test_questions(test, profile))


def sample_rows(split, n: int | None):
    """The first n rows in an order that depends on the split only; all of them if n is None or too many."""
    return split if n is None or n >= len(split) else split.shuffle(seed=42).select(range(n))


def result_identity(experiment: Experiment | None, profile: Profile, splits) -> dict:
    """`run_identity` of a result. It holds how many test questions were answered: a small GPU answers fewer.

    A checkpoint's identity leaves that open: its training may go on on another GPU.
    """
    profile = dataclasses.replace(profile, test_questions=count_test_questions(splits["test"], profile))
    return results.run_identity(experiment, profile, hash_splits(splits))


def encode_validation(tokenizer, validation, profile: Profile, context: int = 2**20, passages: str = ""):
    """Validation rows with correct labels, whatever policy a run trains on: this loss compares all runs."""
    limit = min((profile.max_length or 512) + PASSAGE_TOKENS * (passages not in ("", "none")), context)
    encoded, counts = encode_split(tokenizer, sample_rows(validation, profile.validation_pairs), limit)
    lost = [f"{counts[name]} ({reason})" for name, reason in UNUSABLE.items() if name in counts]
    if lost and is_main_process():
        print(f"Validation loss is over {counts['kept']} of {counts['rows']} pairs; left out at {limit} "
              f"tokens: {', '.join(lost)}")
    return encoded


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def run_base(splits=None, profile: Profile | None = None, home: Path | None = None,
             name: str = "base") -> RunResult:
    """Evaluate the untuned model; a finished evaluation of the same model, data and profile is read.

    `base_without_nf4` is the model in the compute dtype, without NF4, in which all other runs have it.
    """
    profile, home = profile or current_profile(), home or home_dir()
    splits = splits or prepare_splits(home=home)
    context = RunContext(name, splits, profile, home, result_identity(None, profile, splits))
    with lock_run(name, profile, home):
        return results.find_finished(context.folder, context.identity) or evaluate_run(context)


def ask_again(name: str, passages: str, part: str = "test", profile: Profile | None = None,
              home: Path | None = None) -> RunResult:
    """A trained run asked with other passages: the run NAME_asked_PASSAGES, or ..._validation.

    Args:
        passages: "nearest", "random" or "none".
        part: "test" or "validation": whose questions are asked.
    """
    profile, home = profile or current_profile(), home or home_dir()
    experiment = profile.scale(get_experiment(name))
    splits = {**prepare_splits(by=experiment.split, home=home)}
    splits["test"] = splits[part]
    identity = result_identity(experiment, profile, splits) | {"asked": passages}
    full_name = f"{name}_asked_{passages}" + ("" if part == "test" else f"_{part}")
    context = RunContext(full_name, splits, profile, home, identity, passages)
    adapter_dir = home / "adapters" / profile.model_slug / name
    with lock_run(full_name, profile, home):
        return results.find_finished(context.folder, identity) or evaluate_run(context, adapter_dir)


def evaluate_run(context: RunContext, adapter_dir: Path | None = None, losses: pd.DataFrame | None = None,
                 training: dict | None = None, before_save=lambda: None) -> RunResult | None:
    """Answer the test questions, score them and write the run's folder.

    Under `accelerate launch` every process answers its share; the first one scores and writes, the others
    return None.

    Args:
        adapter_dir: the trained adapter, None for the untuned model.
        losses: training's loss history; the untuned model has its validation loss only.
        training: numbers of the training run for metrics.json.
        before_save: called before results are written; it raises if this process must not write them.
    """
    test = choose_test_questions(context.splits["test"], context.profile)
    index = retrieval.Index(context.splits["train"]) if context.passages else None
    numbers, answers, options = _ask_model(context, adapter_dir, test, index)
    gc.collect()
    torch.cuda.empty_cache()
    if not is_main_process():
        return None
    scores = score_test(context, test, answers[:len(test)])
    if context.passages:
        texts = [each.text for each in answers[:len(test)]]
        scores = pd.concat([scores, retrieval.check_answers(index, list(test["question"]), texts)], axis=1)
    asked = int(options["mcq_asked"].sum())
    if asked:
        scores = pd.concat([scores, options], axis=1)
        numbers["mcq_chance"] = float(options["mcq_chance"].sum() / asked)
    numbers |= {**metrics.summarize_scores(scores), "n_test": len(scores), "mcq_questions": asked}
    numbers |= training or {}
    if losses is None:
        loss = numbers["validation_loss"]
        losses = pd.DataFrame([{"step": 0, "split": "validation", "loss": loss, "tokens": 0}])
    samples, numbers["red_lines_crossed"] = read_own_answers(answers[len(test):])
    samples = retrieval.cite_samples(index, samples) if context.passages else samples
    config = {"identity": context.identity, **results.describe_environment()}
    before_save()
    return results.save_run(context.folder, config, numbers, scores, losses, samples)


def _ask_model(context: RunContext, adapter_dir: Path | None, test,
               index: retrieval.Index | None) -> tuple[dict, list, pd.DataFrame]:
    """All that needs the model: (numbers, answers to the test and the sample questions, option scores)."""
    profile, tokenizer, questions = context.profile, load_tokenizer(context.profile), list(test["question"])
    base = load_base_model(profile, results.has_nf4(context.name))
    check_model(base, tokenizer)
    model = load_merged(adapter_dir, profile, base)
    validation, asked = context.splits["validation"], [*questions, *OWN_QUESTIONS]
    if context.passages not in ("", "none"):
        validation = retrieval.add_passages(validation, index, context.passages)
        asked = list(map(retrieval.ask, asked, index.find(asked, kind=context.passages)))
    validation = encode_validation(tokenizer, validation, profile, context_length(base), context.passages)
    loss = likelihood.completion_loss(model, validation)
    if not math.isfinite(loss):
        raise ValueError(f"The validation loss of {context.name} is {loss}: no results are saved.")
    answers = generate_records(model, tokenizer, asked, profile.max_new_tokens, context.answers(adapter_dir))
    numbers = {"validation_loss": loss, "perplexity": math.exp(min(loss, 700)),
               "n_validation": len(validation)}
    if context.passages:
        lengths = [len(encode_prompt(tokenizer, each)) for each in asked[:len(test)]]
        numbers["prompt_tokens"] = sum(lengths) / len(lengths)
    options = likelihood.score_options(model, tokenizer, asked[:len(test)], list(test["choices"]))
    return numbers, answers, options


def score_test(context: RunContext, test, answers) -> pd.DataFrame:
    """score_answers' and score_facts' columns, with what identifies a row but does not show it.

    `kind` is "mcq" where the question lists options, else "free"; `train_overlap` which share of the
    reference's words stands inside 13 words that are verbatim in a training answer; `recited` is 1 if half
    of the answer's do.
    """
    rows, texts = test.to_pandas(), [answer.text for answer in answers]
    references = [[text, *json.loads(more or "[]")] for text, more
                  in zip(rows["answer"], rows.get("references", [""] * len(rows)), strict=True)]
    scores = metrics.score_answers(texts, references, list(rows["question"]),
                                   context.profile.bertscore_encoder, [answer.stopped for answer in answers])
    has_options = rows["question"].str.contains("\nA. ", regex=False)
    about = pd.DataFrame({"question_id": rows["question"].map(results.question_id), "source": rows["source"],
                          "group": rows["group"].map(str), "kind": np.where(has_options, "mcq", "free")})
    both = Dataset.from_dict({"answer": [*rows["answer"], *texts], "focus_area": [""] * 2 * len(rows)})
    about["train_overlap"], share = train_overlap({**context.splits, "test": both}).reshape(2, -1)
    found = pd.DataFrame(list(map(score_facts, rows["question"], texts, references)))
    return pd.concat([about, scores, found.assign(recited=(share >= 0.5).astype(int))], axis=1)


def read_own_answers(answers) -> tuple[list[dict], int]:
    """The answers to SAMPLE_QUESTIONS as samples.json has them, and how many cross a red line."""
    texts = {question: answer.text for question, answer in zip(OWN_QUESTIONS, answers, strict=True)}
    samples = [{"question": question, "answer": texts[question]} for question in SAMPLE_QUESTIONS]
    return samples, sum(crosses_red_line(question, texts[question]) for question in RED_LINES)
