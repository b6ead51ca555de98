"""Does a training loss compare each prediction with the token it should? Needs no pretrained weights.

The gradient of a cross-entropy with respect to the logits of position t is w * (p - onehot(target)): its one
negative entry names the token that t is trained on, its size the weight w. Targets are compared with the ids
that positions have read: offset 0 copies the newest one, +1 is the next token (correct), +2 the one after it.

    audit_loss(model, batch)                     what the loss of a batch does
    audit_batches(dataset, collator, tokenizer)  what is supervised: prompt, answer, EOS, padding, by source
    AuditCallback(trainer)                       both at the start of a run; raises on an undeclared fault
    python audit.py --model ID                   from a command line
"""

import argparse
import csv
import functools
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
# Prompt, line break, answer, EOS: for a tokenizer without a chat template.
PLAIN = ("{% for turn in messages %}{{ '\n' if turn.role == 'assistant' }}{{ turn.content }}"
         "{{ eos_token if turn.role == 'assistant' }}{% endfor %}{{ '\n' if add_generation_prompt }}")
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


def audit_loss(model, batch, compute_loss=None) -> dict:
    """Which token is each position's prediction compared with, and with what weight?

    Args:
        batch: a collator's: input_ids (B, T) or an encoder's input, labels, and what else the model takes.
        compute_loss: a Trainer's method of that name; by default the model's own loss.
    Returns:
        offset, constant (every supervised position has it), ignores_minus_100, honours_num_items,
        leaks_across_rows (an example learns from another, or attends to it), normalisation ("tokens",
        "rows", "sum"), faults, verdict. None: it cannot be told.
    """
    return _Loss(model, batch, compute_loss).judge()[0]


class _Loss:
    """The loss of one batch and of variants of it, as a target and a weight for each position."""

    def __init__(self, model, batch, compute_loss=None):
        self.model, self.compute_loss = model, compute_loss
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        takes = inspect.signature(self.base.forward).parameters
        self.batch = {"use_cache": False} if "use_cache" in takes else {}  # a cache hides position_ids
        self.batch |= {key: value.to(model.device) if torch.is_tensor(value) else value
                       for key, value in batch.items()}
        self.key = "shift_labels" if "shift_labels" in batch else "labels"
        self.labels, self.ids = self.batch[self.key], self.batch.get("input_ids")
        self.decoder_only = self.ids is not None and "decoder_input_ids" not in takes
        self.documents = _number_documents(self.batch if self.decoder_only else {}, self.labels)

    def run(self, batch):
        if self.compute_loss is None:
            return self.model(**batch).loss
        items = batch.pop("num_items_in_batch", None)
        return self.compute_loss(self.model, batch, num_items_in_batch=items)

    def observe(self, **changes) -> dict:
        """loss; (B, T) targets and weights, (B, T, V) logits; embedded: what embeddings got."""
        heads, embedded, gradient = [], [], None

        def level(_module, _inputs, logits):  # all tokens equally likely: no gradient vanishes
            heads.extend((logits.detach(), torch.zeros_like(logits).requires_grad_()))
            return heads[1].clone()  # some models change logits in place

        head = self.base.get_output_embeddings()
        hooks = [head.register_forward_hook(level)] if isinstance(head, torch.nn.Linear) else []
        hooks += [module.register_forward_pre_hook(lambda _, inputs: embedded.extend(inputs[:1]))
                  for module in self.base.modules() if isinstance(module, torch.nn.Embedding)]
        try:
            loss = self.run(self.batch | changes)
        finally:
            for hook in hooks:
                hook.remove()
        if loss is None:
            return {"loss": None}
        if len(heads) == 2 and heads[0].ndim == 3:
            gradient, = torch.autograd.grad(loss, heads[1], allow_unused=True)
        if gradient is None:
            return {"loss": loss.item(), "embedded": embedded, **self.change_labels()}
        ahead = (0, 0, self.labels.shape[1] - gradient.shape[1], 0)  # an image's positions come before
        weights, targets = (-pad(gradient.float(), ahead)).max(-1)
        supervised = weights > 1e-4 * weights.max().clamp(min=1e-12)
        return {"loss": loss.item(), "embedded": embedded, "weights": weights * supervised,
                "targets": targets.masked_fill(~supervised, IGNORE), "logits": pad(heads[0].float(), ahead)}

    @torch.no_grad()
    def change_labels(self) -> dict:
        """Where a loss hides its logits: which position's log-probability is the loss of one label alone?"""
        targets, places = torch.full_like(self.labels, IGNORE), (self.labels != IGNORE).nonzero().tolist()
        logits = self.model(**{key: value for key, value in self.batch.items() if "labels" not in key}).logits
        logs = logits.float().log_softmax(-1)
        for row, place in places[::len(places) // 12 + 1]:
            misfit = 0
            for step in (0, 1, 7):
                alone = torch.full_like(self.labels, IGNORE)
                alone[row, place] = token = (int(self.labels[row, place]) + step) % logits.shape[-1]
                misfit = misfit + (self.run({**self.batch, self.key: alone}) + logs[..., token]).abs()
            if misfit.min() < 0.3:
                targets[divmod(int(misfit.argmin()), misfit.shape[1])] = self.labels[row, place]
        return {"targets": targets, "weights": None, "logits": logits.float()}

    def judge(self) -> tuple[dict, dict]:
        """(report of `audit_loss`, what was seen)"""
        report = dict.fromkeys(("offset", "constant", "leaks_across_rows", "ignores_minus_100",
                                "normalisation", "honours_num_items"))
        training = self.model.training
        self.model.eval()
        try:
            seen = self.observe()
            if seen["loss"] is None:
                return report | _conclude(["no_loss"]), seen
            if (seen["targets"] == IGNORE).all():
                name = "not_cross_entropy" if (self.labels != IGNORE).any() else "no_supervised_tokens"
                return report | _conclude([name]), seen
            report |= self.place(seen) | self.probe(seen)
        finally:
            self.model.train(training)
        checks = {"no_constant_offset": report["constant"] is False,
                  "leaks_across_rows": report["leaks_across_rows"] is True,
                  "minus_100_supervised": report["ignores_minus_100"] is False,
                  "weighted_by_rows": report["normalisation"] == "rows"}
        named = _name_offset(report["offset"]) if report["constant"] else []
        return report | _conclude(named + [name for name, fault in checks.items() if fault]), seen

    def place(self, seen) -> dict:
        """Which places do targets come from? Counted from what the decoder's embedding has read."""
        targets, found = seen["targets"], []
        for ids in [self.ids] if self.decoder_only else seen["embedded"]:
            read = torch.is_tensor(ids) and ids.shape == targets.shape
            if read and (self.decoder_only or self.ids is None or not torch.equal(ids, self.ids)):
                found.append(_find_offset(targets, ids))
        share, offset = max(found, key=lambda place: place[0], default=(None, None))
        return {"offset": offset, "constant": None if offset is None else share > 0.99}

    def probe(self, seen) -> dict:
        """What changes with num_items_in_batch, with fewer labels, with other documents?"""
        labels, found = self.labels, {"honours_num_items": False}
        try:
            with torch.no_grad():
                weighted = self.run({**self.batch, "num_items_in_batch": 10 * (labels != IGNORE).sum()})
                found["honours_num_items"] = bool(weighted < 0.5 * self.run(dict(self.batch)))
        except TypeError:  # forward has no such argument
            pass
        if seen["weights"] is None:
            return found
        few, places = labels.clone(), (labels[0] != IGNORE).nonzero()[:, 0]
        few[0, places[len(places) // 2:]] = IGNORE
        part = self.observe(**{self.key: few})
        kept = part["targets"] != IGNORE
        gone = (seen["targets"] != IGNORE).sum() - kept.sum()
        found["ignores_minus_100"] = bool(gone == (few != labels).sum())
        weights, owners = part["weights"][kept], self.documents[kept]
        rows = torch.stack([weights[owners == owner].sum() for owner in owners.unique()])
        if weights.max() < 1.02 * weights.min():
            found["normalisation"] = "tokens" if part["loss"] > 0.98 * seen["loss"] else "sum"
        elif rows.max() < 1.02 * rows.min():
            found["normalisation"] = "rows"
        if self.documents.max() > 0:
            found["leaks_across_rows"] = any(self.leaks(seen, parity) for parity in (0, 1))
        return found

    def leaks(self, seen, parity: int) -> bool:
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
    def share(offset):
        ahead = _ahead(ids, offset)
        return (ahead == targets)[(targets != IGNORE) & (ahead >= 0)].float().mean().nan_to_num().item()

    best = max(offsets, key=share)
    return share(best), best


def _number_documents(batch, ids) -> torch.Tensor:
    """(B, T) number of the document of each place, -1 for padding: a row is one, or what position_ids say."""
    inside, positions = batch.get("attention_mask", torch.ones_like(ids)) != 0, batch.get("position_ids")
    starts = torch.zeros_like(ids)
    if positions is not None and positions.shape == ids.shape:
        starts[:, 1:] = (positions[:, 1:] == 0) & inside[:, 1:] & inside[:, :-1]
    starts[:, 0] = 1
    return (starts.flatten().cumsum(0) - 1).view_as(ids).masked_fill(~inside, -1)


def _name_offset(offset: int | None) -> list[str]:
    return [] if offset in (1, None) else [{0: "copy", 2: "double_shift"}.get(offset, f"offset_{offset}")]


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
    report, faults = _count(*_collate(dataset, collator, rows), tokenizer, response)
    if model is None or {"ignore_index", "no_supervised_tokens"} & set(faults):
        return report | _conclude(faults + _name_offset(report["offset"]))
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        report["loss"], seen = _Loss(model, _collate(dataset, collator, 4)[0], compute_loss).judge()
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if stops is not None and tokenizer.eos_token_id not in (stops if isinstance(stops, list) else [stops]):
        faults.append("eos_mismatch")
    if (offset := report["loss"]["offset"]) is not None:
        report |= {"offset": offset, **_likelihood(seen["targets"], seen["logits"])}
    return report | _conclude(list(dict.fromkeys([*report["loss"]["faults"], *faults])))


def _collate(dataset, collator, count: int) -> tuple[dict, list[dict]]:
    """(batch, rows) of rows from all parts of a data set, or of the first ones of a stream."""
    if hasattr(dataset, "__len__"):
        count = min(count, len(dataset))
        rows = [dataset[i * len(dataset) // count] for i in range(count)]
    else:
        rows = list(itertools.islice(dataset, count))
    return collator([{name: value for name, value in row.items() if not isinstance(value, str)}
                     for row in rows]), rows  # collators cannot make tensors of text


@torch.no_grad()
def _likelihood(targets, logits) -> dict:
    row, place = (targets[:, 1:-1] != IGNORE).nonzero(as_tuple=True)
    wanted, chance = targets[row, place + 1], math.log(logits.shape[-1])
    nll = {k: float(cross_entropy(logits[row, place + k], wanted)) for k in (0, 1, 2)}
    best, second, _ = sorted(nll, key=nll.get)
    tells = min(nll[second], chance) - nll[best] >= 1
    return {"nll": nll, "chance_nll": chance, "likeliest": best if tells else None}


def _count(batch, rows, tokenizer, response) -> tuple[dict, list[str]]:
    """`audit_batches` without a model: (report, faults)."""
    faults, shifted = [], batch.get("shift_labels") is not None
    labels, ids = batch["shift_labels" if shifted else "labels"], batch.get("input_ids")
    if ids is None or ids.shape != labels.shape:  # the labels are what the decoder reads
        batch, ids = {"attention_mask": labels != IGNORE}, labels.masked_fill(labels == IGNORE, 0)
    documents = _number_documents(batch, ids)
    number = int(documents.max()) + 1
    if number < len(rows) and len(ids) < len(rows):
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
    found = defaultdict(list, padding=taken[documents < 0].tolist())
    for place in range(number):
        spot = documents == place
        document = _read_document(ids[spot].tolist(), taken[spot].tolist(), tokenizer, *answers)
        source = rows[place].get("source", "") if number == len(rows) else ""
        for name, values in (document | {f"eos {source}": document["eos"]}).items():
            found[name] += values
    cut = len(set(found.pop("cut"))) > 1  # lengths of rows without EOS: rows that were cut have one
    report = {"rows": number, "offset": shift + (not shifted), "shown": found.pop("shown")[:3]}
    share = defaultdict(lambda: None, {name: sum(kept) / len(kept) for name, kept in found.items() if kept})
    report |= {f"{name}_share": share[name] for name in ("prompt", "answer", "turns", "padding", "eos")}
    report |= {"rows_supervised": share["rows"], "rows_with_eos": share["ends"], "eos_by_source": {
        name[4:]: share[name] for name in sorted(found) if name.startswith("eos ")}}
    partly = {name for name, value in share.items() if 0 < (value or 0) < 1}
    checks = {"no_supervised_tokens": not share["rows"], "rows_without_supervised_tokens": "rows" in partly,
              "prompt_supervised": share["prompt"] == 1, "prompt_partly_supervised": "prompt" in partly,
              "turns_unsupervised": "turns" in partly and share["rows"] == 1,
              "answer_partly_supervised": "answer" in partly and share["turns"] == 1,
              "padding_supervised": share["padding"] == 1, "padding_partly_supervised": "padding" in partly,
              "no_eos": not share["eos"] and (share["ends"] or cut), "eos_missing": share["eos"] and cut,
              "eos_partly_supervised": 0 < (share["eos"] or 0) < (share["ends"] or 0),
              "double_bos": share["double_bos"], "special_tokens_as_text": share["as_text"]}
    return report, faults + [name for name, fault in checks.items() if fault]


def _find_answers(tokenizer, response) -> tuple[list[int], set[int]]:
    """The ids in front of every answer, whatever the prompt ends with, and those that end one."""
    ends, said = {tokenizer.eos_token_id}, [{"role": "user", "content": "hello"}]
    if response is None and getattr(tokenizer, "chat_template", None):
        show = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        response = show(said, add_generation_prompt=True)[len(show(said)):]
        after = show([*said, {"role": "assistant", "content": "world"}]).rpartition("world")[2]
        ends |= {*tokenizer(after, add_special_tokens=False)["input_ids"][:1]} & {*tokenizer.all_special_ids}
    if not response:
        return [], ends
    texts = [text + response for text in ("Is a", "Is it b?", "c.\n")]
    rows = [ids[::-1] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))
    return [ids[0] for ids in same][::-1], ends


def _read_document(ids: list[int], taken: list[bool], tokenizer, response: list[int], ends: set[int]) -> dict:
    """Lists, for one document: which tokens of prompt, answer and EOS are targets."""
    parts, kind = [], "prompt" if response else "answer"
    for place, token in enumerate(ids):
        if kind != "answer" and response == ids[max(0, place - len(response)):place]:
            kind = "answer"
        elif kind == "blank" and tokenizer.decode([token]).strip():
            kind = "prompt"
        parts.append("eos" if kind == "answer" and token in ends else kind)
        kind = "blank" if parts[-1] == "eos" and response else kind  # a template's line break behind EOS
    read = [*zip(parts, taken, ids, strict=True)]
    turns = [any(kept for _, kept, _ in turn) for answer, turn
             in itertools.groupby(read, key=lambda token: token[0] in ("answer", "eos")) if answer]
    shown = [(kept, tokenizer.decode([token for *_, token in run]))
             for kept, run in itertools.groupby(read, key=lambda token: token[1])]
    last = max((place for place, part in enumerate(parts) if part in ("answer", "eos")), default=len(ids) - 1)
    ended, learns = ids[last] in ends, any(taken)
    known = read[1:] if response and turns else []  # nothing predicts the first token
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"prompt": [kept for part, kept, _ in known if part == "prompt"],
            "answer": [kept for part, kept, _ in known if part == "answer"],
            "turns": turns, "rows": [learns], "eos": [ended and taken[last]] * learns,
            "ends": [ended] * learns, "cut": [len(ids)] * (learns and not ended),
            "shown": ["".join(f"[[{part}]]" if kept else part for kept, part in shown)],
            "double_bos": [ids[:2] == [tokenizer.bos_token_id] * 2],
            "as_text": [any(token in text for token in tokenizer.all_special_tokens)]}


def describe(report: dict) -> str:
    """An `audit_batches` report in about ten lines."""
    share = {name: "unknown" if value is None else f"{value:.1%}" for name, value in report.items()
             if name.endswith("_share") or name == "rows_with_eos"}
    lines = ["Label audit of {rows} rows: {verdict}",
             "  offset {offset} (0 copy, 1 correct, 2 shifted twice)",
             "  targets: {prompt_share} of prompts, {answer_share} of answers, {padding_share} of padding",
             "  EOS: a target in {eos_share} of the rows, present in {rows_with_eos}"]
    if "loss" in report:
        lines.append("  loss: " + ", ".join(f"{name} {report['loss'][name]}" for name in (
            "normalisation", "ignores_minus_100", "honours_num_items")))
    if "nll" in report:
        said = {None: "this model cannot tell", report["offset"]: "the model agrees"}.get(
            report["likeliest"], "the model is odd (untrained, or tuned on other labels)")
        lines.append("  nats per token at offset 0, 1, 2: {nll[0]:.2f}, {nll[1]:.2f}, {nll[2]:.2f}; " + said)
    shown = [f"  targets in [[ ]]: {text[-200:]!r}" for text in report["shown"]]
    return "\n".join([line.format(**report | share) for line in lines] + shown)


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
        loader = others["train_dataloader"]
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
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
    """Rows of a CSV or JSONL file as chat turns, labels on the answers."""
    examples = []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file) if path.endswith(".csv") else map(json.loads, file):
            turns = [{"role": "user", "content": row[prompt]}, {"role": "assistant", "content": row[answer]}]
            before, ids = (tokenizer.apply_chat_template(said, add_generation_prompt=said != turns,
                                                         return_dict=False) for said in (turns[:1], turns))
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
            tokenizer.chat_template = tokenizer.chat_template or PLAIN
            rows = _encode_file(options.data, tokenizer, options.prompt_column, options.answer_column)
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"audit: {type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
    if options.data:
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
        report = audit_batches(rows, collator, tokenizer, model)
        print(describe(report))
    else:
        report = audit_loss(model, probe_batch(model))
        print("\n".join(f"{name}: {value}" for name, value in report.items()))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
