import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import one_hot, pad
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    modeling_utils,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from medqa_lib.audit import audit_alignment, require_policy
from medqa_lib.config import POLICIES
from medqa_lib.labels import IGNORE_INDEX, PaddingCollator, encode_example, pad_supervised
from medqa_lib.loss_check import check_loss, check_trainer_loss, loss_targets

ANSWERS = ["Go on.", "It is.", "No, it is not so.", "Stop.", "Yes. Ask them.", "Rest for a day."]
VOCABULARY = 99
FLATTENING = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
_ = IGNORE_INDEX


class Oracle(torch.nn.Module):
    """Stands in for a pretrained model: it is sure of the token `ahead` places on, since it looks. Its loss is transformers' own."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=VOCABULARY)

    def __init__(self, ahead=1, strength=9.0, shifts_labels=True):
        super().__init__()
        self.ahead, self.strength, self.shifts_labels = ahead, strength, shifts_labels

    def forward(
        self, input_ids, labels=None, logits_to_keep=None, use_cache=None, shift_labels=None, **_inputs
    ):
        logits = self.strength * one_hot(input_ids.roll(-self.ahead, 1), VOCABULARY).float()
        if logits_to_keep is not None:
            logits = logits[logits_to_keep]
        if labels is not None and not self.shifts_labels:
            shift_labels = labels
        loss = (
            None if labels is None else ForCausalLMLoss(logits, labels, VOCABULARY, shift_labels=shift_labels)
        )
        return SimpleNamespace(logits=logits, loss=loss)


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def encode(tokenizer, policy="aligned", **options):
    return [
        {
            **encode_example(tokenizer, "Q?", answer, 64, policy, **options),
            "source": "short" if len(answer) < 8 else "long",
        }
        for answer in ANSWERS
    ]


def shift_left(labels):
    return pad(labels, (0, 1), value=_)[..., 1:].contiguous()


def collate(tokenizer, change):
    """A PaddingCollator whose batches `change` alters."""
    return lambda examples: change(PaddingCollator(tokenizer)(examples))


@pytest.mark.parametrize("policy", POLICIES)
def test_audit_names_each_policy(llama_like, policy):
    report = audit_alignment(
        Oracle(), llama_like, encode(llama_like, policy), PaddingCollator(llama_like, policy, 64)
    )
    assert report["policy"] == policy
    assert report["likelihood_can_tell"]
    assert "likelihood agrees" in report["verdict"]
    require_policy(report, policy)


def test_audit_reports_shares_and_likelihoods(llama_like):
    report = audit_alignment(Oracle(), llama_like, encode(llama_like), PaddingCollator(llama_like))
    prompt, answer = 37, sum(map(len, ANSWERS))  # BOS, ▁ and 35 characters; no answer holds " G"
    assert report["rows"] == 6
    assert report["supervised_share"] == pytest.approx((answer + 6) / (answer + 6 + 6 * prompt))
    shares = [report[f"{part}_supervised_share"] for part in ("prompt", "answer", "padding", "eos")]
    assert shares == [0, 1, 0, 1]
    assert report["eos_supervised_by_source"] == {"long": 1, "short": 1}
    assert report["structure"][1] == 1
    sure = math.log(math.exp(9) + VOCABULARY - 1) - 9  # -log softmax of a 9 among zeros
    assert report["nll"][1] == pytest.approx(sure, rel=1e-3)
    assert report["nll"][0] > sure + 8
    assert report["nll"][2] > sure + 8


def test_audit_counts_lost_eos_by_source(llama_like):
    examples = encode(llama_like)
    for example in examples:
        if example["source"] == "long":
            example["input_ids"], example["labels"] = example["input_ids"][:46], example["labels"][:46]
    report = audit_alignment(Oracle(), llama_like, examples)
    assert report["policy"] == "aligned"
    assert report["eos_supervised_share"] == pytest.approx(1 / 2)
    assert report["eos_supervised_by_source"] == {"long": 0, "short": 1}


def test_audit_finds_eos_that_is_supervised_in_part(llama_like):
    examples = [row for _time in range(13) for row in encode(llama_like)] + encode_rows_cut_mid_answer(
        llama_like
    )
    for example in examples[1:78]:
        example["labels"][-1] = _
    report = audit_alignment(Oracle(), llama_like, examples)
    assert report["policy"] is None and report["eos_share"] == 78 / 84
    assert "EOS in part: a target in only 1.3% of the rows that have one" in report["verdict"]
    with pytest.raises(ValueError, match="declares labels 'aligned', but the audit found None: EOS in part"):
        require_policy(report, "aligned")


def encode_rows_cut_mid_answer(tokenizer, policy="aligned"):
    return [
        encode_example(tokenizer, "Q?", f"No, it is not so {number}.", 37 + 8, policy, truncation="cut")
        for number in range(6)
    ]


@pytest.mark.parametrize("policy", ["aligned", "preshifted", "full_sequence"])
@pytest.mark.parametrize("collator", [None, FLATTENING])
def test_audit_of_rows_that_are_all_cut_does_not_judge_eos(llama_like, policy, collator):
    report = audit_alignment(Oracle(), llama_like, encode_rows_cut_mid_answer(llama_like, policy), collator)
    require_policy(report, policy)
    assert (
        "every row is cut and has no EOS" in report["verdict"]
        and "answer and its EOS" not in report["verdict"]
    )


@pytest.mark.parametrize("policy", ["aligned", "preshifted", "no_eos"])
def test_audit_does_not_count_cut_rows_among_those_that_lack_a_supervised_eos(llama_like, policy):
    report = audit_alignment(
        Oracle(), llama_like, encode(llama_like, policy) + encode_rows_cut_mid_answer(llama_like, policy)
    )
    require_policy(report, policy)
    assert report["eos_share"] == 1 / 2 and "cut" not in report["verdict"]


def test_audit_finds_an_eos_that_was_never_added(llama_like):
    examples = [
        {name: example[name][:-1] for name in ("input_ids", "labels")} for example in encode(llama_like)
    ]
    assert (
        len({len(example["input_ids"]) for example in examples}) > 1
    )  # so they were not cut at a maximum length
    report = audit_alignment(Oracle(), llama_like, examples)
    assert report["policy"] == "no_eos" and not report["all_cut"]


def test_audit_finds_a_shift_made_in_the_collator(llama_like):
    collator = collate(llama_like, lambda batch: batch | {"labels": shift_left(batch["labels"])})
    report = audit_alignment(Oracle(), llama_like, encode(llama_like), collator)
    assert report["policy"] == "preshifted"
    assert report["verdict"].startswith("double shift: position t learns token t + 2")
    with pytest.raises(
        ValueError, match="declares labels 'aligned', but the audit found 'preshifted': double shift"
    ):
        require_policy(report, "aligned")


def test_audit_finds_a_shift_made_in_the_data_set(llama_like):
    examples = [{**example, "labels": [*example["labels"][1:], _]} for example in encode(llama_like)]
    assert audit_alignment(Oracle(), llama_like, examples)["policy"] == "preshifted"


def keep_answers(batch, targets):
    keep = shift_left(batch["labels"]) != _
    return batch | {"logits_to_keep": keep, "shift_labels": targets(batch["labels"])[keep]}


def slice_labels(batch):
    keep = shift_left(batch["labels"]) != _
    return batch | {"logits_to_keep": keep, "labels": shift_left(batch["labels"])[keep]}


@pytest.mark.parametrize(
    ("change", "policy", "verdict"),
    [
        (lambda batch: batch | {"shift_labels": shift_left(batch["labels"])}, "aligned", "aligned"),
        (lambda batch: keep_answers(batch, shift_left), "aligned", "aligned"),
        (lambda batch: batch | {"shift_labels": batch["labels"]}, None, "copying"),
        (
            lambda batch: batch | {"shift_labels": shift_left(shift_left(batch["labels"]))},
            "preshifted",
            "double shift",
        ),
        (slice_labels, None, "double shift"),
    ],
    ids=["right", "right on answers", "unshifted", "shifted twice", "sliced labels without shift_labels"],
)
def test_audit_sees_what_shift_labels_do(llama_like, change, policy, verdict):
    report = audit_alignment(Oracle(), llama_like, encode(llama_like), collate(llama_like, change))
    assert report["policy"] == policy
    assert report["verdict"].startswith(verdict)


def test_audit_sees_a_model_that_does_not_shift(llama_like):
    report = audit_alignment(Oracle(shifts_labels=False), llama_like, encode(llama_like))
    assert report["verdict"].startswith("copying")
    report = audit_alignment(Oracle(shifts_labels=False), llama_like, encode(llama_like, "preshifted"))
    assert report["policy"] == "aligned"


@pytest.mark.parametrize("collator", [FLATTENING, DataCollatorWithFlattening()])
@pytest.mark.parametrize("policy", ["aligned", "preshifted", "no_eos"])
def test_audit_reads_flattened_batches(llama_like, policy, collator):
    assert audit_alignment(Oracle(), llama_like, encode(llama_like, policy), collator)["policy"] == policy


def test_audit_sees_padding_that_is_part_of_the_rows(llama_like):
    rows = pad_supervised(Dataset.from_list(encode(llama_like)), 64, eos_token_id=2)
    report = audit_alignment(Oracle(), llama_like, rows, FLATTENING)
    assert report["policy"] == "padding_supervised"
    assert report["eos_supervised_share"] == 1


@pytest.mark.parametrize("policy", ["aligned", "preshifted"])
def test_audit_of_a_random_model_says_that_likelihood_cannot_tell(llama_like, policy):
    report = audit_alignment(tiny_llama(), llama_like, encode(llama_like, policy))
    assert not report["likelihood_can_tell"]
    assert report["verdict"].startswith("cannot tell from likelihood")
    assert report["policy"] == policy  # by structure, and it says so
    assert "structurally" in report["verdict"]


def test_audit_refuses_when_structure_and_likelihood_disagree(llama_like):
    report = audit_alignment(Oracle(ahead=2), llama_like, encode(llama_like))
    assert report["policy"] is None
    assert report["verdict"].startswith("contradictory: aligned")
    with pytest.raises(ValueError, match="the audit found None: contradictory"):
        require_policy(report, "aligned")


def test_audit_switches_an_adapter_off(llama_like):
    class Tuned(Oracle):  # has learnt the double shift; without its adapter it is the oracle
        @contextmanager
        def disable_adapter(self):
            self.ahead = 1
            yield
            self.ahead = 2

    assert audit_alignment(Tuned(ahead=2), llama_like, encode(llama_like))["policy"] == "aligned"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row["labels"].__setitem__(37, _), "of the answers' tokens are supervised"),
        (lambda row: row["labels"].__setitem__(36, row["input_ids"][36]), "2.8% of the prompt is supervised"),
        (lambda row: row.update(labels=row["labels"][::-1]), "no constant offset"),
    ],
    ids=["mask too long", "mask too short", "reversed"],
)
def test_audit_finds_masks_that_are_off(llama_like, change, words):
    examples = encode(llama_like)
    for example in examples:
        change(example)
    report = audit_alignment(Oracle(), llama_like, examples)
    assert report["policy"] is None
    assert words in report["verdict"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda batch: batch | {"labels": None, "shift_labels": shift_left(batch["labels"])},
            "the model returns no loss",
        ),
        (
            lambda batch: batch | {"input_ids": batch["input_ids"].flip(0)},
            "changed the input ids or their order",
        ),
        (
            lambda batch: batch | {"labels": torch.full_like(batch["labels"], _)},
            "The loss is computed from something else",
        ),
    ],
    ids=["no labels", "reordered", "nothing supervised"],
)
def test_audit_of_a_broken_batch_is_one_clear_error(llama_like, change, message):
    with pytest.raises(ValueError, match=message):
        audit_alignment(Oracle(), llama_like, encode(llama_like), collate(llama_like, change))


def test_loss_targets_by_hand():
    batch = {"input_ids": torch.tensor([[1, 5, 7, 2]]), "labels": torch.tensor([[_, _, 7, 2]])}
    assert loss_targets(batch).tolist() == [[_, 7, 2, _]]
    assert loss_targets(batch, shifts_labels=False).tolist() == [[_, _, 7, 2]]
    assert loss_targets(batch | {"shift_labels": torch.tensor([[5, _, _, 7]])}).tolist() == [[5, _, _, 7]]
    answers = {"shift_labels": torch.tensor([[7, 2]])}
    for keep in (torch.tensor([1, 2]), torch.tensor([[1, 2]]), torch.tensor([[False, True, True, False]])):
        assert loss_targets(batch | answers | {"logits_to_keep": keep}).tolist() == [[_, 7, 2, _]]
    assert loss_targets(batch | answers | {"logits_to_keep": 2}).tolist() == [[_, _, 7, 2]]
    with pytest.raises(ValueError, match="4 targets for 2 predictions"):
        loss_targets(batch | {"logits_to_keep": 2})


def test_check_loss_of_an_indifferent_model_is_log_vocabulary(llama_like):
    batch = PaddingCollator(llama_like)(encode(llama_like))
    assert check_loss(Oracle(strength=0.0), [batch], math.log(VOCABULARY)) < 1e-6
    with pytest.raises(ValueError, match=r"loss of a step is 4\.00000, but .* is 4\.59512"):
        check_loss(Oracle(strength=0.0), [batch], 4.0)
    with pytest.raises(ValueError, match="nan"):
        check_loss(Oracle(strength=0.0), [batch], math.nan)


BATCHINGS = {
    "padded": PaddingCollator,
    "padding-free": lambda _tokenizer: DataCollatorWithFlattening(),
    "padding-free, answer logits": lambda _tokenizer: FLATTENING,
}
masks_logits = hasattr(
    modeling_utils, "slice_logits_to_keep"
)  # older transformers take positions, the same in each row, and no mask
if masks_logits:
    BATCHINGS["padded, answer logits"] = lambda tokenizer: collate(
        tokenizer, lambda batch: keep_answers(batch, shift_left)
    )


@pytest.mark.parametrize("policy", ["aligned", "preshifted", "full_sequence"])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_check_loss_accepts_the_models_loss_in_every_batching(llama_like, batching, policy):
    model, batch = tiny_llama(), BATCHINGS[batching](llama_like)(encode(llama_like, policy))
    loss = model(**batch, use_cache=False).loss.item()
    assert check_loss(model, [batch], loss) < 1e-5
    with pytest.raises(ValueError, match="supervised tokens is"):
        check_loss(model, [batch], loss + 2e-4)


def test_check_loss_allows_more_in_bfloat16(llama_like):
    model, batch = tiny_llama().to(torch.bfloat16), PaddingCollator(llama_like)(encode(llama_like))
    loss = model(**batch).loss.item()
    check_loss(model, [batch], loss + 5e-3)
    with pytest.raises(ValueError, match="supervised tokens is"):
        check_loss(model, [batch], loss + 2e-2)


def make_trainer(tmp_path, tokenizer, collator, rows=2, gradient_accumulation_steps=3, kind=Trainer):
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    examples = [{name: row[name] for name in ("input_ids", "labels")} for row in encode(tokenizer)]
    return kind(tiny_llama(), arguments, train_dataset=examples, data_collator=collator)


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 3])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_check_trainer_loss_holds_in_every_batching_and_is_what_it_trains_on(
    tmp_path, llama_like, batching, gradient_accumulation_steps
):
    collator = BATCHINGS[batching](llama_like)
    trainer = make_trainer(
        tmp_path, llama_like, collator, 6 // gradient_accumulation_steps, gradient_accumulation_steps
    )
    state = torch.get_rng_state()
    assert check_trainer_loss(trainer) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    trainer.train()  # all six rows in one step, so their order is no matter
    check_loss(
        trainer.model, [PaddingCollator(llama_like)(encode(llama_like))], trainer.state.log_history[0]["loss"]
    )


@pytest.mark.skipif(not masks_logits, reason="this transformers takes no mask of logits to keep")
def test_check_trainer_loss_finds_targets_that_are_off_by_one(tmp_path, llama_like):
    collator = collate(llama_like, lambda batch: keep_answers(batch, lambda labels: labels.roll(-2, 1)))
    with pytest.raises(ValueError, match="supervised tokens is"):
        check_trainer_loss(make_trainer(tmp_path, llama_like, collator))


def test_check_trainer_loss_finds_a_mean_of_means(tmp_path, llama_like):
    class MeanOfMeans(Trainer):  # every micro-batch counts the same, whatever its tokens
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss / 3

    trainer = make_trainer(tmp_path, llama_like, PaddingCollator(llama_like), kind=MeanOfMeans)
    with pytest.raises(ValueError, match="not weighted by their tokens"):
        check_trainer_loss(trainer)


@pytest.mark.slow
def test_audit_with_real_weights_names_each_policy():
    from medqa_lib.config import PROFILES
    from medqa_lib.model import load_base_model, load_tokenizer

    tokenizer, model = load_tokenizer(PROFILES["cpu"]), load_base_model(PROFILES["cpu"])
    questions = {
        "What is gout?": "Gout is a painful disease of the joints. It comes from too much uric acid in the blood.",
        "How is anaemia treated?": "Iron tablets are the usual treatment. The cause of the loss of iron must be found as well.",
    }
    for policy in POLICIES:
        examples = [
            encode_example(tokenizer, question, answer, 96, policy) for question, answer in questions.items()
        ]
        report = audit_alignment(model, tokenizer, examples, PaddingCollator(tokenizer, policy, 96))
        assert report["likelihood_can_tell"], report["verdict"]
        assert report["policy"] == policy
