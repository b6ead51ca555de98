"""Loss on answers and option accuracy, against computations that share no code with them."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medqa_lib.evaluation import likelihood


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def make_examples(n=23):
    torch.manual_seed(1)
    examples = []
    for row in range(n):
        ids = torch.randint(3, 64, (5 + 3 * row % 37,)).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (2 + row % 3) + ids[2 + row % 3 :]})
    return examples


@torch.no_grad()
def sum_loss_by_hand(model, example):
    """Softmax of one unpadded example, token by token, in float64."""
    logits = model(torch.tensor([example["input_ids"]])).logits[0].double()
    total = count = 0
    for position in range(1, len(example["labels"])):
        if example["labels"][position] != -100:
            row = logits[position - 1]
            total += float(torch.log(torch.exp(row).sum()) - row[example["labels"][position]])
            count += 1
    return total, count


def test_answer_loss_equals_independent_computation(model, monkeypatch):
    monkeypatch.setitem(likelihood.MAX_BATCH_TOKENS, "cpu", 100)  # several batches of several lengths
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 7 * model.config.vocab_size)  # and several parts a batch
    examples = make_examples()
    by_hand = [sum_loss_by_hand(model, example) for example in examples]
    expected = sum(total for total, _ in by_hand) / sum(count for _, count in by_hand)
    found = likelihood.completion_loss(model, examples)
    assert found == pytest.approx(expected, abs=1e-5)
    assert math.exp(found) == pytest.approx(math.exp(expected), rel=1e-3)


def test_answer_loss_is_the_models_own_on_one_example(model):
    example = make_examples()[7]
    with torch.no_grad():
        expected = model(torch.tensor([example["input_ids"]]), labels=torch.tensor([example["labels"]])).loss
    assert likelihood.completion_loss(model, [example]) == pytest.approx(float(expected), abs=1e-5)


def test_answer_loss_weights_tokens_not_examples(model):
    long, short = make_examples()[12], make_examples()[0]
    (long_total, long_count), (short_total, short_count) = (
        sum_loss_by_hand(model, example) for example in (long, short)
    )
    assert long_count > 2 * short_count
    found = likelihood.completion_loss(model, [short, long])
    assert found == pytest.approx((long_total + short_total) / (long_count + short_count), abs=1e-5)
    assert abs(found - (long_total / long_count + short_total / short_count) / 2) > 1e-3


def test_answer_loss_rejects_examples_without_supervised_token(model):
    with pytest.raises(ValueError, match="None of 1 examples has a supervised token"):
        likelihood.completion_loss(model, [{"input_ids": [1, 2, 3], "labels": [-100] * 3}])


def encode_letters(tokenizer, question, answer, max_length, policy, truncation):
    """One token a letter, in the shape of labels.encode_example."""
    assert (policy, truncation) == ("no_eos", "drop")
    prompt = [1, *(ord(c) % 60 + 3 for c in question)]
    option = [ord(c) % 60 + 3 for c in answer]
    return {"input_ids": [*prompt, *option, 2], "labels": [-100] * len(prompt) + option + [-100]}


def test_score_options_picks_likeliest_per_character(model, monkeypatch):
    monkeypatch.setattr(likelihood, "encode_example", encode_letters)
    question, options = "which one", ["iron", "zinc and copper", "b", "vitamin"]
    per_character = []
    for option in options:
        total, count = sum_loss_by_hand(model, encode_letters(None, question, option, 128, "no_eos", "drop"))
        assert count == len(option)
        per_character.append(total / len(option))
    best = per_character.index(min(per_character))
    right, wrong = (
        json.dumps({"options": options, "correct": correct}) for correct in (best, (best + 1) % 4)
    )
    pair = json.dumps(
        {
            "options": [options[best], max(options, key=lambda option: per_character[options.index(option)])],
            "correct": 0,
        }
    )
    found = likelihood.score_options(
        model, None, [question, "", question, question], [right, "", wrong, pair]
    )
    assert found["mcq_correct"].tolist() == [1, 0, 0, 1]
    assert found["mcq_asked"].tolist() == [1, 0, 1, 1]
    assert found["mcq_chance"].tolist() == [1 / 4, 0, 1 / 4, 1 / 2]


def test_score_options_without_choices_asks_nothing(model):
    found = likelihood.score_options(model, None, ["a", "b"], ["", ""])
    assert (found == 0).all(axis=None) and len(found) == 2
