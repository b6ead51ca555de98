"""exp_006: passages before the question, in training and in the answers' prompts, from other groups only."""

import dataclasses

from medqa_lib.config import EXPERIMENTS, PROFILES
from medqa_lib.data import prepare_splits
from medqa_lib.evaluation import run as evaluation
from medqa_lib.training import run_experiment


def test_exp_006_is_trained_and_asked_with_passages(tmp_path, monkeypatch):
    splits, prompts = prepare_splits(home=tmp_path), []
    ask = evaluation.generate_records
    monkeypatch.setattr(evaluation, "generate_records", lambda *a: prompts.extend(a[2]) or ask(*a))
    short = dataclasses.replace(EXPERIMENTS["exp_006"], max_steps=2)
    run = run_experiment(short, splits, PROFILES["smoke"], tmp_path)
    test = evaluation.choose_test_questions(splits["test"], PROFILES["smoke"])
    asked = [f"Question: {question}" for question in test["question"]]
    assert [prompt[prompt.rindex("Question: "):] for prompt in prompts[:len(asked)]] == asked
    assert all(prompt.startswith("[1] ") and "\n\n[2] " in prompt for prompt in prompts[:len(asked)])
    assert run.config["identity"]["experiment"]["passages"] == "nearest"
    assert {"similarity", "sentences", "supported"} <= set(run.scores) and run.metrics["prompt_tokens"] > 100

    prompts.clear()
    again = evaluation.ask_again("exp_006", "none", "validation", PROFILES["smoke"], tmp_path)
    rows = evaluation.choose_test_questions(splits["validation"], PROFILES["smoke"])
    assert prompts[: len(rows)] == list(rows["question"])  # validation's, without passages
    assert again.name == "exp_006_asked_none_validation" and "similarity" in again.scores
