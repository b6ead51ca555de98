"""The merged model, which is scored, answers as NF4 + adapter, which was trained; a run that cannot be scored yet keeps its answers."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from smoke_adapters import SMOKE, make_adapter
from transformers import AutoModelForCausalLM

from medqa_lib.config import EXPERIMENTS, PROFILES
from medqa_lib.data import prepare_splits
from medqa_lib.evaluation import generation, results
from medqa_lib.evaluation import run as evaluation
from medqa_lib.model import load_base_model, load_merged, load_tokenizer
from medqa_lib.standin import model_path
from medqa_lib.training import run as training


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return prepare_splits(home=tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_encode_validation_says_which_rows_are_left_out(splits, monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("RANK", rank)
    rows = splits["validation"].select(range(2)).to_list()
    split = Dataset.from_list(
        [*rows, {**rows[0], "question": "What is this? " * 20}, {**rows[0], "answer": " "}]
    )
    tokenizer = load_tokenizer(SMOKE)
    assert len(evaluation.encode_validation(tokenizer, split, SMOKE)) == 2
    line = (
        "Validation loss is over 2 of 4 pairs; left out at 192 tokens: 1 (the question or the answer is empty), "
        "1 (the prompt alone fills max_length)\n"
    )
    assert capsys.readouterr().out == lines * line
    evaluation.encode_validation(tokenizer, split.select(range(2)), SMOKE)
    assert capsys.readouterr().out == ""


def test_the_merged_model_answers_as_nf4_with_the_adapter(adapter):
    questions, tokenizer = list(evaluation.SAMPLE_QUESTIONS), load_tokenizer(SMOKE)
    base = load_base_model(SMOKE)
    untuned = generation.generate_answers(base, tokenizer, questions, 16)
    unmerged = generation.generate_answers(PeftModel.from_pretrained(base, str(adapter)), tokenizer, questions, 16)
    assert generation.generate_answers(load_merged(adapter, SMOKE), tokenizer, questions, 16) == unmerged  # float32
    assert len(set(unmerged) - set(untuned)) > len(questions) / 2


def make_context(splits, home, profile=SMOKE, name="base"):
    return evaluation.RunContext(name, splits, profile, home, evaluation.result_identity(None, profile, splits))


def test_evaluate_run_scores_the_adapter_it_is_given(adapter, splits, tmp_path):
    run = evaluation.evaluate_run(make_context(splits, tmp_path, name="exp"), adapter, training={"trained_steps": 3})
    tokenizer, model = load_tokenizer(SMOKE), load_merged(adapter, SMOKE)
    questions = [*evaluation.choose_test_questions(splits["test"], SMOKE)["question"], *evaluation.OWN_QUESTIONS]
    answers = generation.generate_answers(model, tokenizer, questions, SMOKE.max_new_tokens)
    assert list(run.samples["answer"]) == answers[SMOKE.test_questions :][: len(evaluation.SAMPLE_QUESTIONS)]
    crossed = zip(evaluation.RED_LINES, answers[-len(evaluation.RED_LINES) :], strict=True)
    assert run.metrics["red_lines_crossed"] == sum(evaluation.crosses_red_line(*each) for each in crossed)
    assert list(run.scores["words"]) == [len(answer.split()) for answer in answers[: SMOKE.test_questions]]
    assert run.metrics["trained_steps"] == 3 and run.metrics["perplexity"] > 1


def test_score_test_says_what_a_row_is_and_takes_further_references(splits, tmp_path):
    test = Dataset.from_dict({
        "question": ["What is gout?", "Which vitamin?\nA. B12\nB. C"], "answer": ["A joint disease.", "C"],
        "references": ['["Gout is arthritis caused by urate."]', ""], "source": ["medquad", "afrimedqa"],
        "group": ["a", "b"], "choices": ["", '{"options": ["B12", "C"], "correct": 1}'], "focus_area": ["gout", ""]})
    answers = [generation.Answer("Gout is arthritis caused by urate.", True, 8), generation.Answer("B12", True, 2)]
    context = make_context(splits, tmp_path)
    scores = evaluation.score_test(context, test, answers)
    assert scores["kind"].tolist() == ["free", "mcq"]
    assert scores["rouge2"].tolist() == [1, 0] and scores["reference_words"].tolist() == [3, 1]
    without = evaluation.score_test(context, test.remove_columns("references"), answers)
    assert without["rouge2"][0] == 0
    assert scores[["fact_asked", "numbers_stated"]].eq(0).all(axis=None)


def test_score_test_counts_what_is_copied_from_training_answers(tmp_path):
    paragraph = " ".join(f"word{i}" for i in range(40))
    rows = {"question": ["What is gout?", "What is mumps?"], "answer": [f"{paragraph} and more.", "An illness."],
            "source": ["medquad"] * 2, "group": ["a", "b"], "choices": [""] * 2, "focus_area": ["gout", "mumps"]}
    train = Dataset.from_dict({**rows, "answer": [f"Gout: {paragraph}.", "A swelling."]})
    texts = [f"{paragraph} " + "new " * 39, f"{paragraph} " + "new " * 41]  # 40 of 79 and of 81 words
    answers = [generation.Answer(text, True, 0) for text in texts]
    splits = {"train": train, "validation": train.select([1]), "test": Dataset.from_dict(rows)}
    scores = evaluation.score_test(make_context(splits, tmp_path), splits["test"], answers)
    assert scores["train_overlap"].tolist() == pytest.approx([40 / 42, 0])
    assert scores["recited"].tolist() == [1, 0]


def test_the_untuned_model_is_evaluated_without_nf4_too(splits, tmp_path):
    released = AutoModelForCausalLM.from_pretrained(model_path(SMOKE))
    loss = tokens = 0
    for row in evaluation.encode_validation(load_tokenizer(SMOKE), splits["validation"], SMOKE):
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss, tokens = loss + float(released(ids, labels=labels).loss) * count, tokens + count
    run = evaluation.run_base(splits, SMOKE, tmp_path, "base_without_nf4")
    rounding = 1e-2 if torch.cuda.is_available() else 1e-5
    assert run.metrics["validation_loss"] == pytest.approx(loss / tokens, abs=rounding)
    quantised = evaluation.run_base(splits, SMOKE, tmp_path)
    assert abs(quantised.metrics["validation_loss"] - loss / tokens) > 1e-4


def test_replaced_weights_reuse_neither_results_nor_answers(splits, tmp_path):
    folder = tmp_path / "models" / "my-llama"
    shutil.copytree(model_path(SMOKE), folder)
    profile = dataclasses.replace(SMOKE, model=str(folder))
    before = evaluation.run_base(splits, profile, tmp_path / "home")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        weights[name] = tensor.flip(0) if "layers" not in name else tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights: checkpoint"):
        evaluation.run_base(splits, profile, tmp_path / "home")
    shutil.rmtree(before.folder)  # as the message asks
    after = evaluation.run_base(splits, profile, tmp_path / "home")
    fresh = evaluation.run_base(splits, profile, tmp_path / "other")
    assert list(after.samples["answer"]) == list(fresh.samples["answer"]) != list(before.samples["answer"])


def test_a_model_with_weights_that_are_not_finite_gives_no_result(splits, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * torch.inf for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nan"):
        evaluation.evaluate_run(make_context(splits, tmp_path, name="exp"), adapter)
    assert not list(tmp_path.glob("results/*/*/metrics.json"))


GPU = dataclasses.replace(PROFILES["gpu"], model="smollm2-135m", bertscore_encoder="all-minilm-l6-v2")
PUBLISHED = sorted((Path(__file__).parents[2] / "assets" / "results" / "smollm2-135m").glob("*/config.json"))


@pytest.fixture
def use_gpu(monkeypatch):
    """Pretend that there is a GPU with so much memory."""

    def use(gib):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30)
        )

    return use


def make_splits(test_rows):
    columns = ("question", "answer", "source", "group", "choices", "focus_area")
    return {
        "test": Dataset.from_dict({name: [f"{name} {row}" for row in range(test_rows)] for name in columns})
    }


@pytest.mark.parametrize(
    ("gib", "rows", "profile", "expected", "answered"),
    [
        (15, 301, GPU, 300, 300),
        (15, 300, GPU, None, 300),
        (80, 301, GPU, None, 301),
        (15, 301, SMOKE, 4, 4),
        (80, 3, SMOKE, 4, 3),
    ],
)
def test_result_identity_names_the_test_questions_that_are_answered(
    use_gpu, gib, rows, profile, expected, answered
):
    splits = make_splits(rows)
    use_gpu(gib)
    assert evaluation.result_identity(None, profile, splits)["evaluation"]["test_questions"] == expected
    assert len(evaluation.choose_test_questions(splits["test"], profile)) == answered


def test_run_base_of_a_small_gpu_is_not_read_on_a_large_one(use_gpu, tmp_path, monkeypatch):
    scores = pd.DataFrame({"question_id": ["a"], "group": ["b"]})
    monkeypatch.setattr(evaluation, "evaluate_run", lambda context: results.save_run(
        context.folder, {"identity": context.identity}, {"n_test": 1}, scores, pd.DataFrame({"step": [0]}), []))
    splits = make_splits(301)
    use_gpu(15)
    run = evaluation.run_base(splits, GPU, tmp_path)
    monkeypatch.setattr(evaluation, "evaluate_run", None)  # from here on runs are only read
    assert evaluation.run_base(splits, GPU, tmp_path).config == run.config
    use_gpu(80)
    with pytest.raises(ValueError, match="evaluation.test_questions"):
        evaluation.run_base(splits, GPU, tmp_path)


def test_run_experiment_goes_on_from_a_checkpoint_of_another_gpu(use_gpu, tmp_path, monkeypatch):
    identities = []

    def refuse(_local, _lasting, identity):
        identities.append(identity)
        raise InterruptedError

    monkeypatch.setattr(training, "CheckpointSession", refuse)
    for gib in (15, 80):
        use_gpu(gib)
        with pytest.raises(InterruptedError):
            training.run_experiment(
                "exp_004", make_splits(301), dataclasses.replace(GPU, bertscore_encoder=None), tmp_path
            )
    assert identities[0] == identities[1]


def test_published_runs_still_have_the_identity_that_a_large_gpu_gives(use_gpu, monkeypatch):
    use_gpu(80)
    assert len(PUBLISHED) > 20
    for path in PUBLISHED:
        saved = json.loads(path.read_text())["identity"]
        name = re.sub("_one_shot$|_asked_.*", "", path.parent.name)
        saved.pop("asked", None)  # `ask_again` adds how the adapter was asked
        experiment = EXPERIMENTS.get(name)
        if experiment is None and name.startswith("exp_"):  # of tests/bench/report_candidates.py
            experiment = dataclasses.replace(EXPERIMENTS[name[:7]], name=name, label_policy=name[8:])
        monkeypatch.setattr(evaluation, "hash_splits", lambda _splits, saved=saved: saved["data"])
        assert evaluation.result_identity(experiment, GPU, make_splits(1747)) == saved, path


WITH_BERTSCORE = dataclasses.replace(SMOKE, bertscore_encoder="roberta-large")


def test_run_experiment_notices_before_training_that_the_encoder_cannot_be_fetched(
    dead_hub, splits, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "train_adapter", lambda *_: pytest.fail("trained"))
    with pytest.raises(RuntimeError, match="BERTScore encoder 'roberta-large'"):
        training.run_experiment("exp_004", splits, WITH_BERTSCORE, tmp_path / "home")


def test_evaluate_run_keeps_its_answers_when_the_encoder_cannot_be_fetched(
    cache_roberta, splits, tmp_path, monkeypatch
):
    def evaluate():
        return evaluation.evaluate_run(make_context(splits, tmp_path, WITH_BERTSCORE))

    with pytest.raises(RuntimeError, match="roberta-large"):
        evaluate()
    answers = (tmp_path / "answers" / "smoke-llama" / "base.jsonl").read_bytes()
    assert answers.count(b"\n") >= SMOKE.test_questions and not list(tmp_path.glob("results/*/*/metrics.json"))
    cache_roberta()
    monkeypatch.setattr(generation, "_choose_decoder", None)  # calling it would fail
    assert 0 < evaluate().metrics["bertscore_f1"] <= 1
    assert (tmp_path / "answers" / "smoke-llama" / "base.jsonl").read_bytes() == answers
