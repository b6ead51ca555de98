"""Twenty faults that people had, rebuilt, and fifty set-ups without one.

`python tests/audit_faults.py` audits them all and writes assets/results/audit/faults.csv. Where trl is installed its collator and
its trainer take the place of transformers' own. Faults of axolotl, LLaMA-Factory and Unsloth are stand-ins written from their
descriptions.
"""

import csv
import importlib.util
import itertools
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy, pad
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from medqa_lib import audit

IGNORE, VOCABULARY = audit.IGNORE, 104
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + '</s>\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ASKED = ["Is it so?", "Why?", "What is it?", "Who says that?", "Can it be?", "Where?"]
SAID = ["No, it is not so.", "Go on.", "It is.", "Stop.", "Yes. Ask them.", "Rest for a day."]
TRL = importlib.util.find_spec("trl") is not None


def chat_tokenizer(make, padding=None):
    tokenizer = make(("Z", "Z"), ("Q", "Q"), ("X", "X"))
    tokenizer.chat_template = CHAT
    tokenizer.pad_token = padding or tokenizer.eos_token
    return tokenizer


def tiny(tied=False, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes, **config))


def chat(tokenizer, turns=1, system=False, supervise=lambda number, role: role == "assistant", bos=True, cut=None, tails=False):
    """Six conversations as ids and labels; `supervise` chooses turns, `tails`: the line break behind EOS too."""
    examples = []
    for question, answer in zip(ASKED, SAID, strict=True):
        ids, labels = [tokenizer.bos_token_id] * bos, [IGNORE] * bos
        roles = [("system", "Be kind.")] * system + [("user", question), ("assistant", answer)] * turns
        for place, (role, text) in enumerate(roles):
            head = tokenizer(f"<|{role}|>\n", add_special_tokens=False)["input_ids"]
            body = tokenizer(text, add_special_tokens=False)["input_ids"]
            tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
            body += [tokenizer.eos_token_id] if role == "assistant" else []
            wanted = supervise(place, role)
            ids += head + body + tail
            labels += ([IGNORE] * len(head) + (body if wanted else [IGNORE] * len(body)) + (tail if tails and wanted else [IGNORE] * len(tail)))  # fmt: skip
        examples.append({"input_ids": ids[:cut], "labels": labels[:cut]})
    return examples


def padded(tokenizer, side="right"):
    """TRL's collator, or where there is no trl the one of transformers."""
    if TRL and side == "right":
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer, padding=True)


def flattened(tokenizer):
    if TRL:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    return DataCollatorWithFlattening()


def after(collator, change):
    return lambda examples: change(collator(examples))


def shift(labels):
    return pad(labels, (0, 1), value=IGNORE)[..., 1:].contiguous()


def each(examples, change):
    return [{**example, "labels": change(example)} for example in examples]


def losing_rows(model, inputs, return_outputs=False, num_items_in_batch=None):
    output = model(**inputs)
    parts = zip(output.logits[:, :-1], inputs["labels"][:, 1:], strict=True)
    loss = torch.stack([cross_entropy(logits, labels) for logits, labels in parts if (labels != IGNORE).any()]).mean()
    return (loss, output) if return_outputs else loss


def shifting(model, inputs, return_outputs=False, num_items_in_batch=None):
    output = model(**{**inputs, "labels": shift(inputs["labels"])}, num_items_in_batch=num_items_in_batch)
    return (output.loss, output) if return_outputs else output.loss


class MeanOfMeans(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        return (output.loss, output) if return_outputs else output.loss


def audit_trainer(kind, tokenizer, model, examples, collator, **options):
    """The faults that AuditCallback raises on in a real run of a Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = kind(model, arguments, train_dataset=examples, data_collator=collator, processing_class=tokenizer)
        trainer.add_callback(audit.AuditCallback(trainer))
        try:
            trainer.train()
        except audit.AuditError as error:
            return error.faults
    return []


def response_only(marker, tokenizer, ids):
    """What TRL 0.16's DataCollatorForCompletionOnlyLM and Unsloth's train_on_responses_only do: nothing found, nothing learnt."""
    marker = tokenizer(marker, add_special_tokens=False)["input_ids"]
    starts = [i + len(marker) for i in range(len(ids)) if ids[i : i + len(marker)] == marker]
    return [IGNORE] * starts[-1] + ids[starts[-1] :] if starts else [IGNORE] * len(ids)


def make_faults(make):
    """(name, whose collator or description, fault that must be named, audited faults) of each of the twenty."""
    t = chat_tokenizer(make)
    hf, trl = f"transformers {transformers.__version__}", "transformers"
    if TRL:
        import trl as package

        trl = f"trl {package.__version__}"
    clean, one = chat(t), tiny()

    def check(examples, collator=None, model=None, **options):
        return audit.audit_batches(examples, collator or padded(t), t, model or one, **options)["faults"]

    relabel = lambda change: lambda batch: {**batch, "labels": change(batch["labels"])}  # noqa: E731
    mlm = transformers.DataCollatorForLanguageModeling(t, mlm=False)
    whole = [{"input_ids": row["input_ids"]} for row in clean]
    odd = [*clean[:5], {**clean[5], "labels": response_only("<|bot|>", t, clean[5]["input_ids"])}]
    twice = [{name: [first] + row[name] for name, first in (("input_ids", 1), ("labels", IGNORE))} for row in clean]

    def pack(examples):
        batch = flattened(t)(examples)
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    def keep_first(examples):
        batch = flattened(t)([{**row, "labels": row["input_ids"]} for row in examples])
        return {**batch, "labels": batch["input_ids"]}

    def supervise_padding(batch):
        return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, t.pad_token_id)}

    def prompt_masked(example, length):  # the prompt's length counted on a tokenisation of its own
        start = next(i for i, label in enumerate(example["labels"]) if label != IGNORE) - length
        return [IGNORE] * start + example["input_ids"][start:]

    stop = tiny(eos_token_id=7)
    zero = relabel(lambda labels: labels.masked_fill(labels == IGNORE, 0))
    first = {"no_supervised_tokens", "rows_without_supervised_tokens"}
    old = after(padded(t), relabel(shift))
    last = chat(t, turns=3, supervise=lambda place, role: place == 5)
    two = chat(t, system=True, supervise=lambda place, role: role != "user")
    long = [{name: values[:24] for name, values in row.items()} for row in clean]
    return [
        ("labels all -100 after a template change", "stand-in for Unsloth", {"no_supervised_tokens"},
         lambda: check(each(clean, lambda row: response_only("<|start|>bot", t, row["input_ids"])))),
        ("response template not found in some rows", "stand-in for TRL 0.16", first, lambda: check(odd)),
        ("pad = EOS, masked by its id", hf, {"no_eos"}, lambda: check(whole, mlm)),
        ("EOS cut off with what follows it", "stand-in for LLaMA-Factory", {"no_eos"}, lambda: check([{k: v[:-3] for k, v in row.items()} for row in clean])),
        ("prompt mask off by one", "stand-in for axolotl", {"prompt_partly_supervised"},
         lambda: check(each(clean, lambda row: prompt_masked(row, 1)))),
        ("packing without position ids", trl, {"packed_without_positions"}, lambda: check(clean, pack)),
        ("flattened batch with the first label kept", trl, {"leaks_across_rows"}, lambda: check(clean, keep_first)),
        ("shift_labels with unshifted labels", trl, {"copy"},
         lambda: check(clean, after(padded(t), lambda batch: {**batch, "shift_labels": batch["labels"]}))),
        ("loss normalised by rows", hf, {"weighted_by_rows"}, lambda: check(clean, compute_loss=losing_rows)),
        ("accumulation without num_items_in_batch", hf, {"num_items_ignored"},
         lambda: audit_trainer(MeanOfMeans, t, tiny(), clean, padded(t))),
        ("labels shifted in the data set", trl, {"double_shift"}, lambda: check(each(clean, lambda row: [*row["labels"][1:], IGNORE]))),
        ("labels shifted in the collator", trl, {"double_shift"}, lambda: check(clean, old)),
        ("labels shifted in the loss", hf, {"double_shift"}, lambda: check(clean, compute_loss=shifting)),
        ("BOS twice", trl, {"double_bos"}, lambda: check(twice)),
        ("left padding supervised", hf, {"padding_supervised"}, lambda: check(clean, after(padded(t, "left"), supervise_padding))),
        ("system prompt supervised", "stand-in for axolotl", {"prompt_partly_supervised"}, lambda: check(two)),
        ("only the last turn supervised", "stand-in for LLaMA-Factory", {"turns_unsupervised"}, lambda: check(last)),
        ("truncation drops the answer", trl, first, lambda: check(long)),
        ("EOS that the model does not know", hf, {"eos_mismatch"}, lambda: check(clean, model=stop)),
        ("ignore_index of another value", trl, {"ignore_index"}, lambda: check(clean, after(padded(t), zero))),
    ]  # fmt: skip


def make_clean(make):
    """(name, audited faults) of fifty set-ups without a fault."""
    setups, one = [], tiny()
    rows = {
        "one turn": {}, "three turns, line breaks too": {"turns": 3, "tails": True}, "system prompt": {"system": True}, "no BOS": {"bos": False},
        "system, two turns": {"turns": 2, "system": True}, "cut": {"cut": 30},
    }  # fmt: skip
    for padding, (name, options) in itertools.product((None, "<unk>"), rows.items()):
        t = chat_tokenizer(make, padding)
        collators = {"padded": padded(t), "flattened": flattened(t), "multiple of 8": DataCollatorForSeq2Seq(t, pad_to_multiple_of=8)}
        collators["shift_labels"] = after(padded(t), lambda batch: {**batch, "shift_labels": shift(batch["labels"])})
        for kind, collator in collators.items():
            if name == "cut":
                options = {"cut": 40}
            setups.append((f"{kind}, {name}, padding {t.pad_token}",
                           lambda t=t, collator=collator, options=options: audit.audit_batches(
                               [row for row in chat(t, **options) if any(label != IGNORE for label in row["labels"])],
                               collator, t, one)["faults"]))  # fmt: skip
    t = chat_tokenizer(make)
    setups.append(("a Trainer that accumulates", lambda: audit_trainer(transformers.Trainer, t, tiny(), chat(t), padded(t))))
    setups.append(("tied untrained model", lambda: audit.audit_batches(chat(t), padded(t), t, tiny(tied=True))["faults"]))
    return setups


def main():
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest

    build_tokenizer = conftest.make_llama_like._get_wrapped_function()()

    path = Path(__file__).parents[1] / "assets" / "results" / "audit" / "faults.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("fault", "built from", "must be named", "found", "caught"))
        for name, source, expected, run in make_faults(build_tokenizer):
            found = run()
            writer.writerow((name, source, " or ".join(sorted(expected)), "; ".join(found), bool(expected & set(found))))
        clean = [(name, run()) for name, run in make_clean(build_tokenizer)]
        flagged = [name for name, found in clean if found]
        writer.writerow((f"{len(clean)} set-ups without a fault", "", "nothing", f"{len(flagged)} flagged", not flagged))
    print(path.read_text(), *flagged, sep="\n")


if __name__ == "__main__":
    main()
