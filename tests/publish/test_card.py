"""The model card says what the run's files say, and its code works as it stands."""

import dataclasses
import json
import subprocess
import sys

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard, parse_eval_result_entries
from smoke_adapters import SMOKE, make_adapter

from medqa_lib.config import POLICIES, get_experiment
from medqa_lib.data import hash_splits, save_splits
from medqa_lib.evaluation.baselines import BASELINES
from medqa_lib.evaluation.results import load_runs, run_identity, save_run
from medqa_lib.evaluation.run import SAMPLE_QUESTIONS
from medqa_lib.metrics import score_answers
from medqa_lib.prompts import encode_prompt
from medqa_lib.publish import hub
from medqa_lib.publish.card import write_card
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
    run = dataclasses.replace(runs["exp_004"], **changes)
    return write_card(run, runs["base"], repository, "owner/Base", home)


def cells(card, start):
    """Cells of the table row that starts so."""
    row = next(line for line in card.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.replace("\\|", "/").strip("|").split("|")]


def test_write_card_has_front_matter_that_the_hub_reads(home, card):
    data = ModelCard(card).data
    assert (
        data.license == "cc-by-nc-sa-4.0" and data.base_model == "owner/Base" and data.library_name == "peft"
    )
    assert data.widget[0]["text"] == f"### Instruction:\n{SAMPLE_QUESTIONS[0]}\n\n### Response:\n"
    found = {
        result.metric_type: result.metric_value for result in data.eval_results
    }  # parsed from model-index
    metrics = load_runs(home / "results")["exp_004"].metrics
    assert set(found) == {"rouge1", "rouge2", "rougeL", "bleu", "token_f1"}
    assert all(
        value == pytest.approx(metrics[name], abs=1e-4) for name, value in found.items() if name in metrics
    )


def test_write_card_reports_results_with_intervals_and_n(home, card):
    _, base, tuned, change, *_ = cells(card, "token F1")
    runs = load_runs(home / "results")
    assert float(base) == pytest.approx(runs["base"].scores["token_f1"].mean(), abs=1e-4)
    assert float(tuned) == pytest.approx(runs["exp_004"].scores["token_f1"].mean(), abs=1e-4)
    assert "[" in change and "n = 2 test questions in 2 groups" in card


def test_write_card_shows_wrong_answers_beside_accepted_ones(home):
    shown = pd.DataFrame({"question": SAMPLE_QUESTIONS, "answer": "Yes | and\nno. " + "Word " * 99})
    rows = {question: cells(make_card(home, samples=shown), question) for question in SAMPLE_QUESTIONS[2:9:3]}
    assert all(len(row) == 3 for row in rows.values())
    assert cells(make_card(home, samples=shown), "A patient on warfarin")[2] == "B. Vitamin K"
    _, answer, accepted = cells(make_card(home, samples=shown), "Can I take antibiotics")
    assert answer.startswith("Yes / and no. Word") and answer.endswith(" …") and len(answer) <= 302
    assert accepted.startswith("No:")
    assert "Can I take antibiotics" not in make_card(home)


def test_write_card_reports_what_overlap_does_not_show_if_the_run_knows_it(home):
    now = load_runs(home / "results")["exp_004"].metrics
    assert "ultiple choice" not in make_card(home) and "4-gram" not in make_card(home)
    known = {
        "mcq_questions": 40,
        "mcq_accuracy": 0.25,
        "mcq_chance": 0.2,
        "eos_rate": 0.75,
        "repeated_4gram_share": 0.1,
    }
    base = load_runs(home / "results")["base"]
    base = dataclasses.replace(base, metrics=base.metrics | known)
    run = dataclasses.replace(load_runs(home / "results")["exp_004"], metrics=now | known)
    card = write_card(run, base, "someone/medqa", "owner/Base", home)
    assert "n = 40" in card and "25.0%" in card and "20.0%" in card and "75%" in card and "10%" in card


def test_write_card_shows_the_baselines_that_were_run(home, card):
    assert "TF-IDF" not in card
    run, name = load_runs(home / "results")["exp_004"], "baseline_nearest_answer"
    save_run(home / "results" / name, run.config, {"rougeL": 0.25, "bleu": 9.143, "n_test": 2}, run.scores, run.losses, [])
    assert cells(make_card(home), BASELINES[name])[1:] == ["0.2500", "9.14", "-"]


def test_write_card_reports_what_leaks(card):
    assert "| test | same question | 2 | 1 | 50.0% |" in card
    assert "| test | same disease (MedQuAD) | 2 | 1 | 50.0% |" in card


def test_write_card_names_recipe_labels_licences_and_limits(card):
    assert cells(card, "LoRA")[1] == "r 8, alpha 16, dropout 0.05, on q_proj, k_proj, v_proj"
    assert cells(card, "trainable")[1] == "1,234 parameters, 0.139%"
    assert cells(card, "versions")[1] == "torch 2.13.0"
    assert cells(card, "[AfriMed-QA]")[1].startswith("CC BY-NC-SA 4.0")
    for text in ("`aligned`", "3 train", "`owner/Base`", "bundled sample", "Not medical advice"):
        assert text in card, text


def test_write_card_names_the_optimizers_settings(home):
    config = load_runs(home / "results")["exp_004"].config
    recipe = config["identity"]["experiment"]
    recipe |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.01}
    card = make_card(home, config=config)
    assert cells(card, "learning rate")[1] == "0.001, cosine, warm-up 3%"
    assert cells(card, "weight decay")[1] == "0.01"


@pytest.mark.parametrize("policy", POLICIES)
def test_write_card_knows_every_policy_and_warns_of_the_bug(home, policy):
    config = load_runs(home / "results")["exp_004"].config
    config["identity"]["experiment"]["label_policy"] = policy
    card = make_card(home, config=config)
    assert f"`{policy}`" in card and ("Do not use it" in card) == (policy == "preshifted")


def test_write_card_without_the_runs_splits_says_so_and_nothing_of_leakage(home):
    config = load_runs(home / "results")["exp_004"].config
    config["identity"]["data"]["test"] = "0" * 64
    card = make_card(home, config=config)
    assert "## Leakage" not in card and "0" * 16 in card and "## Limits" in card and "[AfriMed-QA]" in card


def test_multiple_choice_goes_into_model_index_and_eval_results(home, tmp_path):
    runs = load_runs(home / "results")
    known = {"mcq_questions": 40, "mcq_accuracy": 0.25, "mcq_chance": 0.2}
    base = dataclasses.replace(runs["base"], metrics=runs["base"].metrics | known)
    run = dataclasses.replace(runs["exp_004"], metrics=runs["exp_004"].metrics | known)
    text = write_card(run, base, "someone/medqa", "owner/Base", home)
    found = {result.dataset_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert found["intronhealth/afrimedqa_v2"] == 25
    folder = hub.save_local(make_adapter(tmp_path / "a"), tmp_path / "b", text, pd.DataFrame(), "owner/Base")
    (entry,) = parse_eval_result_entries(json.loads((folder / ".eval_results" / "afrimedqa.yaml").read_text()))
    assert (entry.dataset_id, entry.value) == ("intronhealth/afrimedqa_v2", 25) and "40" in entry.notes


@pytest.mark.slow
def test_write_card_shows_code_that_answers_as_the_demo_does(home, tmp_path):
    """In a process of its own, which does not import medqa_lib: the card's two code blocks, from loading to the printed answer."""
    adapter = make_adapter(tmp_path / "adapter")
    folder = tmp_path / "published"
    card = make_card(home, repository=str(folder))
    hub.save_local(adapter, folder, card, pd.DataFrame([{"passed": True}]), model_path(SMOKE))
    load, ask = (block.removeprefix("python\n") for block in card.split("```")[1:4:2])
    assert len(load.strip().splitlines()) == 4
    # some CPUs would round to bfloat16
    exact = "import bitsandbytes.nn.modules; bitsandbytes.nn.modules.has_avx512bf16 = lambda: False\n"
    alone = "import sys; assert not [name for name in sys.modules if name.startswith('medqa_lib')]"
    code = exact + load + ask.replace("512", "8") + alone
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    engine = Engine({"exp": adapter}, SMOKE)
    _, (tuned, _) = list(engine.stream(encode_prompt(engine.tokenizer, SAMPLE_QUESTIONS[0]), ["exp"], 8))[-1]
    assert run.stdout.strip() == tuned
