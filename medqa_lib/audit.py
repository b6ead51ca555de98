"""Does a training loss compare each prediction with the token it should? Needs no pretrained weights.

The gradient of a cross-entropy with respect to the logits of position t is w * (p - onehot(target)): its one
negative entry names the token that t is trained on, its size the weight w. Targets are compared with the ids
that positions have read: offset 0 copies the newest one, +1 is the next token (correct), +2 the one after it.

    audit_loss(model, batch)                     what the loss of a batch does
    audit_batches(dataset, collator, tokenizer)  what is supervised: prompt, answer, EOS, padding, by source
    AuditCallback(trainer)                       both at the start of a run; raises on an undeclared fault
    python -m medqa_lib.audit --model ID         from a command line (copied elsewhere: python audit.py ...)
"""

from __future__ import annotations

import argparse
import csv
import inspect
import itertools
import json
import math
import sys
from collections import defaultdict
from contextlib import nullcontext

import torch
import transformers
from torch.nn.functional import cross_entropy, pad

IGNORE = -100
OFFSETS = (1, 0, 2, -1, 3)  # the first one wins where a row repeats a token
WORDS = {  # what the other names do not say by themselves
    "copy": "position t is trained on the token it has just read",
    "double_shift": "labels are shifted twice, position t is trained on token t + 2",
    "no_constant_offset": "targets are not their row's tokens at one offset",
    "not_cross_entropy": "no position's log-probability explains the loss",
    "num_items_ignored": "micro-batches are not weighted by their tokens",
    "no_eos": "the end of an answer is never a target",
    "eos_mismatch": "the model does not stop at the tokenizer's EOS",
}


class AuditError(ValueError):
    """The faults found are not those declared; `faults` lists them."""


def audit_loss(model, batch: dict, compute_loss=None) -> dict:
    """Which token is each position's prediction compared with, and with what weight?

    Args:
        batch: a collator's: input_ids (B, T) or an encoder's input, labels, and what else the model takes.
        compute_loss: a Trainer's method of that name; by default the model's own loss.
    Returns:
        offset, constant (every supervised position has it), padding_share (of padding, is a target),
        leaks_across_rows (an example learns from another, or attends to it), ignores_minus_100,
        normalisation ("tokens", "rows", "sum"), honours_num_items, faults, verdict. None: it cannot be told.
    """
    return _Loss(model, batch, compute_loss).judge()[0]


class _Loss:
    """The loss of one batch and of variants of it, as a target and a weight for each position."""

    def __init__(self, model, batch, compute_loss=None):
        self.model, self.compute_loss = model, compute_loss
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        arguments = inspect.signature(self.base.forward).parameters
        self.batch = {key: value.to(model.device) if torch.is_tensor(value) else value
                      for key, value in batch.items()}
        self.batch |= {"use_cache": False} if "use_cache" in arguments else {}  # a cache hides position_ids
        self.key = "shift_labels" if "shift_labels" in batch else "labels"
        self.labels, self.ids = self.batch[self.key], self.batch.get("input_ids")
        self.decoder_only = self.ids is not None and "decoder_input_ids" not in arguments
        self.documents = _number_documents(self.batch if self.decoder_only else {}, self.labels)

    def observe(self, **changes) -> dict:
        """loss; (B, T) targets and weights, (B, T, V) logits; embedded: what embeddings got."""
        heads, embedded = [], []

        def level(_module, _inputs, logits):  # all tokens equally likely: no gradient vanishes
            heads.extend((logits.detach(), torch.zeros_like(logits).requires_grad_()))
            return heads[1].clone()  # some models change logits in place

        head = self.base.get_output_embeddings()
        hooks = [head.register_forward_hook(level)] if isinstance(head, torch.nn.Linear) else []
        hooks += [module.register_forward_pre_hook(lambda _, inputs: embedded.extend(inputs[:1]))
                  for module in self.base.modules() if isinstance(module, torch.nn.Embedding)]
        try:
            loss = self._run({**self.batch, **changes})
        finally:
            for hook in hooks:
                hook.remove()
        if loss is None:
            return {"loss": None}
        seen, gradient = {"loss": loss.item(), "embedded": embedded}, None
        if len(heads) == 2 and heads[0].ndim == 3:
            gradient, = torch.autograd.grad(loss, heads[1], allow_unused=True)
        return seen | (self._change_labels() if gradient is None else self._read_gradient(gradient, heads[0]))

    def _run(self, batch):
        if self.compute_loss is None:
            return self.model(**batch).loss
        items = batch.pop("num_items_in_batch", None)
        return self.compute_loss(self.model, batch, num_items_in_batch=items)

    def _read_gradient(self, gradient, logits) -> dict:
        before = self.labels.shape[1] - logits.shape[1]  # an image's positions come before the labels'
        weights, targets = (-pad(gradient.float(), (0, 0, before, 0))).max(-1)
        supervised = weights > 1e-4 * weights.max().clamp(min=1e-12)
        return {"targets": targets.masked_fill(~supervised, IGNORE), "weights": weights * supervised,
                "logits": pad(logits.float(), (0, 0, before, 0))}

    @torch.no_grad()
    def _change_labels(self, most: int = 12) -> dict:
        """Where a loss hides its logits: which position's log-probability is the loss of one label alone?"""
        labels, places = self.labels, (self.labels != IGNORE).nonzero().tolist()
        logits = self.model(**{key: value for key, value in self.batch.items() if "labels" not in key}).logits
        logs, targets = logits.float().log_softmax(-1), torch.full_like(labels, IGNORE)
        for row, place in places[::-(-len(places) // most) or 1]:
            misfit = 0
            for step in (0, 1, 7):
                alone = torch.full_like(labels, IGNORE)
                alone[row, place] = token = (int(labels[row, place]) + step) % logits.shape[-1]
                misfit = misfit + (self._run({**self.batch, self.key: alone}) + logs[..., token]).abs()
            if misfit.min() < 0.3:
                targets[divmod(int(misfit.argmin()), misfit.shape[1])] = labels[row, place]
        return {"targets": targets, "weights": None, "logits": logits.float()}

    def judge(self) -> tuple[dict, dict]:
        """(report of `audit_loss`, what was seen)"""
        report, faults, seen = dict.fromkeys((
            "offset", "constant", "padding_share", "leaks_across_rows", "ignores_minus_100", "normalisation",
            "honours_num_items")), [], {}
        training = self.model.training
        self.model.eval()
        try:
            seen = self.observe()
            if seen["loss"] is None:
                faults = ["no_loss"]
            elif (seen["targets"] == IGNORE).all():
                hidden = seen["weights"] is None and (self.labels != IGNORE).any()
                faults = ["not_cross_entropy" if hidden else "no_supervised_tokens"]
            else:
                self._place(seen, report)
                self._probe(seen, report)
        except IndexError as error:
            if f"Target {IGNORE}" not in str(error):
                raise
            report["ignores_minus_100"] = False
        finally:
            self.model.train(training)
        if report["offset"] is not None:
            faults += _name_offset(report["offset"]) if report["constant"] else ["no_constant_offset"]
        faults += ["leaks_across_rows"] if report["leaks_across_rows"] else []
        faults += ["minus_100_supervised"] if report["ignores_minus_100"] is False else []
        faults += ["weighted_by_rows"] if report["normalisation"] == "rows" else []
        return report | _conclude(faults), seen

    def _place(self, seen, report) -> None:
        """Which places do targets come from? Counted from what the decoder's embedding has read."""
        targets, found = seen["targets"], [(-1.0, None, None)]
        for ids in [self.ids] if self.decoder_only else seen["embedded"]:
            known = torch.is_tensor(ids) and ids.shape == targets.shape and not ids.is_floating_point()
            if known and (self.decoder_only or self.ids is None or not torch.equal(ids, self.ids)):
                found.append((*_find_offset(targets, ids), ids))
        share, offset, ids = max(found, key=lambda place: place[0])
        report |= {"offset": offset, "constant": share > 0.99}
        if self.decoder_only and (self.documents < 0).any():
            taken = _ahead(targets, -offset, IGNORE) != IGNORE
            report["padding_share"] = taken[self.documents < 0].float().mean().item()

    def _probe(self, seen, report) -> None:
        """What changes with num_items_in_batch, with fewer labels, with other documents?"""
        labels, documents = self.labels, self.documents
        try:
            with torch.no_grad():
                weighted = self._run({**self.batch, "num_items_in_batch": 10 * (labels != IGNORE).sum()})
                report["honours_num_items"] = bool(weighted < 0.5 * self._run(self.batch))
        except TypeError:  # forward has no such argument
            report["honours_num_items"] = False
        if seen["weights"] is None:
            return
        few, places = labels.clone(), (labels[0] != IGNORE).nonzero()[:, 0]
        few[0, places[len(places) // 2:]] = IGNORE
        part = self.observe(**{self.key: few})
        kept = part["targets"] != IGNORE
        gone = (seen["targets"] != IGNORE).sum() - kept.sum()
        report["ignores_minus_100"] = bool(gone == (few != labels).sum())
        weights, owners = part["weights"][kept], documents[kept]
        rows = torch.stack([weights[owners == owner].sum() for owner in owners.unique()])
        if weights.max() < 1.02 * weights.min():
            report["normalisation"] = "tokens" if part["loss"] > 0.98 * seen["loss"] else "sum"
        elif rows.max() < 1.02 * rows.min():
            report["normalisation"] = "rows"
        if documents.max() > 0:
            report["leaks_across_rows"] = any(self._leaks(seen, parity) for parity in (0, 1))

    def _leaks(self, seen, parity: int) -> bool:
        """Do targets or logits change if every second document says something else?"""
        moved = (self.labels != IGNORE) & (self.documents % 2 == parity)
        others = (self.documents % 2 != parity) & (self.documents >= 0)
        word = int(self.labels[self.labels != IGNORE][-1])
        changes = {self.key: self.labels.masked_fill(moved, word)}
        if self.decoder_only:
            changes["input_ids"] = self.ids.masked_fill(moved, word)
        other, logits = self.observe(**changes), seen["logits"]
        moved = (other["logits"] - logits)[others].abs().max() > 0.05 * logits.std()
        return bool(moved or (other["targets"] != seen["targets"])[others].any())


def _ahead(values, offset: int, empty: int = -1) -> torch.Tensor:
    """(B, T) the value `offset` places on from each place, `empty` outside the row."""
    moved = pad(values, (max(0, -offset), max(0, offset)), value=empty)
    return moved[:, max(0, offset):][:, :values.shape[1]].contiguous()


def _find_offset(targets, ids, offsets=OFFSETS) -> tuple[float, int]:
    """(share, offset): the offset at which the largest share of the targets are their row's ids."""
    shares = {}
    for offset in offsets:
        ahead = _ahead(ids, offset)
        same = (ahead == targets)[(targets != IGNORE) & (ahead >= 0)]
        shares[offset] = same.float().mean().nan_to_num().item()
    best = max(shares, key=shares.get)
    return shares[best], best


def _number_documents(batch, ids) -> torch.Tensor:
    """(B, T) number of the document of each place, -1 for padding: a row is one, or what position_ids say."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    inside = mask != 0 if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=bool)
    starts = torch.zeros_like(ids)
    if positions is not None and positions.shape == ids.shape:
        starts[:, 1:] = (positions[:, 1:] == 0) & inside[:, 1:] & inside[:, :-1]
    starts[:, 0] = 1
    return (starts.flatten().cumsum(0) - 1).view_as(ids).masked_fill(~inside, -1)


def _stops(model) -> set[int]:
    """The ids that the model's configurations call EOS."""
    found = [getattr(config, "eos_token_id", None) for config in (
        model.config.get_text_config(decoder=True), getattr(model, "generation_config", None))]
    return {token for some in found for token in (some if isinstance(some, list) else [some])} - {None}


def _name_offset(offset: int) -> list[str]:
    return [] if offset == 1 else [{0: "copy", 2: "double_shift"}.get(offset, f"offset_{offset}")]


def _conclude(faults: list[str]) -> dict:
    words = [name.replace("_", " ") + (f" ({WORDS[name]})" if name in WORDS else "") for name in faults]
    return {"faults": faults, "verdict": f"FAULT: {'; '.join(words)}" if faults else "correct"}


def audit_batches(dataset, collator, tokenizer, model=None, response=None, rows=256, compute_loss=None):
    """What is supervised in what the collator makes of a data set; with a model, what its loss makes of that.

    Args:
        dataset: examples as the collator takes them; `rows` of them are counted, 4 go through the model.
        response: the text before each answer, by default the chat template's; else prompts are unknown.
    Returns:
        rows, offset; shares of tokens (prompt_share, answer_share, padding_share), of rows (rows_supervised,
        rows_with_eos, eos_share: EOS is a target) and of turns (turns_share), None: unknown; eos_by_source;
        shown (three rows, targets in [[ ]]); faults, verdict. With a model: loss (`audit_loss`), nll
        (nats per token by offset: a pretrained model knows), chance_nll, likeliest (None: it cannot tell).
    """
    report, faults = _count(_choose(dataset, rows), collator, tokenizer, response)
    if model is None or {"ignore_index", "no_supervised_tokens"} & set(faults):
        faults += _name_offset(report["offset"])
    else:
        if _stops(model) and tokenizer.eos_token_id not in _stops(model):
            faults.append("eos_mismatch")
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            batch = _collate(collator, _choose(dataset, 4))
            report["loss"], seen = _Loss(model, batch, compute_loss).judge()
        report["offset"], faults = report["loss"]["offset"], [*report["loss"]["faults"], *faults]
        report |= _likelihood(seen["targets"], seen["logits"]) if report["offset"] is not None else {}
    return report | _conclude(list(dict.fromkeys(faults)))


def _choose(dataset, count: int) -> list[dict]:
    """Examples from all parts of a data set; the first ones of a stream."""
    if not hasattr(dataset, "__len__"):
        return list(itertools.islice(dataset, count))
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count] for i in range(count)]


def _collate(collator, examples: list[dict]) -> dict:
    """Their batch. Collators cannot make tensors of columns of text."""
    return collator([{name: value for name, value in row.items() if not isinstance(value, str)}
                     for row in examples])


@torch.no_grad()
def _likelihood(targets, logits) -> dict:
    row, place = (targets[:, 1:-1] != IGNORE).nonzero(as_tuple=True)
    wanted = targets[row, place + 1]
    nll = {k: float(cross_entropy(logits[row, place + k].float(), wanted)) for k in (0, 1, 2)}
    (likeliest, best), (_, second) = sorted(nll.items(), key=lambda item: item[1])[:2]
    chance = math.log(logits.shape[-1])
    tells = min(second, chance) - best >= 1
    return {"nll": nll, "chance_nll": chance, "likeliest": likeliest if tells else None}


def _count(examples, collator, tokenizer, response) -> tuple[dict, list[str]]:
    """`audit_batches` without a model: (report, faults)."""
    batch, faults = _collate(collator, examples), []
    shifted = batch.get("shift_labels") is not None
    labels, ids = batch["shift_labels" if shifted else "labels"], batch.get("input_ids")
    if ids is None or ids.shape != labels.shape:  # the labels are what the decoder reads
        batch, ids = {"attention_mask": labels != IGNORE}, labels.masked_fill(labels == IGNORE, 0)
    documents = _number_documents(batch, ids)
    number = int(documents.max()) + 1
    if number < len(examples) and len(ids) < len(examples):
        faults.append("packed_without_positions")
    inner = labels.masked_fill(documents < 0, IGNORE)
    _, shift = _find_offset(inner, ids, (1, 0, 2) if shifted else (0, 1, 2, -1))
    ahead = _ahead(ids, shift)
    strange = inner[(inner != IGNORE) & (ahead >= 0) & (inner != ahead)]
    if len(strange) > 0.01 * (inner != IGNORE).sum():
        faults.append("no_constant_offset" if len(strange.unique()) > 1 else "ignore_index")
        labels = labels.masked_fill(labels == strange[0], IGNORE)
    taken = _ahead(labels, -shift, IGNORE) != IGNORE  # at the place that a target is taken from
    answers = _find_answers(tokenizer, response)
    sums = defaultdict(list, padding=taken[documents < 0].tolist())
    for place in range(number):
        spot = documents == place
        found = _read_document(ids[spot].tolist(), taken[spot].tolist(), tokenizer, *answers)
        source = examples[place].get("source", "") if number == len(examples) else ""
        for name, values in (found | {f"eos {source}": found["eos"]}).items():
            sums[name] += values
    report = {"rows": number, "offset": shift + (not shifted), "shown": sums.pop("shown")[:3]}
    return report | _share(sums, faults), faults


def _share(sums: dict[str, list], faults: list[str]) -> dict:
    """Shares of what was counted; adds the faults that they show."""
    cut = set(sums.pop("cut"))  # lengths of rows without EOS: rows that were cut have one
    share = defaultdict(lambda: None)
    share |= {name: sum(values) / len(values) for name, values in sums.items() if values}

    def partly(name):
        return 0 < (share[name] or 0) < 1

    checks = {"no_supervised_tokens": not share["rows"], "rows_without_supervised_tokens": partly("rows"),
              "prompt_supervised": share["prompt"] == 1, "prompt_partly_supervised": partly("prompt"),
              "turns_unsupervised": partly("turns") and share["rows"] == 1,
              "answer_partly_supervised": partly("answer") and share["turns"] == 1,
              "padding_supervised": share["padding"] == 1, "padding_partly_supervised": partly("padding"),
              "no_eos": not share["eos"] and (share["ends"] or len(cut) > 1),
              "eos_partly_supervised": 0 < (share["eos"] or 0) < (share["ends"] or 0),
              "eos_missing": share["eos"] and len(cut) > 1,
              "double_bos": share["double_bos"], "special_tokens_as_text": share["as_text"]}
    faults += [name for name, fault in checks.items() if fault]
    return {"rows_supervised": share["rows"], "rows_with_eos": share["ends"],
            "eos_by_source": {name[4:]: share[name] for name in sorted(sums) if name.startswith("eos ")},
            **{f"{name}_share": share[name] for name in ("prompt", "answer", "turns", "padding", "eos")}}


def _find_answers(tokenizer, response) -> tuple[list[int], set[int]]:
    """The ids in front of every answer, whatever the prompt ends with, and those that end one."""
    ends, said = {tokenizer.eos_token_id}, [{"role": "user", "content": "hello"}]
    if response is None and getattr(tokenizer, "chat_template", None):
        def show(turns, prompt=False):
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

        response = show(said, True)[len(show(said)):]
        after = show([*said, {"role": "assistant", "content": "world"}]).rpartition("world")[2]
        after = tokenizer(after, add_special_tokens=False)["input_ids"]
        ends |= set(after[:1]) & set(tokenizer.all_special_ids)
    if not response:
        return [], ends
    texts = [text + response for text in ("Is a", "Is it b?", "c.\n")]
    rows = [ids[::-1] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))
    return [ids[0] for ids in same][::-1], ends


def _read_document(ids: list[int], taken: list[bool], tokenizer, response: list[int], ends: set[int]) -> dict:
    """Lists, for one document: which tokens of prompt, answer and EOS are targets."""
    parts, turns, kind = [], [] if response else [False], "prompt" if response else "answer"
    for place, token in enumerate(ids):
        if kind != "answer" and response == ids[max(0, place - len(response)):place]:
            kind = "answer"
            turns.append(False)
        elif kind == "blank" and tokenizer.decode([token]).strip():
            kind = "prompt"
        parts.append("eos" if kind == "answer" and token in ends else kind)
        if kind == "answer":
            turns[-1] |= taken[place]
            kind = "blank" if parts[-1] == "eos" and response else kind  # a template's line break behind EOS
    last = max((place for place, part in enumerate(parts) if part in ("answer", "eos")), default=len(ids) - 1)
    ended, known = ids[last] in ends, bool(response and turns)
    chosen = list(zip(parts, taken, strict=True))[1:] if known else []  # nothing predicts the first token
    runs = itertools.groupby(zip(ids, taken, strict=True), key=lambda pair: pair[1])
    runs = [(kind, tokenizer.decode([token for token, _ in pairs])) for kind, pairs in runs]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"prompt": [kept for part, kept in chosen if part == "prompt"],
            "answer": [kept for part, kept in chosen if part == "answer"],
            "turns": turns, "rows": [any(taken)], "eos": [ended and taken[last]] * any(taken),
            "ends": [ended] * any(taken), "cut": [] if ended or not any(taken) else [len(ids)],
            "shown": ["".join(f"[[{part}]]" if kind else part for kind, part in runs)],
            "double_bos": [ids[:2] == [tokenizer.bos_token_id] * 2],
            "as_text": [any(token in text for token in tokenizer.all_special_tokens)]}


def describe(report: dict) -> str:
    """An `audit_batches` report in about ten lines."""
    shares = {name: "unknown" if value is None else f"{value:.1%}" for name, value in report.items()
              if name.endswith("_share") or name == "rows_with_eos"}
    lines = ["Label audit of {rows} rows: {verdict}\n  offset {offset} (0 copy, 1 correct, 2 shifted twice)",
             "  targets: {prompt_share} of prompts, {answer_share} of answers, {padding_share} of padding",
             "  EOS: a target in {eos_share} of the rows, present in {rows_with_eos}"]
    if "loss" in report:
        lines.append("  loss: " + ", ".join(f"{name} {report['loss'][name]}" for name in (
            "normalisation", "ignores_minus_100", "honours_num_items")))
    if "nll" in report:
        said = {None: "this model cannot tell", report["offset"]: "the model agrees"}.get(
            report["likeliest"], "the model is odd (untrained, or tuned on other labels)")
        lines.append("  nats per token at offset 0, 1, 2: {nll[0]:.2f}, {nll[1]:.2f}, {nll[2]:.2f}; " + said)
    return "\n".join(["\n".join(lines).format(**report | shares),
                      *(f"  targets in [[ ]]: {text[-200:]!r}" for text in report["shown"])])


class AuditCallback(transformers.TrainerCallback):
    """Audits rows of a run as the Trainer will see them, prints ten lines, and stops on an undeclared fault.

    Args:
        trainer: audits its `compute_loss` too; without it the model's own loss.
        declared: faults that are meant, for example ("prompt_supervised",).
    """

    def __init__(self, trainer=None, declared=(), response: str | None = None, rows: int = 256):
        self.trainer, self.declared, self.response, self.rows = trainer, declared, response, rows

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **others):
        """Raises AuditError, with `faults`, where those found are not those declared."""
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        loader = others["train_dataloader"]
        report = audit_batches(loader.dataset, loader.collate_fn, tokenizer, model, self.response, self.rows,
                               self.trainer and self.trainer.compute_loss)
        if args.gradient_accumulation_steps > 1 and report.get("loss", {}).get("honours_num_items") is False:
            report |= _conclude([*report["faults"], "num_items_ignored"])
        if state.is_world_process_zero:
            print(describe(report))
        if set(report["faults"]) != set(self.declared):
            error = AuditError(f"The label audit found {report['verdict']}; declared: {[*self.declared]}. "
                               "Correct data set, collator or loss, or declare what is meant.")
            error.faults = report["faults"]
            raise error


def probe_batch(model, rows: int = 3, tokens: int = 12) -> dict:
    """Random ids of unequal length: input_ids, attention_mask and labels, (rows, tokens)."""
    chance = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(min(10, vocabulary // 2), vocabulary, (rows, tokens), generator=chance)
    mask = torch.ones_like(ids)
    mask[1:2, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def _load_model(name: str):
    """The class that the config names, with its weights or, where there are none, with random ones."""
    config = transformers.AutoConfig.from_pretrained(name)
    kind = getattr(transformers, config.architectures[0])
    try:
        return kind.from_pretrained(name)
    except OSError:
        return kind(config)


def _encode_file(path: str, tokenizer, prompt: str, answer: str) -> list[dict]:
    """Rows of a CSV or JSONL file as chat turns, or as prompt, line break, answer; labels on the answers."""
    examples = []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file) if path.endswith(".csv") else map(json.loads, file):
            texts = [f"{row[prompt]}\n", f"{row[prompt]}\n{row[answer]}{tokenizer.eos_token}"]
            if tokenizer.chat_template:
                turns = [{"role": role, "content": row[column]}
                         for role, column in (("user", prompt), ("assistant", answer))]
                texts = [tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True),
                         tokenizer.apply_chat_template(turns, tokenize=False)]
            before, ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            examples.append({"input_ids": ids, "labels": [IGNORE] * len(before) + ids[len(before):]})
    if not examples:
        raise ValueError(f"{path} has no rows")
    return examples


def main(arguments=None) -> int:
    """Audit a model's loss, with --data on rows of your own. Exit status 1: a fault, 2: bad input."""
    parser = argparse.ArgumentParser(prog="audit", description=main.__doc__)
    parser.add_argument("--model", required=True, help="Hub id or folder; its weights are not needed")
    parser.add_argument("--data", help="CSV or JSONL")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--answer-column", default="answer")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        model = _load_model(options.model)
        if options.data:
            tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            examples = _encode_file(options.data, tokenizer, options.prompt_column, options.answer_column)
    except (OSError, ValueError, KeyError) as error:
        missing = f"{options.data} has no column " if isinstance(error, KeyError) else ""
        print(f"audit: {missing}{' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 2
    if options.data:
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
        response = None if tokenizer.chat_template else "\n"
        report = audit_batches(examples, collator, tokenizer, model, response)
        print(describe(report))
    else:
        report = audit_loss(model, probe_batch(model))
        print("\n".join(f"{name}: {value}" for name, value in report.items()))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
