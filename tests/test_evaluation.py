"""A tuned run reports how far the merged model, which is scored, agrees with NF4 + adapter, which was trained; a run that cannot be
scored yet keeps its answers."""

import dataclasses

import pytest
import torch
from smoke_adapters import SMOKE, make_adapter

from medqa_lib import evaluation, generation, training
from medqa_lib.data import prepare_splits
from medqa_lib.model import load_base_model, load_merged


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return prepare_splits(home=tmp_path_factory.mktemp("home"))


def test_evaluate_run_reports_the_agreement_of_tuned_runs_only(adapter, splits, tmp_path, capsys):
    tuned = evaluation.evaluate_run(tmp_path / "exp", adapter, splits, SMOKE, tmp_path, {})
    sizes = {name: tuned.metrics[name] for name in ("merge_questions", "merge_new_tokens")}
    assert sizes == {"merge_questions": 4, "merge_new_tokens": SMOKE.max_new_tokens}
    assert tuned.metrics["merge_identical"] == tuned.metrics["merge_first_16"] == 1.0  # float32: the two differ by rounding only
    line = "Merged against NF4 + adapter, 4 questions, 8 tokens: 100.0% of the answers identical, 100.0% of the first 8 tokens\n"
    assert capsys.readouterr().out.count(line) == 1
    base = evaluation.evaluate_run(tmp_path / "base", None, splits, SMOKE, tmp_path, {})
    assert not [name for name in base.metrics if name.startswith("merge_")]


def test_evaluate_run_notices_a_wrong_merge(adapter, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_merged", lambda adapter_dir, profile, base: load_merged(None, profile, base))
    wrong = evaluation.evaluate_run(tmp_path / "exp", adapter, splits, SMOKE, tmp_path, {}).metrics
    assert wrong["merge_identical"] == 0 and wrong["merge_first_16"] < 0.5


def test_answer_unmerged_gives_the_base_back_untouched(adapter):
    base, ids = load_base_model(SMOKE), torch.arange(2, 20).view(1, -1)
    before = base(ids).logits
    evaluation.answer_unmerged(base, adapter, ["What is gout?"], SMOKE)
    assert torch.equal(base(ids).logits, before)
    assert torch.equal(load_merged(adapter, SMOKE, base)(ids).logits, load_merged(adapter, SMOKE)(ids).logits)


WITH_BERTSCORE = dataclasses.replace(SMOKE, bertscore_encoder="roberta-large")


def test_run_experiment_notices_before_training_that_the_encoder_cannot_be_fetched(dead_hub, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_adapter", lambda *_: pytest.fail("trained"))
    with pytest.raises(RuntimeError, match="BERTScore encoder 'roberta-large'"):
        training.run_experiment("exp_004", splits, WITH_BERTSCORE, tmp_path / "home")


def test_evaluate_run_keeps_its_answers_when_the_encoder_cannot_be_fetched(cache_roberta, splits, tmp_path, monkeypatch):
    def evaluate():
        return evaluation.evaluate_run(tmp_path / "base", None, splits, WITH_BERTSCORE, tmp_path, {})

    with pytest.raises(RuntimeError, match="answers.*are kept"):
        evaluate()
    answers = (tmp_path / "answers" / "smoke-llama" / "base.jsonl").read_bytes()
    assert answers.count(b"\n") >= SMOKE.test_questions and not (tmp_path / "base" / "metrics.json").exists()
    cache_roberta()
    monkeypatch.setattr(generation, "_generate_batches", None)  # calling it would fail
    assert 0 < evaluate().metrics["bertscore_f1"] <= 1
    assert (tmp_path / "answers" / "smoke-llama" / "base.jsonl").read_bytes() == answers
