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
import inspect
import json
import math
import re
import sys
from collections import defaultdict
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import groupby, islice, takewhile
from types import SimpleNamespace

import torch
import transformers
from torch.nn.functional import cross_entropy, pad

IGNORE = -100
OFFSETS = (1, 0, 2, -1, 3)  # the first one wins where a row repeats a token
PLAIN = ("{% for turn in messages %}{{ '\n' if turn.role == 'assistant' }}{{ turn.content }}"
         "{{ eos_token if turn.role == 'assistant' }}{% endfor %}{{ '\n' if add_generation_prompt }}")
WORDS = {  # what the other names do not say by themselves
    "copy": "position t is trained on the token it has just read",
    "double_shift": "labels are shifted twice, position t is trained on token t + 2",
    "no_constant_offset": "targets are not their row's tokens at one offset",
    "num_items_ignored": "micro-batches are not weighted by their tokens",
    "no_eos": "the end of an answer is never a target",
    "eos_mismatch": "the model does not stop at the tokenizer's EOS",
}


def audit_loss(model, batch, compute_loss=None) -> dict:
    """Which token is each position's prediction compared with, and with what weight?

    Args: a collator's batch (input_ids (B, T) or an encoder's input, labels, what else the model takes); a
        Trainer's method compute_loss, by default the model's own loss.
    Returns: offset, constant (every supervised position has it), supervises_padding, ignores_minus_100,
        normalisation ("tokens", "rows", "sum"), honours_num_items, leaks_across_rows (an example learns from
        another, or attends to it), faults, verdict. None: it cannot be told.
    """
    return _Loss(model, batch, compute_loss).judge()


class _Loss:
    """The loss of one batch and of variants of it, read as a target and a weight for each position."""

    def __init__(self, model, batch, compute_loss):
        self.model = model
        self.compute_loss = compute_loss or (lambda model, batch, **items: model(**batch, **items).loss)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        takes = inspect.signature(self.base.forward).parameters
        self.batch = {"use_cache": False} if "use_cache" in takes else {}  # a cache hides position_ids
        self.batch |= {key: value.to(model.device) if torch.is_tensor(value) else value
                       for key, value in batch.items()}
        self.key = "shift_labels" if "shift_labels" in batch else "labels"
        self.labels, self.ids = self.batch[self.key], self.batch.get("input_ids")
        self.decoder_only = self.ids is not None and "decoder_input_ids" not in takes
        self.documents = _number_documents(self.batch if self.decoder_only else {}, self.labels)

    def read(self, changes=(), **items) -> SimpleNamespace:
        """loss, (B, T) targets and weights, (B, T, V) logits; embedded: what embeddings were given."""
        head, logits, gradient = self.base.get_output_embeddings(), [], None
        seen = SimpleNamespace(embedded=[], weights=None, targets=torch.full_like(self.labels, IGNORE))

        def level(_module, _inputs, output):  # all tokens equally likely: no gradient vanishes
            logits.extend((output.detach(), torch.zeros_like(output).requires_grad_()))
            return logits[1].clone()  # some models change logits in place

        with ExitStack() as hooks:
            for module in self.base.modules():
                if isinstance(module, torch.nn.Embedding):
                    hooks.enter_context(module.register_forward_pre_hook(
                        lambda _, inputs: seen.embedded.extend(inputs[:1])))
                elif module is head and isinstance(head, torch.nn.Linear):
                    hooks.enter_context(module.register_forward_hook(level))
            loss = self.compute_loss(self.model, {**self.batch, **dict(changes)}, **items)
        seen.loss = None if loss is None else loss.item()
        if loss is not None and len(logits) == 2 and logits[0].ndim == 3:
            gradient, = torch.autograd.grad(loss, logits[1], allow_unused=True)
        if gradient is not None:
            ahead = (0, 0, self.labels.shape[1] - gradient.shape[1], 0)  # an image's positions come before
            seen.weights, targets = (-pad(gradient.float(), ahead)).max(-1)
            idle = seen.weights <= 1e-4 * seen.weights.max().clamp(min=1e-12)
            seen.targets, seen.logits = targets.masked_fill(idle, IGNORE), pad(logits[0].float(), ahead)
        return seen

    @torch.no_grad()
    def change_labels(self) -> tuple:
        """(targets, logits) of hidden logits: whose log-probability is the loss of one label alone?"""
        targets, places = torch.full_like(self.labels, IGNORE), (self.labels != IGNORE).nonzero().tolist()
        inputs = {key: value for key, value in self.batch.items() if "labels" not in key}
        logs = self.model(**inputs).logits.float().log_softmax(-1)
        for row, place in places[::len(places) // 12 + 1]:
            misfit = 0
            for step in (0, 1, 7):
                alone = torch.full_like(self.labels, IGNORE)
                alone[row, place] = token = (int(self.labels[row, place]) + step) % logs.shape[-1]
                loss = self.compute_loss(self.model, {**self.batch, self.key: alone})
                misfit = misfit + (loss + logs[..., token]).abs()
            if misfit.min() < 0.3:
                targets[divmod(int(misfit.argmin()), misfit.shape[1])] = self.labels[row, place]
        return targets, logs

    def judge(self) -> dict:
        """The report of `audit_loss`; `seen` keeps what was read."""
        report = dict.fromkeys(("offset", "constant", "supervises_padding", "ignores_minus_100",
                                "normalisation", "honours_num_items", "leaks_across_rows"))
        with ExitStack() as after:
            after.callback(self.model.train, self.model.training)
            after.enter_context(getattr(self.model, "disable_adapter", nullcontext)())
            self.model.eval()
            self.seen = seen = self.read()
            if seen.loss is not None and seen.weights is None:
                seen.targets, seen.logits = self.change_labels()
            labelled, learns = (self.labels != IGNORE).any(), (seen.targets != IGNORE).any()
            if learns:
                report |= self.place() | self.probe()
        checks = {"no_loss": seen.loss is None, "no_supervised_tokens": not labelled,
                  "not_cross_entropy": labelled and not learns and seen.loss is not None,
                  "no_constant_offset": report["constant"] is False,
                  "padding_supervised": report["supervises_padding"],
                  "leaks_across_rows": report["leaks_across_rows"],
                  "minus_100_supervised": report["ignores_minus_100"] is False,
                  "weighted_by_rows": report["normalisation"] == "rows"}
        return report | _conclude([name for name, fault in checks.items() if fault],
                                  report["offset"] if report["constant"] else 1)

    def place(self) -> dict:
        """Which places do targets come from? Counted from what the decoder's embedding has read."""
        targets, encoder = self.seen.targets, None if self.decoder_only else self.ids
        read = [ids for ids in ([self.ids] if self.decoder_only else self.seen.embedded)
                if torch.is_tensor(ids) and ids.shape == targets.shape
                and (encoder is None or not torch.equal(ids, encoder))]
        if not read:
            return {}
        share, offset = max((_find_offset(targets, ids) for ids in read), key=lambda found: found[0])
        padding = pad(self.documents, (-offset, offset)) < 0
        return {"offset": offset, "constant": share > 0.99,
                "supervises_padding": share > 0.99 and bool((targets != IGNORE)[padding].any())}

    def probe(self) -> dict:
        """What changes with num_items_in_batch; with fewer labels and other ids in every second document?"""
        seen, found, learns = self.seen, {"honours_num_items": False}, self.labels != IGNORE
        with suppress(TypeError):  # forward has no such argument
            loss = self.read(num_items_in_batch=10 * learns.sum()).loss
            found["honours_num_items"] = loss < 0.5 * seen.loss
        if seen.weights is None:
            return found
        word, leaks = int(self.labels[learns][-1]), []
        for parity in (1, 0):
            moved = learns & (self.documents % 2 == parity)
            fewer = moved & (learns.cumsum(1) % 3 == 0)
            changes = {self.key: self.labels.masked_fill(moved, word).masked_fill(fewer, IGNORE)}
            if self.decoder_only:
                changes["input_ids"] = self.ids.masked_fill(moved, word)
            other, others = self.read(changes), (self.documents % 2 != parity) & (self.documents >= 0)
            moves = (other.logits - seen.logits)[others].abs() > 0.05 * seen.logits.std()
            leaks += [bool(moves.any() or (other.targets != seen.targets)[others].any())]
        if self.documents.max() > 0:
            found["leaks_across_rows"] = any(leaks)
        kept = other.targets != IGNORE
        found["ignores_minus_100"] = bool((seen.targets != IGNORE).sum() - kept.sum() == fewer.sum())
        weights, owners = other.weights[kept], self.documents[kept]
        rows = torch.stack([weights[owners == owner].sum() for owner in owners.unique()])
        if weights.max() < 1.02 * weights.min():
            found["normalisation"] = "tokens" if other.loss > 0.98 * seen.loss else "sum"
        elif rows.max() < 1.02 * rows.min():
            found["normalisation"] = "rows"
        return found


def _find_offset(targets, ids, offsets=OFFSETS) -> tuple[float, int]:
    """(share, offset): the offset at which the largest share of the targets are their row's ids."""
    aheads = [pad(ids, (-offset, offset), value=-1) for offset in offsets]
    shares = [(ahead == targets)[(targets != IGNORE) & (ahead >= 0)].float().mean().nan_to_num().item()
              for ahead in aheads]
    return max(zip(shares, offsets, strict=True), key=lambda found: found[0])


def _number_documents(batch, ids) -> torch.Tensor:
    """(B, T) number of the document of each place, -1 for padding: a row is one, or what position_ids say."""
    inside, positions = batch.get("attention_mask", torch.ones_like(ids)) != 0, batch.get("position_ids")
    starts = torch.zeros_like(ids)
    if positions is not None and positions.shape == ids.shape:
        starts[:, 1:] = (positions[:, 1:] == 0) & inside[:, 1:] & inside[:, :-1]
    starts[:, 0] = 1
    return (starts.flatten().cumsum(0) - 1).view_as(ids).masked_fill(~inside, -1)


def _conclude(faults: list[str], offset: int = 1) -> dict:
    names = [] if offset == 1 else [{0: "copy", 2: "double_shift"}.get(offset, f"offset_{offset}")]
    faults = list(dict.fromkeys(names + faults))
    words = [name.replace("_", " ") + (f" ({WORDS[name]})" if name in WORDS else "") for name in faults]
    return {"faults": faults, "verdict": f"FAULT: {'; '.join(words)}" if faults else "correct"}


def audit_batches(dataset, collator, tokenizer, model=None, response=None, rows=256, compute_loss=None):
    """What is supervised in what the collator makes of a data set; with a model, what its loss makes of that.

    Args: examples as the collator takes them (`rows` of them are counted, 4 go through the model); response,
        the text before each answer, by default the chat template's: without either prompts are unknown.
    Returns: rows, offset; shares (None: unknown) of tokens (prompt_share, answer_share, padding_share), turns
        (turns_share) and rows (rows_supervised, rows_with_eos, rows_cut, eos_share: EOS is a target,
        double_bos, special_tokens_as_text); by_source; shown (three rows, targets in [[ ]]); faults, verdict.
        With a model: loss (`audit_loss`), nll (nats per token by offset: a pretrained model knows),
        chance_nll, likeliest (None: it cannot tell).
    """
    report, faults = _count(*_collate(dataset, collator, rows), tokenizer, response)
    if model is None or {"ignore_index", "no_supervised_tokens"} & {*faults}:
        return report | _conclude(faults, report["offset"])
    loss = _Loss(model, _collate(dataset, collator, 4)[0], compute_loss)
    report["loss"] = loss.judge()
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if stops is not None and tokenizer.eos_token_id not in (stops if isinstance(stops, list) else [stops]):
        faults.append("eos_mismatch")
    if (offset := report["loss"]["offset"]) is not None:
        report |= {"offset": offset, **_likelihood(loss.seen.targets, loss.seen.logits)}
    return report | _conclude(report["loss"]["faults"] + faults)


def _collate(dataset, collator, count: int) -> tuple[dict, list[dict]]:
    """(batch, rows) of rows from all parts of a data set, or of the first ones of a stream."""
    size = min(count, len(dataset)) if hasattr(dataset, "__len__") else 0
    rows = [dataset[i * len(dataset) // size] for i in range(size)] or [*islice(dataset, count)]
    return collator([{name: value for name, value in row.items() if not isinstance(value, str)}
                     for row in rows]), rows  # collators cannot make tensors of text


def _likelihood(targets, logits) -> dict:
    row, place = (targets[:, 1:-1] != IGNORE).nonzero(as_tuple=True)
    wanted, chance = targets[row, place + 1], math.log(logits.shape[-1])
    nll = {k: float(cross_entropy(logits[row, place + k], wanted)) for k in (0, 1, 2)}
    best, second, _ = sorted(nll, key=nll.get)
    tells = min(nll[second], chance) - nll[best] >= 1
    return {"nll": nll, "chance_nll": chance, "likeliest": best if tells else None}


def _count(batch, rows, tokenizer, response) -> tuple[dict, list[str]]:
    """`audit_batches` without a model: (report, faults)."""
    shifted = batch.get("shift_labels") is not None
    labels, ids = batch["shift_labels" if shifted else "labels"], batch.get("input_ids")
    if ids is None or ids.shape != labels.shape:  # the labels are what the decoder reads
        batch, ids = {"attention_mask": labels != IGNORE}, labels.masked_fill(labels == IGNORE, 0)
    documents = _number_documents(batch, ids)
    number = int(documents.max()) + 1
    faults = ["packed_without_positions"] if number < len(rows) and len(ids) < len(rows) else []
    inner = labels.masked_fill(documents < 0, IGNORE)
    _, shift = _find_offset(inner, ids, (1, 0, 2) if shifted else (0, 1, 2, -1))
    ahead = pad(ids, (-shift, shift), value=-1)
    strange = inner[(inner != IGNORE) & (ahead >= 0) & (inner != ahead)]
    if len(strange) > 0.01 * (inner != IGNORE).sum():
        faults.append("no_constant_offset" if len(strange.unique()) > 1 else "ignore_index")
        labels = labels.masked_fill(labels == strange[0], IGNORE)
    taken = pad(labels, (shift, -shift), value=IGNORE) != IGNORE  # at the place that a target is taken from
    answers, found = _find_answers(tokenizer, response), defaultdict(lambda: defaultdict(list))
    for place in range(number):
        here, source = documents == place, rows[place].get("source") if number == len(rows) else None
        document = _read_document(ids[here].tolist(), taken[here].tolist(), tokenizer, *answers)
        for group, name in ((group, name) for group in {None, source} for name in document):
            found[group][name] += document[name]
    found[None]["padding_share"] = taken[documents < 0].tolist()
    shares = {group: {name: sum(values) / len(values) if values else None for name, values in lists.items()
                      if name not in ("cut", "shown")} for group, lists in found.items()}
    report, cut = shares.pop(None), found[None]["cut"]
    missing = len({*cut}) > 1  # rows without EOS that were cut have one length
    partly = {name for name, value in report.items() if 0 < (value or 0) < 1}
    rows, ends, eos = (report[name] or 0 for name in ("rows_supervised", "rows_with_eos", "eos_share"))
    checks = {"no_supervised_tokens": not rows, "rows_without_supervised_tokens": "rows_supervised" in partly}
    for part in ("prompt", "padding"):
        checks |= {f"{part}_supervised": report[f"{part}_share"] == 1,
                   f"{part}_partly_supervised": f"{part}_share" in partly}
    checks |= {"turns_unsupervised": "turns_share" in partly and rows == 1,
               "answer_partly_supervised": "answer_share" in partly and report["turns_share"] == 1,
               "no_eos": not eos and (ends or missing), "eos_missing": eos and missing,
               "eos_partly_supervised": 0 < eos < ends,
               "double_bos": report["double_bos"], "special_tokens_as_text": report["special_tokens_as_text"]}
    report |= {"rows": number, "offset": shift + (not shifted), "rows_cut": (not missing) * len(cut) / number,
               "by_source": shares, "shown": found[None]["shown"][:3]}
    return report, faults + [name for name, fault in checks.items() if fault]


def _find_answers(tokenizer, response) -> tuple[list[int], set[int]]:
    """The ids in front of every answer, whatever the prompt ends with, and those that end one."""
    ends, said = {tokenizer.eos_token_id}, [{"role": "user", "content": "hello"}]
    encode = partial(tokenizer, add_special_tokens=False)
    if response is None and getattr(tokenizer, "chat_template", None):
        show = partial(tokenizer.apply_chat_template, tokenize=False)
        response = show(said, add_generation_prompt=True)[len(show(said)):]
        after = show([*said, {"role": "assistant", "content": "world"}]).rpartition("world")[2]
        ends |= {*encode(after)["input_ids"][:1]} & {*tokenizer.all_special_ids}
    rows = encode([text + (response or "") for text in ("Is a", "Is it b?", "c.\n")])["input_ids"]
    same = takewhile(lambda ids: len({*ids}) == 1, zip(*(ids[::-1] for ids in rows), strict=False))
    return [ids[0] for ids in same][::-1], ends


def _read_document(ids: list[int], taken: list[bool], tokenizer, response: list[int], ends: set[int]) -> dict:
    """By name in the report, a list: is each token, turn or the document so?"""
    spans = [(0, len(ids), len(ids))]  # of each turn, and with the blanks behind it, which are no prompt
    if response:  # ids as characters: a turn follows the response's, up to an end
        blank = [token for token in {*ids} if not tokenizer.decode([token]).strip()]
        marker, end, space = (re.escape("".join(map(chr, some)))
                              for some in (response, ends, [*blank, 0x10FFFF]))
        turns = re.finditer(f"(?<={marker})([^{end}]*[{end}]?)[{space}]*", "".join(map(chr, ids)))
        spans = [(*turn.span(1), turn.end()) for turn in turns if turn[1]]
    known = {*range(1, len(ids))} if response and spans else set()  # nothing predicts the first token
    prompt = known.difference(*(range(start, after) for start, _, after in spans))
    answer = [place for start, stop, _ in spans for place in range(start, stop) if ids[place] not in ends]
    last = spans[-1][1] - 1 if spans else len(ids) - 1
    ended, learns, text = ids[last] in ends, any(taken), tokenizer.decode(ids, skip_special_tokens=True)
    shown = [("[[{}]]" if kept else "{}").format(tokenizer.decode([token for _, token in run]))
             for kept, run in groupby(zip(taken, ids, strict=True), key=lambda token: token[0])]
    return {"prompt_share": [taken[place] for place in prompt],
            "answer_share": [taken[place] for place in answer if place in known],
            "turns_share": [any(taken[start:stop]) for start, stop, _ in spans],
            "rows_supervised": [learns], "eos_share": [ended and taken[last]] * learns,
            "rows_with_eos": [ended] * learns, "cut": [len(ids)] * (learns and not ended),
            "double_bos": [ids[:2] == [tokenizer.bos_token_id] * 2], "shown": ["".join(shown)],
            "special_tokens_as_text": [any(token in text for token in tokenizer.all_special_tokens)]}


def describe(report: dict) -> str:
    """An `audit_batches` report in about ten lines."""
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
    shares = {name: "unknown" if value is None else f"{value:.1%}" for name, value in report.items()
              if name.endswith("_share") or name == "rows_with_eos"}
    shown = [f"  targets in [[ ]]: {text[-200:]!r}" for text in report["shown"]]
    return "\n".join([line.format(**report | shares) for line in lines] + shown)


class AuditError(ValueError):
    """The faults found are not those declared; `faults` lists them."""

    def __init__(self, faults, verdict, declared):
        self.faults = faults
        super().__init__(f"The label audit found {verdict}; declared: {', '.join(declared) or 'nothing'}. "
                         "Correct data set, collator or loss, or declare what is meant.")


class AuditCallback(transformers.TrainerCallback):
    """Audits rows of a run as the Trainer will see them, prints ten lines, and stops on an undeclared fault.

    With the trainer its compute_loss is audited, without it the model's own loss. `declared`: faults that are
    meant, for example ("prompt_supervised",).
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
            print(describe(report), f"  faults declared: {', '.join(self.declared) or 'none'}", sep="\n")
        if set(report["faults"]) != set(self.declared):
            raise AuditError(report["faults"], report["verdict"], self.declared)


def probe_batch(model, rows: int = 3, tokens: int = 12) -> dict:
    """Random ids of unequal length: input_ids, attention_mask and labels, (rows, tokens)."""
    chance = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(min(10, vocabulary // 2), vocabulary, (rows, tokens), generator=chance)
    labels = ids.clone()
    labels[1:2, -3:] = IGNORE
    return {"input_ids": ids, "attention_mask": (labels != IGNORE).long(), "labels": labels}


def _encode_file(path: str, tokenizer, prompt: str, answer: str) -> list[dict]:
    """Rows of a CSV or JSONL file as chat turns, labels on the answers."""
    encode, examples = partial(tokenizer.apply_chat_template, return_dict=False), []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file) if path.endswith(".csv") else map(json.loads, file):
            asked = [{"role": "user", "content": row[prompt]}]
            before = len(encode(asked, add_generation_prompt=True))
            ids = encode([*asked, {"role": "assistant", "content": row[answer]}])
            examples.append({"input_ids": ids, "labels": [IGNORE] * before + ids[before:]})
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
        config = transformers.AutoConfig.from_pretrained(options.model)
        kind = getattr(transformers, config.architectures[0])
        try:
            model = kind.from_pretrained(options.model)
        except OSError:  # there are no weights: random ones tell the same
            model = kind(config)
        if options.data:
            tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            tokenizer.chat_template = tokenizer.chat_template or PLAIN
            rows = _encode_file(options.data, tokenizer, options.prompt_column, options.answer_column)
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"audit: {type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
    if options.data:
        report = audit_batches(rows, transformers.DataCollatorForSeq2Seq(tokenizer), tokenizer, model)
        print(describe(report))
    else:
        report = audit_loss(model, probe_batch(model))
        print("\n".join(f"{name}: {value}" for name, value in report.items()))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
