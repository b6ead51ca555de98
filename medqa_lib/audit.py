"""Does a training loss compare each prediction with the token it should? Needs no pretrained weights.

The gradient of a cross-entropy with respect to the logits of position t is w * (p - onehot(target)): its one
negative entry names the token that t is trained on, its size the weight w. Targets are compared with the ids
that positions have read: offset 0 copies the newest one, +1 is the next token (correct), +2 the one after it.

    audit_loss(model, batch)                     what the loss of a batch does, and what it does to any batch
    audit_batches(dataset, collator, tokenizer)  what is supervised: prompt, answer, EOS, padding, by source
    AuditCallback(trainer)                       both at the start of a run; raises on an undeclared fault
    python -m medqa_lib.audit --model ID         from a command line (copied elsewhere: python audit.py ...)
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy, pad

IGNORE = -100
OFFSETS = (1, 0, 2, -1, 3)  # the first one wins where a row repeats a token
WORDS = {  # what the other names do not say by themselves
    "copy": "position t is trained on the token it has just read",
    "double_shift": "labels are shifted twice, position t is trained on token t + 2",
    "no_constant_offset": "targets are not their row's tokens at one offset",
    "num_items_ignored": "micro-batches are not weighted by their tokens",
    "no_eos": "the end of an answer is never a target",
    "eos_mismatch": "the model does not stop at the tokenizer's EOS",
}


class AuditError(ValueError):
    """The faults found are not those declared; `faults` lists them."""


class _Loss:
    """The loss of variants of one batch as (B, T) targets and weights."""

    def __init__(self, model, batch, compute_loss=None):
        self.model, self.compute_loss = model, compute_loss
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        device = next((weight.device for weight in model.parameters()), "cpu")
        self.batch = {key: value.to(device) if torch.is_tensor(value) else value
                      for key, value in batch.items()}
        accepted = inspect.signature(self.base.forward).parameters
        self.fixed = {"use_cache": False} if "use_cache" in accepted else {}
        self.key = "shift_labels" if batch.get("shift_labels") is not None else "labels"
        self.labels, self.ids = self.batch[self.key], self.batch.get("input_ids")
        same = self.ids is not None and self.ids.shape == self.labels.shape
        self.decoder_only = same and "decoder_input_ids" not in accepted
        told = self.batch if self.decoder_only else {"attention_mask": self.labels != IGNORE}
        self.documents = _number_documents(told, self.labels)

    def observe(self, **changes) -> dict | None:
        """targets, weights, logits, loss and embedded (what embeddings got) of the changed batch, or None."""
        batch = {**self.batch, **self.fixed, **changes}
        heads, embedded, training = [], [], self.model.training

        def level(_module, _inputs, logits):  # no target may be so sure that its gradient vanishes
            heads.extend((logits.detach(), torch.zeros_like(logits).requires_grad_()))
            return heads[1]

        head = self.base.get_output_embeddings() if hasattr(self.base, "get_output_embeddings") else None
        hooks = [module.register_forward_pre_hook(lambda _, inputs: embedded.extend(inputs[:1]))
                 for module in self.base.modules() if isinstance(module, torch.nn.Embedding)]
        hooks += [head.register_forward_hook(level)] if head is not None else []
        try:
            self.model.eval()
            loss, logits = self._run(batch)
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
        if loss is None:
            return None
        seen = {"loss": loss.item(), "embedded": embedded}
        for source in (logits, *heads[1:2]):
            if torch.is_tensor(source) and source.requires_grad and source.ndim == 3:
                gradient, = torch.autograd.grad(loss, source, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    seen["logits"] = heads[0] if heads and heads[0].shape == source.shape else source.detach()
                    return seen | _read_gradient(gradient.float(), source.detach().float())
        return seen | self._change_labels(batch)

    def _run(self, batch):
        if self.compute_loss is None:
            output = self.model(**batch)
            return output.loss, getattr(output, "logits", None)
        items = batch.pop("num_items_in_batch", None)
        return self.compute_loss(self.model, dict(batch), num_items_in_batch=items), None

    @torch.no_grad()
    def _change_labels(self, batch, most: int = 12) -> dict:
        """Where a loss hides its logits: whose log-probabilities explain how it moves with a single label?"""
        labels, steps = batch[self.key], (0, 1, 7, 13)
        inputs = {key: value for key, value in batch.items() if "labels" not in key}
        logits = self.model(**inputs).logits.float()
        logs, places = logits.double().log_softmax(-1), (labels != IGNORE).nonzero().tolist()
        targets, weights = torch.full_like(logs[..., 0], IGNORE).long(), torch.zeros_like(logs[..., 0])
        for row, place in places[::-(-len(places) // most) or 1]:
            tokens, losses = [(int(labels[row, place]) + step) % logits.shape[-1] for step in steps], []
            for token in tokens:
                alone = torch.full_like(labels, IGNORE)
                alone[row, place] = token
                losses.append(self._run({**batch, self.key: alone})[0].item())
            rises = torch.tensor(losses[1:], device=logs.device, dtype=logs.dtype) - losses[0]
            falls = logs[..., tokens[:1]] - logs[..., tokens[1:]]  # (B, T, 3): the loss rises by w times this
            slopes = (falls @ rises) / (falls.square().sum(-1) + 1e-12)
            misfit = (rises - slopes[..., None] * falls).square().sum(-1)
            spot = divmod(int(misfit.argmin()), misfit.shape[1])
            if float(rises.abs().max()) > 1e-7:
                targets[spot], weights[spot] = tokens[0], slopes[spot]
        return {"targets": targets, "weights": weights, "logits": logits, "one_target": True, "sampled": True}

    def read(self, seen) -> torch.Tensor | None:
        """(B, T) ids that positions have read: of what embeddings got, that which holds the targets."""
        targets, best = seen["targets"], (-1, None)
        given = self.ids if self.decoder_only else self.batch.get("decoder_input_ids")
        for read in (given, *seen["embedded"]):
            if not torch.is_tensor(read) or read.is_floating_point() or read.ndim != 2:
                continue
            encoder = not self.decoder_only and read is not given and torch.is_tensor(self.ids)
            before = targets.shape[1] - read.shape[1]  # an image's positions come first
            if before < 0 or len(read) != len(targets) or encoder and torch.equal(read, self.ids):
                continue
            read = pad(read, (before, 0), value=-1)
            share = max(_match(targets, read, offset).float().mean().item() for offset in OFFSETS)
            best = (share, read) if share > best[0] + 0.01 else best
        return best[1]

    def probe(self, report: dict) -> None:
        """What this loss does to other labels of the batch: all supervised, some -100, documents reversed."""
        labels = self.labels
        if self.decoder_only:  # all but padding and what the document before must not learn
            labels = self.ids.masked_fill((self.documents < 0) | _is_first(self.documents), IGNORE)
            labels = labels if self.key == "labels" else _ahead(labels, 1, IGNORE)
        full = self.observe(**{self.key: labels})
        try:
            weighted = self.observe(**{self.key: labels}, num_items_in_batch=10 * (labels != IGNORE).sum())
            report["honours_num_items"] = weighted["loss"] < 0.5 * full["loss"]
        except TypeError:
            report["honours_num_items"] = False
        if "sampled" in full or full["targets"].shape[1] < self.documents.shape[1]:
            return
        few, places = labels.clone(), (labels[0] != IGNORE).nonzero()[:, 0]
        few[0, places[len(places) // 2:]] = IGNORE
        try:
            part = self.observe(**{self.key: few})
        except IndexError:  # torch's "Target -100 is out of bounds"
            report["ignores_minus_100"] = False
            return
        kept = part["targets"] != IGNORE
        gone = (full["targets"] != IGNORE).sum() - kept.sum()
        report["ignores_minus_100"] = bool(gone == (few != labels).sum())
        documents = pad(self.documents, (full["targets"].shape[1] - self.documents.shape[1], 0), value=-1)
        weights, owners = part["weights"][kept], documents[kept]
        rows = torch.stack([weights[owners == owner].sum() for owner in owners.unique()])
        if weights.max() < 1.02 * weights.min():
            report["normalisation"] = {1: "tokens", len(weights): "sum"}.get(round(float(weights.sum()), 1))
        elif rows.max() < 1.02 * rows.min():
            report["normalisation"] = "rows"
        if documents.max() > 0:
            name = "leaks_across_documents" if _is_first(documents).any() else "leaks_across_rows"
            leaks = any(self._leaks(full, labels, documents, parity) for parity in (0, 1))
            report[name] = leaks or bool(report[name])

    def _leaks(self, full, labels, documents, parity: int) -> bool:
        """Does reversing every second document change targets or logits of the others?"""
        def reverse(values, movable):
            values = values.clone()
            for number in range(parity, int(self.documents.max()) + 1, 2):
                spot = (self.documents == number) & movable
                values[spot] = values[spot].flip(0)
            return values

        changes = {"input_ids": reverse(self.ids, self.labels != IGNORE)} if self.decoder_only else {}
        seen = self.observe(**changes, **{self.key: reverse(labels, labels != IGNORE)})
        other, logits = (documents >= 0) & (documents % 2 != parity), full["logits"].float()
        tolerance = (1e-3 if full["logits"].dtype == torch.float32 else 5e-2) * logits.std()
        return bool((seen["targets"] != full["targets"])[other].any()
                    or (seen["logits"] - logits)[other].abs().max() > tolerance)


def _read_gradient(gradient, logits) -> dict:
    """targets (IGNORE where there is none), weights, and whether each position has one target."""
    size, targets = (-gradient).max(-1)
    chance = (logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)).exp()
    weights = size / (1 - chance).clamp(min=1e-6)
    supervised = weights > 1e-4 * weights.max().clamp(min=1e-12)
    alone = size > 0.5 * (-gradient).clamp(min=0).sum(-1)
    return {"targets": targets.masked_fill(~supervised, IGNORE), "weights": weights * supervised,
            "one_target": bool(alone[supervised].all())}


def _ahead(values, offset: int, empty: int = -1) -> torch.Tensor:
    """(B, T) the value `offset` places on from each place, `empty` outside the row."""
    moved = pad(values, (max(0, -offset), max(0, offset)), value=empty)
    return moved[:, max(0, offset):][:, :values.shape[1]].contiguous()


def _match(targets, read, offset: int) -> torch.Tensor:
    """(N,) whether each target that has an id `offset` places on is that id."""
    ahead = _ahead(read, offset)
    return (ahead == targets)[(targets != IGNORE) & (ahead >= 0)]


def _number_documents(batch, ids) -> torch.Tensor:
    """(B, T) number of the document of each place, -1 for padding: by row, position_ids or cu_seq_lens_q."""
    mask, positions, starts = batch.get("attention_mask"), batch.get("position_ids"), torch.zeros_like(ids)
    inside = (mask if torch.is_tensor(mask) and mask.shape == ids.shape else torch.ones_like(ids)) != 0
    if torch.is_tensor(positions) and positions.shape == ids.shape:
        starts[:, 1:] = (positions[:, 1:] == 0) & inside[:, 1:] & inside[:, :-1]
    elif torch.is_tensor(batch.get("cu_seq_lens_q")):
        starts[0, batch["cu_seq_lens_q"].flatten()[:-1].long()] = 1
    starts[:, 0] = 1
    return (starts.flatten().cumsum(0) - 1).view_as(ids).masked_fill(~inside, -1)


def _is_first(documents) -> torch.Tensor:
    """(B, T) whether a place is the first of a document that follows another in its row."""
    before = _ahead(documents, -1)
    return (documents > before) & (before >= 0)


def audit_loss(model, batch: dict, compute_loss=None) -> dict:
    """Which token is each position's prediction compared with, and with what weight?

    Args:
        batch: a collator's: input_ids (B, T) or an encoder's input, labels, and what else the model takes.
        compute_loss: a Trainer's method of that name; by default the model's own loss.
    Returns:
        offset, constant (every supervised position has it), supervised (positions), leaks_across_rows,
        leaks_across_documents, ignores_minus_100, normalisation ("tokens", "rows", "sum"), honours_num_items,
        padding_share and eos_share (how many are targets), faults, verdict. None: it cannot be told.
    """
    return _judge_loss(_Loss(model, batch, compute_loss))[0]


def _judge_loss(loss: _Loss) -> tuple[dict, dict | None]:
    report, faults = dict.fromkeys((
        "offset", "constant", "supervised", "leaks_across_rows", "leaks_across_documents",
        "ignores_minus_100", "normalisation", "honours_num_items", "padding_share", "eos_share")), []
    try:
        seen = loss.observe()
    except IndexError as error:
        if not str(error).startswith("Target"):
            raise
        wrong = "minus_100_supervised" if str(IGNORE) in str(error) else "label_out_of_range"
        return report | _conclude([wrong]), None
    if seen is None:
        return report | _conclude(["no_loss"]), None
    targets, read = seen["targets"], loss.read(seen)
    report["supervised"] = int((targets != IGNORE).sum())
    if not report["supervised"] or not seen["one_target"]:
        faults.append("not_cross_entropy" if report["supervised"] else "no_supervised_tokens")
    elif read is not None:
        shares = {offset: _match(targets, read, offset).float().mean().nan_to_num() for offset in OFFSETS}
        report["offset"] = offset = max(shares, key=shares.get)
        rows = [_match(targets[row, None], read[row, None], offset).float() for row in range(len(read))]
        report["constant"] = all(match.mean() > 0.99 for match in rows if len(match))
        faults += _name_offset(offset) if report["constant"] else ["no_constant_offset"]
        if loss.decoder_only:
            taken = _ahead(targets, -offset, IGNORE) != IGNORE  # at the place that a target is taken from
            documents = pad(loss.documents, (read.shape[1] - loss.documents.shape[1], 0), value=-1)
            owner = _ahead(documents, -offset)
            crossing = taken & (owner != documents) & (owner >= 0) & (documents >= 0)
            report["leaks_across_documents"] = bool(crossing.any()) or None
            eos = torch.isin(read, torch.tensor(sorted(_stops(loss.base)), dtype=read.dtype).to(read.device))
            for name, places in (("padding_share", documents < 0), ("eos_share", eos & (documents >= 0))):
                report[name] = taken[places].float().mean().item() if places.any() else None
    if seen["one_target"]:
        loss.probe(report)
    faults += [name for name in ("leaks_across_rows", "leaks_across_documents") if report[name]]
    faults += ["minus_100_supervised"] if report["ignores_minus_100"] is False else []
    faults += ["weighted_by_rows"] if report["normalisation"] == "rows" else []
    return report | _conclude(faults), seen


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
        shown (three rows, targets in [[ ]]); notes, faults, verdict. With a model: loss (`audit_loss`), nll
        (nats per token by offset: a pretrained model knows), chance_nll, likeliest (None: it cannot tell).
    """
    examples = _choose(dataset, rows)
    report, faults = _count(examples, collator, tokenizer, response)
    if model is None or {"ignore_index", "no_supervised_tokens"} & set(faults):
        faults += _name_offset(report["offset"])
    else:
        if _stops(model) and tokenizer.eos_token_id not in _stops(model):
            faults.append("eos_mismatch")
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            batch = collator(_bare(_choose(examples, 4)))
            report["loss"], seen = _judge_loss(_Loss(model, batch, compute_loss))
        report["offset"], faults = report["loss"]["offset"], [*report["loss"]["faults"], *faults]
        report |= _likelihood(**seen) if report["offset"] is not None else {}
    return report | _conclude(list(dict.fromkeys(faults)))


def _likelihood(targets, logits, **_) -> dict:
    row, place = (targets[:, 1:-1] != IGNORE).nonzero(as_tuple=True)
    wanted = targets[row, place + 1]
    nll = {k: float(cross_entropy(logits[row, place + k].float(), wanted)) for k in (0, 1, 2)}
    (likeliest, best), (_, second) = sorted(nll.items(), key=lambda item: item[1])[:2]
    chance = math.log(logits.shape[-1])
    tells = min(second, chance) - best >= 1
    return {"nll": nll, "chance_nll": chance, "likeliest": likeliest if tells else None}


def _bare(examples: list[dict]) -> list[dict]:
    """The examples without columns of text, which collators cannot make tensors of."""
    return [{name: value for name, value in row.items() if not isinstance(value, str)} for row in examples]


def _choose(dataset, count: int) -> list:
    if not hasattr(dataset, "__len__"):
        return list(itertools.islice(dataset, count))
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count] for i in range(count)]


def _count(examples, collator, tokenizer, response) -> tuple[dict, list[str]]:
    """`audit_batches` without a model: (report, faults)."""
    response, ends = _response_ids(tokenizer, response)
    batches, faults, strange, sums, found = [], [], Counter(), defaultdict(list), []
    for part in (examples[start:start + 8] for start in range(0, len(examples), 8)):
        batch = collator(_bare(part))
        shifted = batch.get("shift_labels") is not None
        labels, ids = batch["shift_labels" if shifted else "labels"], batch.get("input_ids")
        if ids is None or ids.shape != labels.shape:  # the labels are what the decoder reads
            batch, ids = {"attention_mask": labels != IGNORE}, labels.masked_fill(labels == IGNORE, 0)
        documents = _number_documents(batch, ids)
        number = int(documents.max()) + 1
        faults += ["packed_without_positions"] if number < len(part) and len(ids) < len(part) else []
        sources = [str(row.get("source", "")) for row in part] if number == len(part) else [""] * number
        batches.append((ids, labels, documents, sources))
    inner = [(labels.masked_fill(documents < 0, IGNORE), ids) for ids, labels, documents, _ in batches]
    shift = max((1, 0, 2) if shifted else (0, 1, 2, -1),
                key=lambda shift: sum(int(_match(*pair, shift).sum()) for pair in inner))
    for labels, ids in inner:
        ahead = _ahead(ids, shift)
        strange.update(labels[(labels != IGNORE) & (ahead >= 0) & (labels != ahead)].tolist())
    foreign, times = strange.most_common(1)[0] if strange else (None, 0)
    if strange.total() > 0.01 * sum(int((labels != IGNORE).sum()) for labels, _ in inner):
        faults.append("ignore_index" if times > 0.99 * strange.total() else "no_constant_offset")
    for ids, labels, documents, sources in batches:
        labels = labels.masked_fill(labels == foreign, IGNORE) if "ignore_index" in faults else labels
        taken = _ahead(labels, -shift, IGNORE) != IGNORE  # at the place that a target is taken from
        faults += ["leaks_across_documents"] if (taken & _is_first(documents)).any() else []
        sums["padding"] += taken[documents < 0].tolist()
        for number, source in enumerate(sources):
            spot = documents == number
            found.append(_read_document(ids[spot].tolist(), taken[spot].tolist(), tokenizer, response, ends))
            for name, values in found[-1].items():
                sums[name] += values
            sums[f"eos {source}"] += found[-1]["eos"]
    report = {"rows": len(found), "offset": shift + (not shifted), "foreign": foreign}
    return _summarise(report, faults, sums, bool(response))


def _summarise(report: dict, faults: list[str], sums: dict, response: bool) -> tuple[dict, list[str]]:
    """Shares of what was counted, and the faults that they show."""
    cut = set(sums.pop("cut"))  # lengths of rows without EOS: rows that were cut have one
    report["shown"] = sums.pop("shown")[:3]
    share = defaultdict(lambda: None)
    share |= {name: sum(values) / len(values) for name, values in sums.items() if values}
    report |= {f"{name}_share": share[name] for name in ("prompt", "answer", "turns", "padding", "eos")}
    report |= {"rows_supervised": share["rows"], "rows_with_eos": share["ends"], "notes": [],
               "eos_by_source": {name[4:]: share[name] for name in sorted(share) if name.startswith("eos ")}}
    if response and share["prompt"] is None:
        report["notes"].append("the text before answers was not found: prompt and answer are not told apart")
    if not share["ends"] and len(cut) == 1:
        report["notes"].append(f"no row has EOS, all are cut at {max(cut)} tokens: raise the maximum length")

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
    return report, faults + [name for name, fault in checks.items() if fault]


def _response_ids(tokenizer, response) -> tuple[list[int], set[int]]:
    """The ids in front of every answer, whatever the prompt ends with, and those that end one."""
    ends, said = {tokenizer.eos_token_id}, [{"role": "user", "content": "hello"}]
    if response is None and getattr(tokenizer, "chat_template", None):
        show = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        response = show(said, add_generation_prompt=True)[len(show(said)):]
        after = show([*said, {"role": "assistant", "content": "world"}]).rpartition("world")[2]
        after = tokenizer(after, add_special_tokens=False)["input_ids"]
        ends |= set(after[:1]) & set(tokenizer.all_special_ids)
    texts = [text + (response or "") for text in ("Is a", "Is it b?", "c.\n")]
    rows = [ids[::-1] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    same = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))]
    return same[::-1] if response else [], ends


def _read_document(ids: list[int], taken: list[bool], tokenizer, response: list[int], ends: set[int]) -> dict:
    """Lists, for one document: which tokens of prompt, answer, EOS and padding are targets."""
    stop = len(ids)
    while stop and ids[stop - 1] in {*ends, tokenizer.pad_token_id}:
        stop -= 1
    stop = len(ids) if len(ids) - stop < 3 else stop + (ids[stop] in ends)  # padding that no mask tells of
    spans = [] if response else [(0, stop)]
    for start in range(len(response), stop + 1) if response else ():
        if ids[start - len(response):start] == response and (not spans or start >= spans[-1][1]):
            spans.append((start, next((end + 1 for end in range(start, stop) if ids[end] in ends), stop)))
    answer = {place for span in spans for place in range(*span)}
    blank = {place for _, end in spans for place in itertools.takewhile(  # a template's line break behind EOS
        lambda place: not tokenizer.decode([ids[place]]).strip(), range(end, stop))}
    last, text = (spans[-1][1] if spans else stop) - 1, tokenizer.decode(ids[:stop], skip_special_tokens=True)
    runs = itertools.groupby(range(stop), key=lambda place: taken[place])
    runs = [(kind, tokenizer.decode([ids[place] for place in places])) for kind, places in runs]
    shown = [f"[[{part}]]" if kind else part for kind, part in runs]
    known, ended = bool(response and spans), ids[last] in ends
    prompt = sorted(set(range(1, stop)) - answer - blank)
    return {"prompt": [taken[place] for place in prompt] if known else [],
            "answer": [taken[place] for place in answer if ids[place] not in ends] if known else [],
            "turns": [any(taken[start:end]) for start, end in spans if end > start], "padding": taken[stop:],
            "rows": [any(taken)], "eos": [ended and taken[last]] * any(taken), "ends": [ended] * any(taken),
            "cut": [] if ended or not any(taken) else [stop], "shown": ["".join(shown)],
            "double_bos": [len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id],
            "as_text": [any(token in text for token in tokenizer.all_special_tokens)]}


def describe(report: dict) -> str:
    """An `audit_batches` report in about ten lines."""
    names = ("prompt_share", "answer_share", "padding_share", "eos_share", "rows_with_eos")
    shares = ["unknown" if report[name] is None else f"{report[name]:.1%}" for name in names]
    lines = [f"Label audit of {report['rows']} rows: {report['verdict']}",
             f"  offset {report['offset']} (0 copy, 1 correct, 2 shifted twice)",
             "  targets: {} of prompts, {} of answers, {} of padding".format(*shares[:3]),
             "  EOS: a target in {} of the rows, present in {}".format(*shares[3:])]
    if "loss" in report:
        checked = ("normalisation", "ignores_minus_100", "honours_num_items")
        lines.append("  loss: " + ", ".join(f"{name} {report['loss'][name]}" for name in checked))
    if "nll" in report:
        nll, odd = report["nll"], "the model is odd (untrained, or tuned on other labels)"
        known = {None: "this model cannot tell", report["offset"]: "the model agrees"}
        said = known.get(report["likeliest"], odd)
        lines.append(f"  nats per token at offset 0, 1, 2: {nll[0]:.2f}, {nll[1]:.2f}, {nll[2]:.2f}; {said}")
    return "\n".join([*lines, *(f"  note: {note}" for note in report["notes"]),
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
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(min(10, vocabulary // 2), vocabulary, (rows, tokens), generator=chance)
    mask = torch.ones_like(ids)
    mask[1:2, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def _load_model(name: str):
    """The class that the config names, with its weights or, where there are none, with random ones."""
    config = transformers.AutoConfig.from_pretrained(name)
    task = "Seq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{task}")
    kind = getattr(transformers, (config.architectures or [""])[0], auto)
    try:
        return kind.from_pretrained(name)
    except OSError:
        return auto.from_config(config) if kind is auto else kind(config)


def _encode_file(path: str, tokenizer, prompt: str, answer: str) -> list[dict]:
    """Rows of a CSV or JSONL file as chat turns, or as prompt, line break, answer; labels on the answers."""
    text, chat, examples = Path(path).read_text(encoding="utf-8"), tokenizer.chat_template, []
    lines = [line for line in text.splitlines() if line.strip()]
    rows = csv.DictReader(text.splitlines(True)) if path.endswith(".csv") else map(json.loads, lines)
    rows = list(rows)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for row in rows[:256]:
        turns = [{"role": "user", "content": row[prompt]}, {"role": "assistant", "content": row[answer]}]
        texts = [f"{row[prompt]}\n", f"{row[prompt]}\n{row[answer]}"]
        if chat:
            texts = [tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True),
                     tokenizer.apply_chat_template(turns, tokenize=False)]
        before, ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
        start = len(before) - (before[-1] == tokenizer.eos_token_id)
        ids += [] if chat or ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
        examples.append({"input_ids": ids, "labels": [IGNORE] * start + ids[start:]})
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
