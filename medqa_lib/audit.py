"""Does a training loss compare each prediction with the token it should? Needs no pretrained weights.

The gradient of a cross-entropy with respect to the logits of position t is w * (p - onehot(target)): its one negative entry
names the token that position t is trained on, its size the weight. Targets are compared with the ids that positions have
read: offset 0 copies the newest one, +1 is the next token (correct), +2 the one after it (labels shifted twice).

    audit_loss(model, batch)                     what the loss of a batch does, and what this loss does to any batch
    audit_batches(dataset, collator, tokenizer)  what is supervised: prompt, answer, EOS, padding, by source
    AuditCallback(trainer)                       both on the first rows of a run; raises on a fault that was not declared
    python -m medqa_lib.audit --model ID         the same from a command line

The file stands alone: copy it beside any script that trains with transformers.
"""

from __future__ import annotations

import argparse
import csv
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
    """The faults found are not those declared."""


def audit_loss(model, batch: dict, compute_loss=None) -> dict:
    """Which token is each position's prediction compared with, and with what weight?

    Args:
        batch: a collator's: input_ids (B, T) or an encoder's input, labels, and what else the model takes.
        compute_loss: a Trainer's method of that name; by default the model's own loss.
    Returns:
        offset, constant (every supervised position has it), supervised (positions), leaks_across_rows, leaks_across_documents,
        ignores_minus_100, normalisation ("tokens", "rows", "sum", None), honours_num_items, padding_share and eos_share (of
        these positions, how many are targets), faults (keys of WORDS, offset_K), verdict. None: this batch cannot tell.
    """
    report, _ = _judge_loss(_Loss(model, batch, compute_loss))
    return report


class _Loss:
    """The loss of variants of one batch as (B, T) targets and weights."""

    def __init__(self, model, batch, compute_loss=None):
        self.model, self.compute_loss = model, compute_loss
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        device = next((weight.device for weight in model.parameters()), "cpu")
        self.batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        accepted = inspect.signature(self.base.forward).parameters
        self.fixed = {"use_cache": False} if "use_cache" in accepted else {}
        self.key = "shift_labels" if batch.get("shift_labels") is not None else "labels"
        self.labels, ids = self.batch.get(self.key), self.batch.get("input_ids")
        self.encoder_decoder = "decoder_input_ids" in accepted or ids is None or self.labels.shape != ids.shape
        mask = self.labels == IGNORE if self.encoder_decoder else _padding(self.batch, ids)
        self.documents = _number_documents({} if self.encoder_decoder else self.batch, mask)

    def observe(self, **changes) -> dict | None:
        """targets, weights, logits, one_target and embedded (ids that embeddings were given); None without a loss."""
        batch, heads, embedded, training = {**self.batch, **self.fixed, **changes}, [], [], self.model.training

        def level(_module, _inputs, logits):  # no target may be so sure that its gradient vanishes
            heads.extend((logits.detach(), torch.zeros_like(logits).requires_grad_()))
            return heads[1]

        head = self.base.get_output_embeddings() if hasattr(self.base, "get_output_embeddings") else None
        hooks = [module.register_forward_pre_hook(lambda _, inputs: embedded.extend(inputs[:1]))
                 for module in self.base.modules() if isinstance(module, torch.nn.Embedding)]
        hooks += [head.register_forward_hook(level)] if head is not None else []
        try:
            loss, logits = self._forward(self.model.eval(), batch)
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
        if loss is None:
            return None
        for source in (logits, *heads[1:2]):
            if torch.is_tensor(source) and source.requires_grad and source.ndim == 3:
                gradient, = torch.autograd.grad(loss, source, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    real = heads[0] if heads and heads[0].shape == source.shape else source.detach()
                    return _read_gradient(gradient.float(), source.detach().float()) | {"logits": real, "embedded": embedded}
        return self._perturb(batch, float(loss)) | {"embedded": embedded}

    def _forward(self, model, batch):
        if self.compute_loss is None:
            output = model(**batch)
            return output.loss, getattr(output, "logits", None)
        items = batch.pop("num_items_in_batch", None)
        loss, output = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=items)
        return loss, output["logits"] if isinstance(output, dict) else output.logits

    @torch.no_grad()
    def _perturb(self, batch, loss: float, most: int = 24) -> dict:
        """Where the loss hides its logits: change one label, and find the position whose log-probabilities explain it."""
        inputs = {name: value for name, value in batch.items() if "labels" not in name and name != "num_items_in_batch"}
        logits, labels = self.model(**inputs).logits.float(), batch[self.key]
        logs = logits.double().log_softmax(-1)
        targets, weights = torch.full_like(logs[..., 0], IGNORE).long(), torch.zeros_like(logs[..., 0])
        places = (labels != IGNORE).nonzero().tolist()
        for row, place in places[::max(1, len(places) // most)]:
            old, changes, falls = int(labels[row, place]), [], []
            for step in (1, 7):
                changed = labels.clone()
                changed[row, place] = (old + step) % logits.shape[-1]
                changes.append(float(self._forward(self.model, {**batch, self.key: changed})[0]) - loss)
                falls.append(logs[..., old] - logs[..., changed[row, place]])  # the loss rises by w times this
            if max(map(abs, changes)) > 1e-7:
                misfit = (changes[0] * falls[1] - changes[1] * falls[0]).abs() / (falls[0].hypot(falls[1]) + 1e-9)
                spot = divmod(int(misfit.argmin()), misfit.shape[1])
                targets[spot], weights[spot] = old, changes[0] / float(falls[0][spot])
        return {"targets": targets, "weights": weights, "logits": logits, "one_target": True}

    def read(self, seen) -> torch.Tensor | None:
        """(B, T) ids that positions have read: of all that an embedding was given, those in which the targets are."""
        targets, best, ids = seen["targets"], (-1, None), self.batch.get("input_ids")
        given = self.batch.get("decoder_input_ids") if self.encoder_decoder else ids
        for read in (given, *seen["embedded"]):
            if not torch.is_tensor(read) or read.ndim != 2 or len(read) != len(targets) or read.is_floating_point() or (
                    self.encoder_decoder and read is not given and ids is not None and torch.equal(read, ids)):
                continue
            if read.shape[1] <= targets.shape[1]:  # an image's positions come first
                read = pad(read, (targets.shape[1] - read.shape[1], 0), value=-1)
                share = max(_match(targets, read, offset).float().mean().item() for offset in OFFSETS)
                best = (share, read) if share > best[0] + 0.01 else best
        return best[1]

    def count_places(self, seen, report) -> None:
        """Shares of padding and of EOS that are targets; and whether a target lies in another document."""
        targets, read, offset = seen["targets"], seen["read"], report["offset"]
        documents = pad(self.documents, (targets.shape[1] - self.documents.shape[1], 0), value=-1)
        columns = torch.arange(targets.shape[1], device=targets.device) - offset  # who is trained on the token of a place
        inside = (columns >= 0) & (columns < targets.shape[1])
        columns = columns.clamp(0, targets.shape[1] - 1)
        taken = (targets[:, columns] != IGNORE) & inside
        owner = documents[:, columns]
        if (taken & (owner >= 0) & (documents >= 0) & (owner != documents)).any():
            report["leaks_across_documents"] = True
        eos = getattr(self.base.config.get_text_config(), "eos_token_id", None)
        eos = torch.tensor(eos if isinstance(eos, list) else [-1 if eos is None else eos], device=read.device)
        for name, places in (("padding_share", documents < 0), ("eos_share", torch.isin(read, eos) & (documents >= 0))):
            places = places & inside
            report[name] = float(taken[places].float().mean()) if places.any() else None

    def every_label(self) -> torch.Tensor:
        """Labels that supervise all that can be: no padding, no document's first token behind another document."""
        if self.encoder_decoder:
            return self.labels
        ids = self.batch["input_ids"]
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        labels = ids.masked_fill((self.documents < 0) | first, IGNORE)
        return labels if self.key == "labels" else pad(labels, (0, 1), value=IGNORE)[:, 1:].contiguous()

    def leaks(self, full, labels, documents, parity: int) -> bool:
        """Does reversing every second document change targets or logits of the others?"""
        def reverse(values, movable):
            values = values.clone()
            for number in range(parity, int(self.documents.max()) + 1, 2):
                spot = (self.documents == number) & movable
                values[spot] = values[spot].flip(0)
            return values

        changes = {self.key: reverse(labels, labels != IGNORE)}
        if not self.encoder_decoder:
            changes["input_ids"] = reverse(self.batch["input_ids"], self.labels != IGNORE)
        other, seen = (documents >= 0) & (documents % 2 != parity), self.observe(**changes)
        apart = (seen["logits"] - full["logits"]).abs().amax(-1)[other].max()
        tolerance = 1e-3 if full["logits"].dtype == torch.float32 else 5e-2
        return bool((seen["targets"] != full["targets"])[other].any() or apart > tolerance * full["logits"].float().std())


def _read_gradient(gradient, logits) -> dict:
    """targets (IGNORE where there is none), weights, and whether each position has one target."""
    size, targets = (-gradient).max(-1)
    chance = (logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)).exp()
    weights = size / (1 - chance).clamp(min=1e-6)
    supervised = weights > 1e-4 * weights.max().clamp(min=1e-12)
    negative = (-gradient).clamp(min=0).sum(-1)
    return {"targets": targets.masked_fill(~supervised, IGNORE), "weights": weights * supervised,
            "one_target": bool((size > 0.5 * negative)[supervised].all())}


def _ahead(read, offset: int) -> torch.Tensor:
    """(B, T) the id `offset` places on from each place, -1 outside the row."""
    return pad(read, (max(0, -offset), max(0, offset)), value=-1)[:, max(0, offset):][:, :read.shape[1]]


def _match(targets, read, offset: int) -> torch.Tensor:
    """(N,) whether each target that has an id `offset` places on is that id."""
    ahead = _ahead(read, offset)
    return (ahead == targets)[(targets != IGNORE) & (ahead >= 0)]


def _find_offset(targets, read) -> tuple[int | None, bool]:
    """(offset that most targets have, whether all rows have it throughout)."""
    shares = {offset: _match(targets, read, offset).float() for offset in OFFSETS}
    shares = {offset: float(match.mean()) for offset, match in shares.items() if len(match)}
    if not shares:
        return None, False
    offset = max(shares, key=shares.get)
    rows = [_match(targets[row, None], read[row, None], offset).float() for row in range(len(targets))]
    return offset, all(match.mean() > 0.99 for match in rows if len(match))


def _padding(batch, ids) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return mask == 0 if torch.is_tensor(mask) and mask.shape == ids.shape else torch.zeros_like(ids, dtype=torch.bool)


def _number_documents(batch, padding) -> torch.Tensor:
    """(B, T) running number of the document of each position, -1 for padding: by row, position_ids or cu_seq_lens_q."""
    starts, positions = torch.zeros_like(padding, dtype=torch.long), batch.get("position_ids")
    starts[:, 0] = 1
    if torch.is_tensor(positions) and positions.shape == starts.shape:
        starts[:, 1:] = (positions[:, 1:] == 0) & ~padding[:, 1:] & ~padding[:, :-1]
    elif torch.is_tensor(batch.get("cu_seq_lens_q")):
        starts[0, batch["cu_seq_lens_q"][:-1].long().clamp(max=starts.shape[1] - 1)] = 1
    return (starts.flatten().cumsum(0) - 1).view_as(starts).masked_fill(padding, -1)


def _judge_loss(loss: _Loss) -> tuple[dict, dict | None]:
    names = ("offset", "constant", "supervised", "leaks_across_rows", "leaks_across_documents", "ignores_minus_100",
             "normalisation", "honours_num_items", "padding_share", "eos_share")
    report, faults = dict.fromkeys(names), []
    try:
        seen = loss.observe()
    except IndexError as error:  # torch's "Target -100 is out of bounds"
        seen, faults = None, ["minus_100_supervised" if str(IGNORE) in str(error) else "label_out_of_range"]
    if seen is None:
        return report | _conclude(faults or ["no_loss"]), None
    seen["read"] = loss.read(seen)
    report["supervised"] = int((seen["targets"] != IGNORE).sum())
    if not report["supervised"]:
        faults.append("no_supervised_tokens")
    elif not seen["one_target"]:
        faults.append("not_cross_entropy")
    elif seen["read"] is not None:
        report["offset"], report["constant"] = _find_offset(seen["targets"], seen["read"])
        faults += _name_offset(report["offset"], report["constant"])
        loss.count_places(seen, report)
    if seen["one_target"] and seen["targets"].shape[1] >= loss.documents.shape[1]:
        _probe(loss, report)
    faults += [name for name in ("leaks_across_rows", "leaks_across_documents") if report[name]]
    faults += ["minus_100_supervised"] if report["ignores_minus_100"] is False else []
    faults += ["weighted_by_rows"] if report["normalisation"] == "rows" else []
    return report | _conclude(faults), seen


def _name_offset(offset: int | None, constant: bool) -> list[str]:
    if not constant:
        return ["no_constant_offset"]
    return [] if offset == 1 else [{0: "copy", 2: "double_shift"}.get(offset, f"offset_{offset}")]


def _conclude(faults: list[str]) -> dict:
    words = [f"{name.replace('_', ' ')}{f' ({WORDS[name]})' if name in WORDS else ''}" for name in faults]
    return {"faults": faults, "verdict": f"FAULT: {'; '.join(words)}" if faults else "correct"}


def _probe(loss: _Loss, report: dict) -> None:
    """What this loss would do to other labels of the same batch: all supervised, some of them -100, documents reversed."""
    labels, documents = loss.every_label(), loss.documents
    full = loss.observe(**{loss.key: labels})
    supervised, few = full["targets"] != IGNORE, labels.clone()
    places = (labels[0] != IGNORE).nonzero()[:, 0]
    few[0, places[len(places) // 2:]] = IGNORE
    try:
        part = loss.observe(**{loss.key: few})
    except IndexError:
        report["ignores_minus_100"] = False
        return
    report["ignores_minus_100"] = int(supervised.sum() - (part["targets"] != IGNORE).sum()) == len(places) - len(places) // 2
    documents = pad(documents, (full["targets"].shape[1] - documents.shape[1], 0), value=-1)
    weights, owners = part["weights"][part["targets"] != IGNORE], documents[part["targets"] != IGNORE]
    rows = torch.stack([weights[owners == owner].sum() for owner in owners.unique()])
    equal, total = [bool(part.max() < 1.02 * part.min()) for part in (weights, rows)], float(weights.sum())
    report["normalisation"] = ("tokens" if abs(total - 1) < 0.02 else "sum" if abs(weights[0] - 1) < 0.02 else None) \
        if equal[0] else "rows" if equal[1] else None
    try:
        items = torch.tensor(10 * int(supervised.sum()), device=labels.device)
        weighted = loss.observe(**{loss.key: labels}, num_items_in_batch=items)["weights"].sum()
        report["honours_num_items"] = bool(weighted < 0.5 * full["weights"].sum())
    except TypeError:
        report["honours_num_items"] = False
    several = any(len(row[row >= 0].unique()) > 1 for row in documents)
    if documents.max() > 0:
        name = "leaks_across_documents" if several else "leaks_across_rows"
        report[name] = bool(report[name]) or any(loss.leaks(full, labels, documents, parity) for parity in (0, 1))


def audit_batches(dataset, collator, tokenizer, model=None, response=None, rows: int = 256, compute_loss=None) -> dict:
    """What is supervised in what the collator makes of a data set, and, with a model, what its loss makes of that.

    Args:
        dataset: examples as the collator takes them; `rows` evenly spread ones are counted, 4 go through the model.
        response: the text in front of every answer, by default the chat template's; None: where prompts end is unknown.
    Returns:
        rows, offset, shares of tokens (prompt_share, answer_share, padding_share), of rows (rows_supervised, rows_with_eos, eos_share:
        EOS is a target) and of the assistant's turns (turns_share), None if unknown; eos_by_source; shown (three rows as text, targets
        in [[ ]]); notes, faults, verdict; with a model loss (`audit_loss`), nll (nats by offset), chance_nll and likelihood.
    """
    examples = _choose(dataset, rows)
    report, faults = _count(examples, collator, tokenizer, response)
    if model is not None and not {"ignore_index", "no_supervised_tokens"} & set(faults):
        own = {getattr(config, "eos_token_id", None) for config in (model.config, getattr(model, "generation_config", None))}
        own = {token for tokens in own for token in (tokens if isinstance(tokens, list) else [tokens])} - {None}
        if own and tokenizer.eos_token_id not in own:
            faults.append("eos_mismatch")
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            report["loss"], seen = _judge_loss(_Loss(model, collator(_without_text(_choose(examples, 4))), compute_loss))
        report["offset"] = report["loss"]["offset"]
        faults = [*report["loss"]["faults"], *faults]
        report |= _likelihood(seen) if report["offset"] is not None else {}
    elif "no_constant_offset" not in faults:
        faults += _name_offset(report["offset"], True)
    return report | _conclude(list(dict.fromkeys(faults)))


def _choose(dataset, count: int) -> list:
    """At most `count` examples evenly spread over a data set with a length, else the first ones."""
    if hasattr(dataset, "__len__"):
        count = min(count, len(dataset))
        return [dataset[i * len(dataset) // count] for i in range(count)]
    return list(itertools.islice(dataset, count))


def _without_text(examples: list[dict]) -> list[dict]:
    """The examples without columns of text, which transformers' collators cannot make tensors of."""
    return [{name: value for name, value in example.items() if not isinstance(value, str)} for example in examples]


def _response_ids(tokenizer, response) -> tuple[list[int], set[int]]:
    """The ids in front of every answer, whatever the prompt ends with, and those that end one."""
    ends = {tokenizer.eos_token_id}
    if response is None and getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": "hello"}]
        texts = [tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=more) for more in (False, True)]
        response = texts[1][len(texts[0]):]
        text = tokenizer.apply_chat_template([*said, {"role": "assistant", "content": "world"}], tokenize=False)
        after = tokenizer(text.rpartition("world")[2], add_special_tokens=False)["input_ids"]
        ends |= {token for token in after[:1] if token in tokenizer.all_special_ids}
    rows = [tokenizer(text + (response or ""), add_special_tokens=False)["input_ids"][::-1] for text in ("Is a", "Is it b?", "c.\n")]
    same = [column[0] for column in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))]
    return same[::-1] if response else [], ends


def _read_document(ids: list[int], taken: list[bool], tokenizer, response: list[int], ends: set[int]) -> dict:
    """Which tokens of one document are prompt, answer, EOS and padding, and which of them are targets."""
    stop = len(ids)
    while stop and ids[stop - 1] in {*ends, tokenizer.pad_token_id}:
        stop -= 1
    stop = len(ids) if len(ids) - stop < 3 else stop + (ids[stop] in ends)  # padding that no attention mask tells of
    spans = [] if response else [(0, stop)]
    for start in range(len(response), stop + 1) if response else ():
        if ids[start - len(response):start] == response and (not spans or start >= spans[-1][1]):
            spans.append((start, next((place + 1 for place in range(start, stop) if ids[place] in ends), stop)))
    answer = {place for span in spans for place in range(*span)}
    prompt = [place for place in range(1, stop) if place not in answer] if response and spans else []
    prompt = [place for place in prompt if ids[place - 1] not in ends or tokenizer.decode([ids[place]]).strip()]
    last = spans[-1][1] - 1 if spans else stop - 1
    text = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return {"prompt": [taken[place] for place in prompt], "answer": [taken[place] for place in answer if ids[place] not in ends] if response else [],
            "turns": [any(taken[start:end]) for start, end in spans if end > start], "padding": taken[stop:], "length": stop,
            "rows": [any(taken)], "eos": [ids[last] in ends and taken[last]] if any(taken) else [],
            "ends": [ids[last] in ends] if any(taken) else [],
            "double_bos": [len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id],
            "as_text": {token for token in tokenizer.all_special_tokens if token in text},
            "shown": "".join(f"[[{part}]]" if kind else part for kind, part in (
                (kind, tokenizer.decode([ids[place] for place in places]))
                for kind, places in itertools.groupby(range(stop), key=lambda place: taken[place])))}


def _count(examples, collator, tokenizer, response) -> tuple[dict, list[str]]:
    """`audit_batches` without a model: (report, faults)."""
    response, ends = _response_ids(tokenizer, response)
    batches, packed, crosses = [], False, False
    for part in (examples[start:start + 8] for start in range(0, len(examples), 8)):
        batch = collator(_without_text(part))
        shifted = batch.get("shift_labels") is not None
        labels, ids = batch["shift_labels" if shifted else "labels"], batch.get("input_ids")
        if ids is None or ids.shape != labels.shape:  # an encoder's input: the labels are what the decoder reads
            batch, ids = {"attention_mask": labels != IGNORE}, labels.masked_fill(labels == IGNORE, 0)
        documents = _number_documents(batch, _padding(batch, ids))
        packed |= int(documents.max()) + 1 < len(part) and len(labels) < len(part)
        named = int(documents.max()) + 1 == len(part)
        batches.append((ids, labels, documents, [str(example.get("source", "")) if named else "" for example in part]))
    inner = [(labels.masked_fill(documents < 0, IGNORE), ids) for ids, labels, documents, _ in batches]
    known = max(1, sum(int((labels != IGNORE).sum()) for labels, _ in inner))
    shift = max((1, 0, 2) if shifted else (0, 1, 2, -1), key=lambda shift: sum(int(_match(*pair, shift).sum()) for pair in inner))
    strange = Counter(label for labels, ids in inner for label in labels[
        (labels != IGNORE) & (_ahead(ids, shift) >= 0) & (_ahead(ids, shift) != labels)].tolist())
    foreign, times = strange.most_common(1)[0] if strange else (None, 0)
    faults = [] if strange.total() <= 0.01 * known else ["ignore_index" if times > 0.99 * strange.total() else "no_constant_offset"]
    found, sums = [], defaultdict(list)
    for ids, labels, documents, sources in batches:
        taken = ((labels != IGNORE) & ((labels != foreign) | ("ignore_index" not in faults))).roll(shift, 1)
        first = (documents[:, 1:] > documents[:, :-1]) & (documents[:, :-1] >= 0)
        crosses |= bool((taken[:, 1:] & first).any())
        sums["padding"] += taken[documents < 0].tolist()
        for number in range(int(documents.max()) + 1):
            spot = documents == number
            found.append(_read_document(ids[spot].tolist(), taken[spot].tolist(), tokenizer, response, ends))
            source = sources[number] if number < len(sources) else ""
            for name, values in found[-1].items():
                sums[name] += values if isinstance(values, list) else []
            sums[f"eos {source}"] += found[-1]["eos"]
    share = {name: sum(values) / len(values) if values else None for name, values in sums.items()}
    as_text = sorted(set().union(*(document["as_text"] for document in found)))
    lengths = {document["length"] for document in found if document["ends"] == [False]}  # rows that were cut have one length
    report = {"rows": len(found), "offset": shift + (not shifted), "foreign": foreign, "foreign_share": times / known,
              **{f"{name}_share": share[name] for name in ("prompt", "answer", "turns", "padding", "eos")},
              "rows_supervised": share["rows"], "rows_with_eos": share["ends"], "as_text": as_text,
              "eos_by_source": {name[4:]: value for name, value in share.items() if name.startswith("eos ")},
              "shown": [document["shown"] for document in found[:3]], "notes": []}
    if response and share["prompt"] is None:
        report["notes"].append("the text in front of answers was not found, so prompt and answer are not told apart")
    if not share["ends"] and len(lengths) == 1:
        report["notes"].append(f"no row has an EOS and all have {max(lengths)} tokens, so they are cut: raise the maximum length")
    checks = {
        "no_supervised_tokens": not share["rows"], "rows_without_supervised_tokens": 0 < share["rows"] < 1,
        "prompt_supervised": share["prompt"] == 1, "prompt_partly_supervised": 0 < (share["prompt"] or 0) < 1,
        "turns_unsupervised": 0 < (share["turns"] or 0) < 1 == share["rows"],
        "answer_partly_supervised": 0 < (share["answer"] or 0) < 1 == share["turns"],
        "padding_supervised": share["padding"] == 1, "padding_partly_supervised": 0 < (share["padding"] or 0) < 1,
        "no_eos": not share["eos"] and (share["ends"] or len(lengths) > 1),
        "eos_partly_supervised": 0 < (share["eos"] or 0) < (share["ends"] or 0), "eos_missing": share["eos"] and len(lengths) > 1,
        "leaks_across_documents": crosses, "packed_without_positions": packed,
        "double_bos": share["double_bos"], "special_tokens_as_text": as_text}
    return report, faults + [name for name, found in checks.items() if found]


def _likelihood(seen) -> dict:
    """How likely the model itself finds the targets, read at each offset: a pretrained model knows, whatever the labels are called."""
    targets, logits = seen["targets"], seen["logits"].float()
    row, place = (targets[:, 1:-1] != IGNORE).nonzero(as_tuple=True)
    nll = {offset: float(cross_entropy(logits[row, place + offset], targets[row, place + 1])) for offset in (0, 1, 2)}
    (likeliest, best), (_, second) = sorted(nll.items(), key=lambda item: item[1])[:2]
    chance = math.log(logits.shape[-1])
    return {"nll": nll, "chance_nll": chance, "likeliest": likeliest if min(second, chance) - best >= 1 else None}


def describe(report: dict) -> str:
    """An `audit_batches` report in about ten lines."""
    def percent(name):
        return "unknown" if report[name] is None else f"{report[name]:.1%}"

    loss = report.get("loss", {})
    lines = [f"Label audit of {report['rows']} rows: {report['verdict']}",
             f"  offset {report['offset']} (0 copy, 1 correct, 2 shifted twice); "
             + ", ".join(f"{name} {loss[name]}" for name in ("normalisation", "ignores_minus_100", "honours_num_items") if loss),
             f"  targets: {percent('prompt_share')} of prompts, {percent('answer_share')} of answers, {percent('padding_share')} of padding",
             f"  EOS: a target in {percent('eos_share')} of the rows, present in {percent('rows_with_eos')}",
             *(f"  note: {note}" for note in report["notes"])]
    if "nll" in report:
        lines.append("  nats per token by offset: " + ", ".join(f"{value:.2f} at {offset}" for offset, value in report["nll"].items())
                     + f" (chance {report['chance_nll']:.2f}): " + (
                         "this model cannot tell" if report["likeliest"] is None else "the model agrees"
                         if report["likeliest"] == report["offset"] else "the model is odd: untrained, or tuned on other labels"))
    return "\n".join([*lines, *(f"  targets in [[ ]]: {text[-200:]!r}" for text in report["shown"])])


class AuditCallback(transformers.TrainerCallback):
    """Audits the first rows of a run as the Trainer will see them, prints ten lines, and stops on an undeclared fault.

    Args:
        trainer: audits its `compute_loss` too; without it the model's own loss.
        declared: faults that are meant, for example ("prompt_supervised",).
    """

    def __init__(self, trainer=None, declared=(), response: str | None = None, rows: int = 256):
        self.trainer, self.declared, self.response, self.rows = trainer, declared, response, rows

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, processing_class=None, **others):
        loader, tokenizer = train_dataloader, getattr(processing_class, "tokenizer", processing_class)
        report = audit_batches(loader.dataset, loader.collate_fn, tokenizer, model, self.response, self.rows,
                               self.trainer and self.trainer.compute_loss)
        if args.gradient_accumulation_steps > 1 and report.get("loss", {}).get("honours_num_items") is False:
            report |= _conclude([*report["faults"], "num_items_ignored"])
        if state.is_world_process_zero:
            print(describe(report))
        require(report, self.declared)


def require(report: dict, declared=()) -> None:
    """Raise AuditError unless the report's faults are those declared."""
    if set(report["faults"]) != set(declared):
        raise AuditError(f"The label audit found {report['verdict']}; declared was {', '.join(declared) or 'no fault'}. "
                         "Correct data set, collator or loss, or declare what is meant.")


def probe_batch(model, rows: int = 3, tokens: int = 12) -> dict:
    """Random ids of unequal length as a batch for `audit_loss`: input_ids, attention_mask and labels, (3, 12)."""
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(min(10, vocab // 2), vocab, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(tokens) < torch.tensor([[tokens - 3 * (row == 1)] for row in range(rows)])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def _load_model(name: str):
    """The class that the config names, with its weights or, where there are none, with random ones."""
    config = transformers.AutoConfig.from_pretrained(name)
    kind = getattr(transformers, (config.architectures or [""])[0], None) or (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM)
    try:
        return kind.from_pretrained(name)
    except OSError:
        return kind(config) if inspect.isclass(kind) and issubclass(kind, torch.nn.Module) else kind.from_config(config)


def _encode_file(path: str, tokenizer, prompt: str, answer: str) -> list[dict]:
    """Rows of a CSV, JSON or JSONL file as chat turns (without a chat template: prompt, line break, answer), labels on the answer."""
    text = Path(path).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(True))) if path.endswith(".csv") else json.loads(text) if text.lstrip().startswith("[") \
        else [json.loads(line) for line in text.splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no rows")
    examples = []
    for row in rows[:256]:
        ids = []
        for turns in ([("user", row[prompt])], [("user", row[prompt]), ("assistant", row[answer])]):
            if tokenizer.chat_template:
                whole = tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False,
                                                      add_generation_prompt=len(turns) == 1)
                ids.append(tokenizer(whole, add_special_tokens=False)["input_ids"])
            else:
                ids.append(tokenizer("\n".join(text for _, text in turns) + "\n" * (len(turns) == 1))["input_ids"])
        ids[1] += [] if tokenizer.chat_template or ids[1][-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
        masked = len(ids[0]) - (ids[0][-1] == tokenizer.eos_token_id)
        examples.append({"input_ids": ids[1], "labels": [IGNORE] * masked + ids[1][masked:]})
    return examples


def main(arguments=None) -> int:
    """Audit a model's loss, and with --data its tokenizer on rows of your own. Status 1: a fault, 2: bad input."""
    parser = argparse.ArgumentParser(prog="audit", description=main.__doc__)
    parser.add_argument("--model", required=True, help="Hub id or folder; without weights there, random ones are audited")
    parser.add_argument("--data", help="CSV, JSON or JSONL")
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
    except KeyError as error:
        print(f"audit: {options.data} has no column {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"audit: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 2
    if not options.data:
        report = audit_loss(model, probe_batch(model))
        print("\n".join(f"{name}: {value}" for name, value in report.items()))
    else:
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
        report = audit_batches(examples, collator, tokenizer, model, None if tokenizer.chat_template else "\n")
        print(describe(report))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
