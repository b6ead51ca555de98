"""Are the labels where the loss expects them? Asked of the batch, of the loss and of the untuned model, before a run starts.

The loss compares position t with a target; the target's offset is how far ahead it was taken from: 0 copies the token just
read, +1 is the next token (right), +2 the one after it (labels shifted by hand and again by the model). There are two kinds
of evidence, gathered on what the collator gives and the loss uses, so that a shift is found wherever it was made:

- structure: at which offset do the targets equal the input ids;
- likelihood: which position's prediction finds the targets likeliest. A pretrained model knows at once, a random one cannot.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy, pad

from medqa_lib.config import POLICIES
from medqa_lib.labels import IGNORE_INDEX, PaddingCollator
from medqa_lib.loss_check import forward_logits, loss_targets, loss_tolerance, to_device
from medqa_lib.prompts import encode_prompt

OFFSETS = (0, 1, 2)
# Likelihood decides if the best offset beats the second best and chance, log V, by so many nats a token.
# SmolLM2-135M on medical answers: 8 and 8; random weights: 0.01 and 0.
MIN_MARGIN_NATS = 1.0


def audit_alignment(model, tokenizer, examples, collator=None, rows: int = 256, scored_rows: int = 8) -> dict:
    """Which label policy do these examples follow once collator and loss have had their say?

    Args:
        model: the model that will be trained; an adapter on it is switched off, since a tuned model may have learnt the shift.
        examples: list or Dataset with input_ids, labels and, if it is there, source; rows evenly spread over it are used.
        collator: what the Trainer will use, padded or flattened; by default `PaddingCollator(tokenizer)`.
        rows: examples that are counted; `scored_rows` of them also go through the model.
    Returns:
        policy (one of `config.POLICIES`, or None if none fits), verdict (in words), offset, structure and nll (dicts by offset:
        share of targets, nats a token), chance_nll, likelihood_can_tell, the shares supervised_share, prompt_, answer_, padding_ and
        eos_supervised_share (of all rows: one that was cut has no EOS, so aligned labels reach eos_share, the share of rows with one),
        eos_supervised_by_source, all_cut (no row has an EOS and all have one length, as rows cut mid-answer do), rows.
    Raises:
        ValueError: a batch has no usable labels, or its loss is no cross-entropy over them.
    """
    collator = collator or PaddingCollator(tokenizer)
    chosen = _spread(examples, rows)
    nll, shifts_labels = _score_offsets(model, _spread(chosen, scored_rows), collator, tokenizer.eos_token_id)
    report = _count_targets(tokenizer, chosen, collator, shifts_labels)
    best, second = sorted(nll.values())[:2]
    chance = math.log(model.config.vocab_size)
    report |= {"nll": nll, "chance_nll": chance, "likelihood_can_tell": min(second, chance) - best >= MIN_MARGIN_NATS}
    report["policy"], report["verdict"] = _judge(report)
    return report


def require_policy(report: dict, policy: str) -> None:
    """Stop unless the audit found the declared policy.

    Raises:
        ValueError: it found another one; the message gives both and the audit's verdict.
    """
    if report["policy"] != policy:
        raise ValueError(f"The experiment declares labels {policy!r}, but the audit found {report['policy']!r}: {report['verdict']}. "
                         "Check the policy that the data set was encoded with, the collator, and who shifts the labels.")


def _spread(examples, count: int) -> list[dict]:
    """At most count examples, evenly spread, so that sources which follow each other all occur."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _batches(examples: list[dict], collator, size: int):
    for start in range(0, len(examples), size):
        part = examples[start:start + size]
        yield part, collator([{name: example[name] for name in ("input_ids", "labels")} for example in part])


def _spans(batch: dict, examples: list[dict], eos_token_id: int) -> list[tuple[int, int, int]]:
    """(row, start, stop) of each example in the batch: a row of its own, or one after the other in one flattened row.

    An example ends at its EOS, if it has one; what a row holds behind that is padding.
    """
    spans, start = [], 0
    padded = len(batch["input_ids"]) == len(examples)
    for row, example in enumerate(examples):
        ids = list(example["input_ids"])
        row, start = (row, 0) if padded else (0, start)
        if batch["input_ids"][row, start:start + len(ids)].tolist() != ids:
            raise ValueError("The collator changed the input ids or their order; the audit expects padded rows or one flattened row.")
        spans.append((row, start, start + (ids.index(eos_token_id) + 1 if eos_token_id in ids else len(ids))))
        start += len(ids)
    return spans


def _inner_positions(targets: torch.Tensor, spans: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, positions) of supervised positions t with t - 1 to t + 2 in the same example: there every offset can be judged."""
    inner = torch.zeros_like(targets, dtype=torch.bool)
    for row, start, stop in spans:
        inner[row, start + 1:max(start + 1, stop - 2)] = True
    return (inner & (targets != IGNORE_INDEX)).nonzero(as_tuple=True)


@torch.no_grad()
def _score_offsets(model, examples: list[dict], collator, eos_token_id: int) -> tuple[dict[int, float], bool]:
    """Mean negative log-likelihood of the targets at each offset, and whether the model shifts `labels` itself."""
    sums, count, shifts = dict.fromkeys(OFFSETS, 0.0), 0, True
    training = model.training
    model.eval()
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        for part, batch in _batches(examples, collator, 4):
            batch = to_device(batch, model.device)
            output = model(**batch, use_cache=False)
            whole = output.logits is not None and output.logits.shape[:-1] == batch["input_ids"].shape
            logits = output.logits if whole else forward_logits(model, batch)  # (B, T, V)
            shifts = _does_model_shift(output.loss, batch, logits)
            targets = loss_targets(batch, shifts)
            row, position = _inner_positions(targets, _spans(batch, part, eos_token_id))
            for offset in OFFSETS:  # a target taken from t + k is best predicted at position t + k - 1
                sums[offset] += float(cross_entropy(logits[row, position + offset - 1].float(), targets[row, position], reduction="sum"))
            count += len(row)
    model.train(training)
    if not count:
        raise ValueError(f"None of {len(examples)} examples has a supervised token to judge by; expected labels other than {IGNORE_INDEX}.")
    return {offset: total / count for offset, total in sums.items()}, shifts


def _does_model_shift(loss: torch.Tensor, batch: dict, logits: torch.Tensor) -> bool:
    """True if the model's own loss is the cross-entropy over shifted `labels`, False if over `labels` as they are."""
    expected = {}
    for shifts in (True, False):
        targets = loss_targets(batch, shifts)
        expected[shifts] = float(cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX))
        if abs(float(loss) - expected[shifts]) <= loss_tolerance(logits.dtype):
            return shifts
    raise ValueError(f"The model's loss on a batch is {float(loss):.5f}; the cross-entropy over its labels is {expected[True]:.5f} if they "
                     f"are shifted inside and {expected[False]:.5f} if not. The loss is computed from something else.")


def _count_targets(tokenizer, examples: list[dict], collator, shifts_labels: bool) -> dict:
    """The offset at which targets equal input ids, and which tokens are targets at all."""
    batches = [(batch, part, _spans(batch, part, tokenizer.eos_token_id), loss_targets(batch, shifts_labels))
               for part, batch in _batches(examples, collator, 32)]
    matches, judged = dict.fromkeys(OFFSETS, 0), 0
    for batch, _, spans, targets in batches:
        row, position = _inner_positions(targets, spans)
        judged += len(row)
        for offset in OFFSETS:
            matches[offset] += int((batch["input_ids"][row, position + offset] == targets[row, position]).sum())
    structure = {offset: count / max(1, judged) for offset, count in matches.items()}
    offset = max(structure, key=structure.get)
    offset = offset if structure[offset] > 0.99 else None
    counts = _count_supervised(tokenizer, batches, 1 if offset is None else offset)
    shares = {name: supervised / max(1, total) for name, (supervised, total) in counts.items()}
    return {"rows": len(examples), "structure": structure, "offset": offset, "supervised_share": shares["all"],
            **{f"{part}_supervised_share": shares.get(part, 0.0) for part in ("prompt", "answer", "padding", "eos")},
            "eos_share": shares["has eos"],
            "all_cut": not shares["has eos"] and len({len(example["input_ids"]) for example in examples}) == 1,
            "eos_supervised_by_source": {name[4:]: share for name, share in sorted(shares.items()) if name.startswith("eos ")}}


def _count_supervised(tokenizer, batches: list[tuple], offset: int) -> dict[str, list[int]]:
    """[supervised, all] tokens of prompt (without its first), answer, padding and all; rows for "eos" and "eos SOURCE".

    "has eos" is [rows with an EOS, all rows].
    """
    counts = defaultdict(lambda: [0, 0])
    marker = _response_marker(tokenizer)
    for _, examples, spans, targets in batches:
        # Each target marked at the place that it was taken from, `offset` to the right of the position that learns it.
        supervised = pad(targets != IGNORE_INDEX, (offset, 0))[:, :targets.shape[1]]
        padding = torch.ones_like(supervised)
        for example, (row, start, stop) in zip(examples, spans, strict=True):
            padding[row, start:stop] = False
            answer = start + _prompt_length(example["input_ids"], marker)
            has_eos = tokenizer.eos_token_id in example["input_ids"][answer - start:]
            areas = {"prompt": slice(start + 1, answer), "answer": slice(answer, stop - has_eos), "all": slice(start, stop)}
            for name, area in areas.items():
                counts[name][0] += int(supervised[row, area].sum())
                counts[name][1] += area.stop - area.start
            for name in ("eos", f"eos {example.get('source') or 'all'}"):
                counts[name][0] += int(has_eos and supervised[row, stop - 1])
                counts[name][1] += 1
            counts["has eos"][0] += has_eos
            counts["has eos"][1] += 1
        counts["padding"][0] += int((supervised & padding).sum())
        counts["padding"][1] += int(padding.sum())
    return counts


def _response_marker(tokenizer) -> list[int]:
    """The ids that every prompt ends with, whatever character the question ends with."""
    prompts = [encode_prompt(tokenizer, question)[::-1] for question in ("What is a", "Is it b?", "Say c.")]
    same = 0
    while len({prompt[same] for prompt in prompts}) == 1:
        same += 1
    return prompts[0][:same][::-1]


def _prompt_length(ids: list[int], marker: list[int]) -> int:
    for end in range(len(marker), len(ids) + 1):
        if ids[end - len(marker):end] == marker:
            return end
    raise ValueError(f"An example of {len(ids)} tokens does not contain the end of the prompt; encode it with labels.encode_example.")


def _judge(report: dict) -> tuple[str | None, str]:
    """(policy or None, verdict in words) from both kinds of evidence."""
    policy, words = _name_policy(report)
    nll, offset = report["nll"], report["offset"]
    nats = ", ".join(f"{value:.2f} at {key:+d}" for key, value in nll.items())
    if not report["likelihood_can_tell"]:
        return policy, f"cannot tell from likelihood ({nats}; chance {report['chance_nll']:.2f} nats); structurally {words}"
    likeliest = min(nll, key=nll.get)
    if offset != likeliest:
        return None, f"contradictory: {words}, but the model finds the targets likeliest at offset {likeliest:+d} ({nats} nats)"
    return policy, f"{words}; the model's likelihood agrees ({nats} nats)"


def _name_policy(report: dict) -> tuple[str | None, str]:
    """(policy or None, words) from the structure alone."""
    offset = report["offset"]
    prompt, answer, padding, eos = (report[f"{part}_supervised_share"] for part in ("prompt", "answer", "padding", "eos"))
    if offset is None:
        return None, "no constant offset: labels and input ids do not belong together"
    if offset == 0:
        return None, "copying: position t learns the token it has just read, as if `shift_labels` held unshifted labels"
    found = {}  # name -> words; a name that is no policy, or two of them, are no policy together
    if offset == 2:
        found["preshifted"] = "double shift: position t learns token t + 2"
    if prompt:
        found["full_sequence" if prompt == 1 else "prompt in part"] = f"full sequence: {prompt:.1%} of the prompt is supervised"
    if padding:
        found["padding_supervised" if padding == 1 else "padding in part"] = f"padding supervised: {padding:.1%} of it is a target"
    if not eos and not report["all_cut"]:
        found["no_eos"] = "no EOS: the end of an answer is never a target"
    elif eos < report["eos_share"]:  # not 1: a row cut mid-answer rightly has none
        found["EOS in part"] = f"EOS in part: a target in only {eos / report['eos_share']:.1%} of the rows that have one"
    if answer < 1:
        found["answer in part"] = f"only {answer:.1%} of the answers' tokens are supervised"
    if not found:
        found["aligned"] = f"aligned: position t learns token t + 1, on the answer{'' if report['all_cut'] else ' and its EOS'} only"
    words = ", and ".join(found.values())
    if report["all_cut"]:
        words += " (every row is cut and has no EOS, so whether EOS would be a target cannot be told)"
    policy = next(iter(found)) if len(found) == 1 else None
    return policy if policy in POLICIES else None, words
