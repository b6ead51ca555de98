"""What audit.py says about losses and batches whose fault is known, and that it says nothing about correct ones."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from audit_faults import ASKED, SAID, MeanOfMeans, chat_tokenizer, make_clean, make_faults, tiny
from datasets import Dataset
from torch.nn.functional import cross_entropy, one_hot, pad
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from medqa_lib import audit
from medqa_lib.config import POLICIES
from medqa_lib.labels import (
    IGNORE_INDEX,
    audit_policy,
    encode_example,
    make_collator,
    require_policy,
)

ANSWERS = ["Go on.", "It is.", "No, it is not so.", "Stop.", "Yes. Ask them.", "Rest for a day."]
PROMPT = 37  # tokens of the prompt "Q?": BOS, ▁ and 35 characters
VOCABULARY = 99
_ = IGNORE_INDEX


def tiny_llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


class Oracle(torch.nn.Module):
    """A pretrained model whose logits no hook reaches: sure of the token `ahead` places on, since it looks."""

    device = torch.device("cpu")
    get_output_embeddings = lambda self: None  # noqa: E731
    config = SimpleNamespace(vocab_size=VOCABULARY, get_text_config=lambda decoder: SimpleNamespace(eos_token_id=2))

    def __init__(self, ahead=1):
        super().__init__()
        self.ahead = ahead

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **_inputs):
        noise = torch.randn(*input_ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(0))
        logits = noise + 9 * one_hot(input_ids.roll(-self.ahead, 1), VOCABULARY)
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None)
        loss = ForCausalLMLoss(logits, labels, VOCABULARY, num_items_in_batch=num_items_in_batch)
        return SimpleNamespace(logits=None, loss=loss)


def with_loss(loss_of):
    """A tiny Llama whose loss is `loss_of(logits, labels)`."""

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, use_cache=None, num_items_in_batch=None, **inputs):
            output = super().forward(input_ids=input_ids, use_cache=False, **inputs)
            output.loss = None if labels is None else loss_of(output.logits, labels)
            return output

    torch.manual_seed(0)
    return Changed(tiny_llama().config)


def mean_loss(logits, targets):
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def shift_left(labels):
    return pad(labels, (0, 1), value=_)[..., 1:].contiguous()


def encode(tokenizer, policy="aligned", **options):
    return [
        {
            **encode_example(tokenizer, "Q?", answer, 64, policy, **options),
            "source": "short" if len(answer) < 8 else "long",
        }
        for answer in ANSWERS
    ]


def encode_cut(tokenizer, policy="aligned"):
    return [
        encode_example(tokenizer, "Q?", f"No, it is not so {number}.", PROMPT + 8, policy, truncation="cut")
        for number in range(6)
    ]


def collate(tokenizer, change):
    """A make_collator whose batches `change` alters."""
    return lambda examples: change(make_collator(tokenizer)(examples))


def random_batch(rows=3, tokens=12):
    return audit.probe_batch(tiny_llama(), rows, tokens)


# What the loss does


def test_offset_of_labels_and_who_shifts_them():
    model, batch = tiny_llama(), random_batch()
    labels = batch["labels"]
    assert audit.audit_loss(model, batch)["offset"] == 1
    assert audit.audit_loss(model, batch | {"labels": shift_left(labels)})["faults"] == ["double_shift"]
    assert audit.audit_loss(model, batch | {"shift_labels": labels})["faults"] == ["copy"]
    assert audit.audit_loss(model, batch | {"shift_labels": shift_left(labels)})["faults"] == []
    assert audit.audit_loss(model, batch | {"labels": labels.flip(1)})["faults"] == ["no_constant_offset"]
    assert audit.audit_loss(model, batch | {"labels": labels.roll(1, 1)})["faults"] == ["copy"]
    same = torch.full_like(labels, 7)  # every offset fits: the correct one is believed
    assert audit.audit_loss(model, {"input_ids": same, "labels": same})["faults"] == []
    mixed = torch.cat([labels[:2], shift_left(labels[2:])])
    assert audit.audit_loss(model, batch | {"labels": mixed})["constant"] is False


@pytest.mark.parametrize(
    ("loss", "faults"),
    [
        (lambda logits, labels: mean_loss(logits, labels), ["copy"]),
        (lambda logits, labels: mean_loss(logits, shift_left(labels)), []),
        (lambda logits, labels: mean_loss(logits, shift_left(shift_left(labels))), ["double_shift"]),
        (lambda logits, labels: mean_loss(logits, labels.flatten().roll(-1).view_as(labels)), ["leaks_across_rows"]),
        (lambda logits, labels: mean_loss(logits, shift_left(labels).clamp(min=0)), ["minus_100_supervised"]),
        (
            lambda logits, labels: torch.stack(
                [mean_loss(*row) for row in zip(logits[:, None], shift_left(labels)[:, None], strict=True)]
            ).mean(),
            ["weighted_by_rows"],
        ),
        (lambda logits, labels: -logits.log_softmax(-1)[..., :40].mean(), ["no_constant_offset"]),
    ],
    ids=["unshifted", "shifted", "twice", "row leak", "-100 as 0", "by rows", "no cross-entropy"],
)  # fmt: skip
def test_faults_of_a_loss_are_named(loss, faults):
    batch = random_batch()
    batch["labels"][0, :3] = _
    found = audit.audit_loss(with_loss(loss), batch)
    assert set(faults) <= set(found["faults"]) and (faults or not found["faults"])


def test_normalisation_and_num_items():
    batch = random_batch()
    found = audit.audit_loss(tiny_llama(), batch)
    assert (found["normalisation"], found["honours_num_items"], found["ignores_minus_100"]) == ("tokens", True, True)
    total = with_loss(lambda logits, labels: 23 * mean_loss(logits, shift_left(labels)))
    batch["labels"][2, 5:] = _
    found = audit.audit_loss(total, batch)
    assert found["honours_num_items"] is False
    summed = with_loss(
        lambda logits, labels: cross_entropy(logits.flatten(0, 1), shift_left(labels).flatten(), reduction="sum")
    )
    assert audit.audit_loss(summed, batch)["normalisation"] == "sum"


def test_padding_that_carries_loss_is_named():
    batch = random_batch()
    assert audit.audit_loss(tiny_llama(), batch)["supervises_padding"] is False
    found = audit.audit_loss(tiny_llama(), batch | {"labels": batch["input_ids"]})  # row 1 ends with three
    assert found["faults"] == ["padding_supervised"] and found["offset"] == 1


def test_a_batch_without_loss_or_without_targets():
    batch = random_batch()
    assert audit.audit_loss(with_loss(lambda *_: None), batch)["faults"] == ["no_loss"]
    nothing = batch | {"labels": torch.full_like(batch["labels"], _)}
    assert "no_supervised_tokens" in audit.audit_loss(tiny_llama(), nothing)["faults"]


def test_a_target_that_the_model_is_sure_of_is_seen():
    sure, batch = tiny_llama(tied=True), random_batch()  # a tied model predicts what it has just read, scaled: surely
    with torch.no_grad():
        sure.lm_head.weight.mul_(1000)
    found = audit.audit_loss(sure, batch | {"shift_labels": batch["labels"]})
    assert found["faults"] == ["copy"]


def test_documents_of_a_flattened_row():
    ids, positions = random_batch()["input_ids"][:1], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    starts = {"cu_seq_lens_q": torch.tensor([0, 5, 8, 12])}
    for where in ({"position_ids": positions}, {"position_ids": positions, **starts}):
        batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, _), **where}
        found = audit.audit_loss(tiny_llama(), batch)
        assert found["faults"] == [] and found["leaks_across_rows"] is False
        assert audit.audit_loss(tiny_llama(), batch | {"labels": ids})["faults"] == ["leaks_across_rows"]
    blind = tiny_llama()  # attends across documents, whatever the positions say
    forward = blind.forward
    blind.forward = lambda **inputs: forward(**inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})
    two = {name: batch[name][:, :8] for name in ("input_ids", "labels", "position_ids")}  # the second sees the first
    assert audit.audit_loss(blind, two)["faults"] == ["leaks_across_rows"]


def test_encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model, batch = T5ForConditionalGeneration(config), random_batch()
    found = audit.audit_loss(model, batch)
    assert found["faults"] == [] and found["offset"] == 1
    assert audit.audit_loss(model, batch | {"labels": batch["input_ids"][:, :7].contiguous()})["offset"] == 1
    decoder = batch["input_ids"].flip(1)
    assert audit.audit_loss(model, batch | {"decoder_input_ids": decoder, "labels": decoder})["faults"] == ["copy"]
    late = batch | {"decoder_input_ids": pad(decoder, (1, 0), value=0)[:, :-1], "labels": shift_left(decoder)}
    assert audit.audit_loss(model, late)["faults"] == ["double_shift"]


def test_logits_out_of_reach():
    batch, model = random_batch(), Oracle()
    assert audit.audit_loss(model, batch)["offset"] == 1
    assert audit.audit_loss(model, batch | {"labels": shift_left(batch["labels"])})["faults"] == ["double_shift"]


def test_logits_out_of_reach_and_a_loss_that_none_of_them_explains():
    class Regression(Oracle):
        def forward(self, input_ids, labels=None, **inputs):
            output = super().forward(input_ids, labels, **inputs)
            output.loss = None if labels is None else labels[labels != _].float().mean()
            return output

    assert audit.audit_loss(Regression(), random_batch())["faults"] == ["not_cross_entropy"]


def test_a_trainers_compute_loss_is_audited(tmp_path):
    def judge(compute_loss):
        return audit.audit_loss(tiny_llama(), random_batch(), compute_loss)

    def shift_by_hand(model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = shift_left(inputs.pop("labels"))
        output = model(**inputs, labels=labels)
        return (output.loss, output) if return_outputs else output.loss

    def forget_items(model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        return (output.loss, output) if return_outputs else output.loss

    trainer = Trainer(tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert judge(trainer.compute_loss)["faults"] == [] and judge(trainer.compute_loss)["honours_num_items"]
    assert judge(shift_by_hand)["faults"] == ["double_shift"]
    assert judge(forget_items)["honours_num_items"] is False


def test_the_audit_leaves_model_and_random_state_alone(llama_like):
    model = tiny_llama().train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    audit_policy(model, llama_like, encode(llama_like))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# What is supervised


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_is_named(llama_like, policy):
    for model in (None, tiny_llama()):
        collator = make_collator(llama_like, policy, 64)
        report = audit_policy(model, llama_like, encode(llama_like, policy), collator)
        assert report["policy"] == policy
    require_policy(report, policy)
    with pytest.raises(ValueError, match=policy):
        require_policy(report, "aligned" if policy != "aligned" else "no_eos")


def test_shares_by_hand(llama_like):
    examples = encode(llama_like)
    report = audit_policy(None, llama_like, examples)
    assert report["rows"] == 6
    assert [report[f"{part}_share"] for part in ("prompt", "answer", "padding", "eos")] == [0, 1, 0, 1]
    for source in ("long", "short"):
        shares = report["by_source"][source]
        assert [shares[f"{part}_share"] for part in ("prompt", "answer", "eos")] == [0, 1, 1]
    assert report["shown"][0].endswith("### Response:\n[[Go on.</s>]]")
    examples[0]["labels"][PROMPT - 1] = examples[0]["input_ids"][PROMPT - 1]
    examples[1]["labels"][PROMPT] = _
    report = audit_policy(None, llama_like, examples)
    assert report["prompt_share"] == pytest.approx(1 / (6 * (PROMPT - 1)))  # nothing predicts the first token
    assert report["answer_share"] == pytest.approx(1 - 1 / sum(map(len, ANSWERS)))
    assert set(report["faults"]) == {"prompt_partly_supervised", "answer_partly_supervised"}


def test_eos_lost_by_source_in_rows_that_are_cut(llama_like):
    examples = encode(llama_like)
    for example in examples:
        if example["source"] == "long":
            example["input_ids"], example["labels"] = example["input_ids"][:46], example["labels"][:46]
    report = audit_policy(tiny_llama(), llama_like, examples)
    assert report["policy"] == "aligned" and report["eos_share"] == 1 / 2
    assert {name: shares["eos_share"] for name, shares in report["by_source"].items()} == {"long": 0, "short": 1}
    assert report["rows_cut"] == 1 / 2


def test_eos_supervised_in_part(llama_like):
    examples = [row for _time in range(13) for row in encode(llama_like)] + encode_cut(llama_like)
    for example in examples[1:78]:
        example["labels"][-1] = _
    report = audit_policy(None, llama_like, examples)
    assert report["faults"] == ["eos_partly_supervised"]
    assert (report["rows_with_eos"], report["eos_share"]) == (78 / 84, 1 / 84)


@pytest.mark.parametrize(
    ("policy", "collator"),
    [("aligned", None), ("preshifted", DataCollatorWithFlattening()), ("full_sequence", None)],
)
def test_rows_that_are_all_cut_cannot_tell_of_eos(llama_like, policy, collator):
    report = audit_policy(tiny_llama(), llama_like, encode_cut(llama_like, policy), collator)
    require_policy(report, policy)
    assert report["rows_cut"] == 1


@pytest.mark.parametrize("policy", ["aligned", "no_eos"])
def test_cut_rows_are_not_counted_among_those_that_lack_a_supervised_eos(llama_like, policy):
    report = audit_policy(None, llama_like, encode(llama_like, policy)[:2] + encode_cut(llama_like, policy))
    require_policy(report, policy)
    assert report["rows_with_eos"] == 2 / 8


def test_eos_that_was_never_added(llama_like):
    examples = [{name: example[name][:-1] for name in ("input_ids", "labels")} for example in encode(llama_like)]
    assert audit_policy(None, llama_like, examples)["policy"] == "no_eos"
    half = audit_policy(None, llama_like, [*examples[:3], *encode(llama_like)[3:]])
    assert half["faults"] == ["eos_missing"] and half["rows_cut"] == 0


@pytest.mark.parametrize("model", [None, "llama"])
def test_a_shift_is_found_wherever_it_is_made(llama_like, model):
    model = model and tiny_llama()
    collator = collate(llama_like, lambda batch: batch | {"labels": shift_left(batch["labels"])})
    assert audit_policy(model, llama_like, encode(llama_like), collator)["policy"] == "preshifted"
    examples = [{**example, "labels": [*example["labels"][1:], _]} for example in encode(llama_like)]
    assert audit_policy(model, llama_like, examples)["policy"] == "preshifted"
    twice = with_loss(lambda logits, labels: mean_loss(logits, shift_left(shift_left(labels))))
    assert audit_policy(twice, llama_like, encode(llama_like))["policy"] == "preshifted"


@pytest.mark.parametrize("model", [None, "llama"])
def test_shift_labels_are_what_the_loss_takes(llama_like, model):
    def judge(change):
        examples = encode(llama_like)
        return audit_policy(model and tiny_llama(), llama_like, examples, collate(llama_like, change))["faults"]

    assert judge(lambda batch: batch | {"shift_labels": shift_left(batch["labels"])}) == []
    assert judge(lambda batch: batch | {"shift_labels": batch["labels"]}) == ["copy"]
    assert judge(lambda batch: batch | {"shift_labels": shift_left(shift_left(batch["labels"]))}) == ["double_shift"]


@pytest.mark.parametrize("policy", ["aligned", "no_eos"])
def test_flattened_batches(llama_like, policy):
    examples = encode(llama_like, policy)
    assert audit_policy(tiny_llama(), llama_like, examples, DataCollatorWithFlattening())["policy"] == policy


def test_labels_of_another_ignore_index(llama_like):
    collator = collate(llama_like, lambda batch: batch | {"labels": batch["labels"].masked_fill(batch["labels"] == _, 0)})
    report = audit_policy(tiny_llama(), llama_like, encode(llama_like), collator)
    assert "ignore_index" in report["faults"]


def test_rows_without_targets_and_reversed_labels(llama_like):
    examples = encode(llama_like)
    examples[0]["labels"] = [_] * len(examples[0]["labels"])
    report = audit_policy(None, llama_like, examples)
    assert report["faults"] == ["rows_without_supervised_tokens"] and report["rows_supervised"] == 5 / 6
    for example in examples:
        example["labels"] = [_] * len(example["labels"])
    assert audit_policy(tiny_llama(), llama_like, examples)["faults"] == ["no_supervised_tokens"]
    reverse = [{**example, "labels": example["labels"][::-1]} for example in encode(llama_like)]
    assert "no_constant_offset" in audit_policy(None, llama_like, reverse)["faults"]


def test_without_a_known_prompt_only_what_can_be_known_is_judged(llama_like):
    report = audit.audit_batches(encode(llama_like), make_collator(llama_like), llama_like)
    assert report["faults"] == [] and report["prompt_share"] is None
    report = audit.audit_batches(encode(llama_like), make_collator(llama_like), llama_like, response="[/INST]")
    assert report["faults"] == [] and report["prompt_share"] is None


def test_likelihood_is_told_and_never_refuses(llama_like):
    report = audit_policy(Oracle(), llama_like, encode(llama_like))
    sure = report["nll"][1]
    assert report["likeliest"] == 1 and sure < 0.1 and min(report["nll"][0], report["nll"][2]) > sure + 5
    assert report["chance_nll"] == pytest.approx(math.log(VOCABULARY))
    assert audit_policy(Oracle(), llama_like, encode(llama_like, "preshifted"))["likeliest"] == 2
    odd = audit_policy(Oracle(ahead=2), llama_like, encode(llama_like))
    assert odd["policy"] == "aligned" and odd["likeliest"] == 0
    assert audit_policy(tiny_llama(), llama_like, encode(llama_like))["likeliest"] is None


def test_an_adapter_is_switched_off(llama_like):
    class Tuned(Oracle):  # has learnt the double shift; without its adapter it is the oracle
        @contextmanager
        def disable_adapter(self):
            self.ahead = 1
            yield
            self.ahead = 2

    assert audit_policy(Tuned(ahead=2), llama_like, encode(llama_like))["likeliest"] == 1


# Faults that people had, and set-ups without one


def test_each_of_twenty_historical_faults_is_named(make_llama_like):
    faults = make_faults(make_llama_like)
    found = {name: set(run()) & expected for name, _source, expected, run in faults}
    assert len(faults) == 20 and all(found.values()), found


def test_none_of_fifty_clean_set_ups_is_flagged(make_llama_like):
    setups = make_clean(make_llama_like)
    assert len(setups) == 50
    assert {name: found for name, run in setups if (found := run())} == {}


def test_trls_trainer_hides_its_logits_and_is_audited_all_the_same(make_llama_like, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: its trainer cannot be audited here")
    tokenizer = chat_tokenizer(make_llama_like)
    rows = [{"prompt": f"{asked}\n<|assistant|>\n", "completion": f"{said}</s>"} for asked, said in zip(ASKED, SAID, strict=True)]

    def train(**options):
        arguments = trl.SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, per_device_train_batch_size=2, save_strategy="no",
            gradient_accumulation_steps=2, completion_only_loss=options.pop("completion_only_loss", True),
        )  # fmt: skip
        trainer = trl.SFTTrainer(tiny(), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.add_callback(audit.AuditCallback(trainer, response="<|assistant|>\n", **options))
        trainer.train()

    train()
    with pytest.raises(audit.AuditError, match="prompt supervised"):
        train(completion_only_loss=False)


# The callback and the command line


class AnyCollator(DataCollatorForSeq2Seq):
    def __call__(self, examples):
        return super().__call__([{name: row[name] for name in ("input_ids", "labels")} for row in examples])


def train(tmp_path, tokenizer, policy="aligned", kind=Trainer, steps=2, **options):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=steps, max_steps=1, report_to=[], use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, learning_rate=0.0, logging_steps=1,
    )  # fmt: skip
    trainer = kind(
        tiny_llama(),
        arguments,
        train_dataset=encode(tokenizer, policy),
        data_collator=AnyCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.add_callback(audit.AuditCallback(trainer, response="### Response:\n", **options))
    trainer.train()
    return trainer


def test_callback_stops_a_run_unless_the_fault_is_declared(tmp_path, llama_like, capsys):
    trainer = train(tmp_path, llama_like)
    assert trainer.state.global_step == 1 and len(re.findall("^(?:Label audit|  )", capsys.readouterr().out, re.M)) == 10
    with pytest.raises(audit.AuditError, match="double shift"):
        train(tmp_path, llama_like, "preshifted")
    train(tmp_path, llama_like, "preshifted", declared=("double_shift",))
    with pytest.raises(audit.AuditError, match="prompt_supervised"):
        train(tmp_path, llama_like, declared=("prompt_supervised",))
    train(tmp_path, llama_like, kind=MeanOfMeans, steps=1)  # a fault only where steps accumulate


def test_what_the_trainer_logs_is_the_cross_entropy_by_hand(tmp_path, llama_like):
    """Independent of the audit: every supervised token of a step counts the same, over micro-batches of unequal size."""
    trainer = train(tmp_path, llama_like, steps=3)  # all six rows in one step
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in encode(llama_like)]
    batch = make_collator(llama_like)(rows)
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    by_hand = mean_loss(logits[:, :-1], batch["labels"][:, 1:])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_hand.item(), abs=2e-4)


@pytest.fixture
def folder(tmp_path, llama_like):
    tiny_llama().save_pretrained(tmp_path / "model")
    llama_like.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command_line(folder, tmp_path, capsys):
    rows = [{"q": "Is it so?", "a": answer} for answer in ANSWERS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.csv").write_text("q,a\n" + "\n".join(f'"Is it so?","{answer}"' for answer in ANSWERS))
    columns = ["--prompt-column", "q", "--answer-column", "a"]
    assert audit.main(["--model", str(folder)]) == 0
    for name in ("rows.jsonl", "rows.csv"):
        assert audit.main(["--model", str(folder), "--data", str(tmp_path / name), *columns]) == 0
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"eos_token_id": 7})
    )
    assert audit.main(["--model", str(folder), "--data", str(tmp_path / "rows.csv"), *columns]) == 1
    assert "eos mismatch" in capsys.readouterr().out
    (folder / "model.safetensors").unlink()
    assert audit.main(["--model", str(folder)]) == 0  # random weights tell the same


def test_command_line_with_bad_input_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("q,a\nx,y\n")
    (tmp_path / "rows.jsonl").write_text("no json")
    (tmp_path / "empty.csv").write_text("q,a\n")
    for wrong in (
        ["--model", str(tmp_path / "nothing")],
        ["--model", str(folder), "--data", str(tmp_path / "no.csv")],
        ["--model", str(folder), "--data", str(tmp_path / "rows.csv")],
        ["--model", str(folder), "--data", str(tmp_path / "rows.jsonl")],
        ["--model", str(folder), "--data", str(tmp_path / "empty.csv"), "--prompt-column", "q", "--answer-column", "a"],
    ):
        with pytest.raises(SystemExit, match="2"):
            audit.main(wrong)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_file_stands_alone():
    source = Path(audit.__file__).read_text()
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.mark.slow
def test_the_file_runs_in_an_empty_folder(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(audit.__file__, tmp_path / "empty")
    done = subprocess.run(
        [sys.executable, "audit.py", "--model", str(folder)], cwd=tmp_path / "empty", capture_output=True, text=True
    )
    assert done.returncode == 0 and "offset: 1" in done.stdout


@pytest.mark.slow
def test_real_weights_agree_with_each_policy():
    from medqa_lib.config import PROFILES
    from medqa_lib.model import load_base_model, load_tokenizer

    tokenizer, model = load_tokenizer(PROFILES["cpu"]), load_base_model(PROFILES["cpu"])
    questions = {
        "What is gout?": "Gout is a painful disease of the joints. It comes from too much uric acid in the blood.",
        "How is anaemia treated?": "Iron tablets are the usual treatment. The cause of the loss of iron must be found as well.",
    }
    for policy in POLICIES:
        examples = [encode_example(tokenizer, *pair, 96, policy) for pair in questions.items()]
        report = audit_policy(model, tokenizer, examples, make_collator(tokenizer, policy, 96))
        assert report["policy"] == policy and report["likeliest"] == report["offset"]
