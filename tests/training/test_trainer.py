"""The loss that is trained on is the cross-entropy of the next token, and what a Trainer leaves behind: log, table, arguments."""

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from medqa_lib import training
from medqa_lib.config import EXPERIMENTS, PROFILES
from medqa_lib.labels import IGNORE_INDEX, encode_example, make_collator
from medqa_lib.training.plan import TrainingPlan
from medqa_lib.training.session import CheckpointSession
from medqa_lib.training.trainer import AnswerTrainer, loss_history, loss_table, training_arguments


def encode(tokenizer, policy):
    answers = ("Go", "It is. Go on, and on.", "On.", "Go. It goes on and on.")
    return [encode_example(tokenizer, "Q?", answer, 128, policy) for answer in answers]


def make_small_trainer(folder, tokenizer, policy, plan):
    """A Trainer of one step with four examples, and its random two-layer Llama without dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).float()
    if plan.path != "padded":  # as the fast paths do: a forward pass that names no columns
        original = model.forward
        model.forward = lambda *args, **inputs: original(*args, **inputs)
    experiment = EXPERIMENTS["exp_004"]
    arguments = training_arguments(experiment, folder, plan)
    arguments.max_steps, arguments.save_steps, arguments.eval_steps = 1, 1, 1
    data = Dataset.from_list(encode(tokenizer, policy))
    collator = plan.collator(make_collator(tokenizer, policy, 128))
    session = CheckpointSession(folder, folder, {})
    return AnswerTrainer(
        model, arguments, session=session, train_dataset=data, eval_dataset=data, data_collator=collator
    )


@torch.no_grad()
def cross_entropy_by_hand(model, examples):
    """-log p of each supervised id at the position before it, one example at a time; the mean over all of them."""
    terms = []
    for example in examples:
        probabilities = model(torch.tensor([example["input_ids"]])).logits[0].double().softmax(-1)
        for position, label in enumerate(example["labels"]):
            if position > 0 and label != IGNORE_INDEX:
                terms.append(-probabilities[position - 1, label].log())
    return float(torch.stack(terms).mean())


@pytest.mark.parametrize("policy", ["aligned", "preshifted", "full_sequence", "no_eos"])
@pytest.mark.parametrize(("path", "rows"), [("padded", 4), ("padded", 1), ("padding_free", 4)])
def test_first_loss_is_the_cross_entropy_of_the_next_token(llama_like, tmp_path, policy, path, rows):
    """Whatever the micro-batch: a mean of means would weigh the tokens of short answers more."""
    plan = TrainingPlan(path, torch.float32, rows, 4 // rows, "by hand")
    trainer = make_small_trainer(tmp_path, llama_like, policy, plan)
    if (
        path == "padding_free"
    ):  # transformers' own attention sees one row: the documents' starts are in position_ids
        trainer.model.set_attn_implementation("eager")
    expected = cross_entropy_by_hand(trainer.model.eval(), encode(llama_like, policy))
    with trainer.session:
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    losses = loss_history(trainer.state.log_history)
    assert list(losses["split"]) == ["train", "validation"] and list(losses["step"]) == [1, 1]
    tokens = sum(len(example["input_ids"]) for example in encode(llama_like, policy))
    assert list(losses["tokens"]) == [tokens, tokens]


def steps_of(folder, tokenizer, rows, accumulation):
    """The rows of each step of two epochs over 10 rows, a list per micro-batch, as the collator is given them."""
    seen = []

    def collate(batch):
        seen.append([example["input_ids"][0] for example in batch])
        return make_collator(tokenizer, "aligned", 128)(batch)

    data = Dataset.from_list(
        [
            {"input_ids": [row] + [1] * (row * 7 % 5), "labels": [row] + [1] * (row * 7 % 5)}
            for row in range(10)
        ]
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    plan = TrainingPlan("padded", torch.float32, rows, accumulation, "by hand")
    arguments = training_arguments(EXPERIMENTS["exp_004"], folder, plan)
    arguments.max_steps, arguments.eval_steps = 6, 100
    session = CheckpointSession(folder, folder, {})
    AnswerTrainer(
        model, arguments, session=session, train_dataset=data, eval_dataset=data, data_collator=collate
    ).train()
    return seen


def test_micro_batches_of_a_step_are_sorted_by_length_and_the_step_keeps_its_rows(llama_like, tmp_path):
    whole = steps_of(tmp_path / "whole", llama_like, rows=4, accumulation=1)
    parts = steps_of(tmp_path / "parts", llama_like, rows=2, accumulation=2)
    # an epoch has three steps, or five micro-batches: the first two steps of both epochs
    steps = [[*parts[i], *parts[i + 1]] for i in (0, 2, 5, 7)]
    assert [sorted(whole[i]) for i in (0, 1, 3, 4)] == [sorted(step) for step in steps]
    for step in steps:
        lengths = [row * 7 % 5 for row in step]
        assert lengths == sorted(lengths, reverse=True)


def test_loss_table_has_a_line_per_step():
    losses = pd.DataFrame(
        {"step": [1, 50, 50], "split": ["train", "train", "validation"], "loss": [2.5, 2.25, 2.125]}
    )
    lines = [line.split() for line in loss_table(losses).splitlines()]
    assert lines == [["step", "train", "validation"], ["1", "2.5000"], ["50", "2.2500", "2.1250"]]


def test_a_process_that_sees_two_gpus_counts_one_batch(monkeypatch, tmp_path):
    make = TrainingArguments.__post_init__

    def see_two(self):
        make(self)
        self._n_gpu = 2  # as on a machine with two

    monkeypatch.setattr(TrainingArguments, "__post_init__", see_two)
    plan = TrainingPlan("padded", torch.float32, 4, 8, "to test")
    assert training_arguments(EXPERIMENTS["exp_004"], tmp_path, plan).train_batch_size == 4


def test_a_run_without_nf4_trains_on_other_weights_than_one_with_it(tmp_path):
    first = {}
    for name in ("exp_004", "exp_004_without_nf4"):
        losses = training.run_experiment(name, profile=PROFILES["smoke"], home=tmp_path).losses
        first[name] = losses["loss"].iloc[0]  # of the first step: LoRA's B is still zero
    assert abs(first["exp_004"] - first["exp_004_without_nf4"]) > 1e-4
