"""The model card says what the run's files say, and its code works as it stands."""

import dataclasses
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from datasets import Dataset, DatasetDict
from smoke_adapters import SMOKE, make_adapter

from medqa_lib.config import get_experiment
from medqa_lib.data import hash_splits, save_splits
from medqa_lib.evaluation.results import load_runs, run_identity, save_run
from medqa_lib.evaluation.run import SAMPLE_QUESTIONS
from medqa_lib.metrics import score_answers
from medqa_lib.publish import hub
from medqa_lib.publish.card import ACCEPTED_ANSWERS, write_card
from medqa_lib.publish.demo import Engine
from medqa_lib.standin import model_path


@pytest.fixture
def home(tmp_path):
    """A home folder with made-up splits of which one test row leaks, and the runs `base` and `exp_004` on them."""

    def pairs(words):
        answers = [f"{word} is an illness." for word in words]
        return Dataset.from_dict(
            {
                "question": [f"What is {word}?" for word in words],
                "answer": answers,
                "source": ["medquad"] * len(words),
                "group": list(words),
                "choices": [""] * len(words),
                "focus_area": list(words),
            }
        )

    splits = DatasetDict(
        train=pairs(["gout", "mumps", "scurvy"]),
        validation=pairs(["rickets"]),
        test=pairs(["gout", "measles"]),
    )
    about = {"by": "group", "seed": 42, "sources": {"medquad": {"origin": "bundled sample", "rows": 9}}}
    save_splits(splits, tmp_path / "data" / "abc" / "group", about)
    about = pd.DataFrame(
        {"question_id": ["1", "2"], "source": "medquad", "group": ["gout", "measles"], "reference_words": 4}
    )
    for name, answers in (
        ("base", ["it is", "who knows"]),
        ("exp_004", ["gout is an illness.", "measles is bad"]),
    ):
        experiment = SMOKE.scale(get_experiment(name)) if name != "base" else None
        scores = pd.concat([about, score_answers(answers, list(splits["test"]["answer"]))], axis=1)
        config = {
            "identity": run_identity(experiment, SMOKE, hash_splits(splits)),
            "date": "2026-01-02",
            "gpu": "none (CPU)",
            "versions": {"torch": "2.13.0", "bert_score": None},
        }
        numbers = {
            "n_test": 2,
            "n_validation": 1,
            "validation_loss": 2.5,
            "trainable_parameters": 1234,
            "trainable_share": 0.00139,
            "train_time_s": 90.0,
        }
        save_run(tmp_path / "results" / name, config, numbers, scores, pd.DataFrame([{"step": 0}]), [])
    return tmp_path


@pytest.fixture
def card(home):
    return make_card(home)


def make_card(home, repository="someone/medqa", **changes):
    runs = load_runs(home / "results")
    return write_card(
        dataclasses.replace(runs["exp_004"], **changes), runs["base"], repository, "owner/Base", home
    )


def test_write_card_has_front_matter_that_the_hub_reads(card):
    data = yaml.safe_load(card.split("---")[1])
    assert (
        data["license"] == "cc-by-nc-sa-4.0"
        and data["base_model"] == "owner/Base"
        and data["library_name"] == "peft"
    )
    assert data["widget"][0]["text"] == f"### Instruction:\n{SAMPLE_QUESTIONS[0]}\n\n### Response:\n"


def test_write_card_reports_results_with_intervals_and_n(card):
    row = next(line for line in card.splitlines() if line.startswith("| token F1"))
    base, tuned, change = (cell.strip() for cell in row.split("|")[2:5])
    assert float(base) < float(tuned) and "[" in change and "n = 2 test questions in 2 groups" in card
    assert "The sample is small" in card


def test_write_card_shows_wrong_answers_beside_accepted_ones(home):
    shown = pd.DataFrame({"question": SAMPLE_QUESTIONS, "answer": "Yes | and\nno. " + "Word " * 99})
    assert set(ACCEPTED_ANSWERS) < set(SAMPLE_QUESTIONS)
    rows = [
        line
        for line in make_card(home, samples=shown).splitlines()
        if line.startswith("| Can I take antibiotics")
    ]
    question, answer, accepted = rows[0].replace("\\|", "/").strip("| ").split(" | ")
    assert (
        answer.startswith("Yes / and no. Word")
        and answer.endswith("Word …")
        and len(answer) <= 302
        and accepted.startswith("No:")
    )
    assert "has not kept any" in make_card(home)


def test_write_card_reports_what_overlap_does_not_show_if_the_run_knows_it(home):
    found = load_runs(home / "results")["exp_004"].metrics
    assert "Multiple choice" not in make_card(home) and "Evaluated merged" not in make_card(home)
    found |= {
        "merge_identical": 0.75,
        "merge_first_16": 0.9876,
        "merge_questions": 64,
        "merge_new_tokens": 32,
    }
    assert "gave 75% of 64 answers the same for 32 tokens, and 98.8% of the first 16." in make_card(
        home, metrics=found
    )


def test_write_card_shows_the_reference_lines_that_were_run(home, card):
    assert "To be read beside it" not in card
    run = load_runs(home / "results")["exp_004"]
    save_run(
        home / "results" / "baseline_nearest_answer",
        run.config,
        {"rougeL": 0.25, "bleu": 9.143},
        run.scores,
        run.losses,
        [],
    )
    assert "the answer of the most similar training question (TF-IDF) | 0.2500 | 9.14 |" in make_card(home)


def test_write_card_reports_what_leaks(card):
    assert "| test | same question | 2 | 1 | 50.0% |" in card
    assert "| test | same disease (MedQuAD) | 2 | 1 | 50.0% |" in card


def test_write_card_names_recipe_labels_licences_and_limits(card):
    for text in (
        "r 8, alpha 16, dropout 0.05, on q_proj, k_proj, v_proj",
        "1,234 parameters, 0.139%",
        "Policy `aligned`",
        "3 train",
        "(Olatunji et al., 2024) | CC BY-NC-SA 4.0",
        "`owner/Base` | see its own card",
        "no commercial use",
        "Not medical advice",
        "bundled sample",
        "torch 2.13.0",
    ):
        assert text in card, text
    assert "bert_score" not in card


def test_write_card_names_what_differs_from_plain_lora(home):
    config = load_runs(home / "results")["exp_004"].config
    recipe = config["identity"]["experiment"]
    recipe |= {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "loraplus_lr_ratio": 16.0,
        "truncation": "drop",
        "weight_decay": 0.01,
    }
    recipe["lora"] |= {"use_rslora": True, "use_dora": True}
    card = make_card(home, config=config)
    for text in (
        "| rsLoRA, DoRA, r 8,",
        "| 0.001 (LoRA+: 16 times that for B), cosine, warm-up 3% |",
        "| weight decay | 0.01 |",
        "| long answers | left out of training |",
    ):
        assert text in card, text


def test_write_card_warns_of_an_adapter_that_was_trained_on_the_bug(home):
    config = load_runs(home / "results")["exp_004"].config
    config["identity"]["experiment"]["labels"] = "preshifted"
    assert "Do not use it for answers" in make_card(home, config=config)


def test_write_card_refuses_a_run_whose_splits_are_not_there(home):
    config = load_runs(home / "results")["exp_004"].config
    config["identity"]["data"]["train"] = "0" * 64
    with pytest.raises(FileNotFoundError, match="No splits under.*exp_004"):
        make_card(home, config=config)


@pytest.mark.slow
def test_write_card_shows_code_that_answers_as_the_demo_does(home, tmp_path):
    """In a process of its own, which does not import medqa_lib: the card's two code blocks, from loading to the printed answer."""
    adapter = make_adapter(tmp_path / "adapter")
    folder = tmp_path / "published"
    card = make_card(home, repository=str(folder))
    hub.save_local(adapter, folder, card, pd.DataFrame([{"passed": True}]), model_path(SMOKE))
    load, ask = (block.removeprefix("python\n") for block in card.split("```")[1:4:2])
    assert len(load.strip().splitlines()) == 4
    exact = "import bitsandbytes.nn.modules; bitsandbytes.nn.modules.has_avx512bf16 = lambda: False\n"  # some CPUs would round to bfloat16
    code = (
        exact
        + load
        + ask.replace("256", "8")
        + "import sys; assert not [name for name in sys.modules if 'medqa' in name]"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    _, tuned = list(Engine({"exp": adapter}, SMOKE).stream(SAMPLE_QUESTIONS[0], "exp", 8))[-1]
    assert run.stdout.strip() == tuned
