"""Label policies: which tokens the loss sees, and who shifts them.

The target of position t is token t + 1. `LlamaForCausalLM` does that shift inside its loss, so labels must be
aligned with the input ids. Labels shifted beforehand are shifted twice: position t learns token t + 2.
`audit_policy` finds that before a run starts.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from medqa_lib.config import POLICIES
from medqa_lib.prompts import TEMPLATE, escape_special_tokens, format_prompt, strip_eos

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

RESPONSE = TEMPLATE.partition("{question}")[2]  # what stands in front of every answer
IGNORE_INDEX = -100  # what the loss leaves out: torch's default
TRUNCATIONS = ("sentence", "cut", "drop")
UNUSABLE = {
    "empty": "the question or the answer is empty",
    "prompt_too_long": "the prompt alone fills max_length",
    "dropped_too_long": "it is longer than max_length and truncation is 'drop'",
    "prompt_not_prefix": "the prompt's ids are not a prefix of the example's ids",
    "control_token": "its text still holds a control token; prompts.escape_special_tokens must learn it",
}
# The end of a sentence, followed by white space. Not "1." of a list, and not the commonest abbreviations.
_SENTENCE_END = re.compile(r"(?<!\s\d)(?<!\s\d\d)(?<!\bDr)(?<!\bvs)(?<!e\.g)(?<!i\.e)[.!?][\"')\]]*(?=\s)")
_BATCH_ROWS = 1000


def label_ids(input_ids: list[int], prompt_tokens: int, policy: str = "aligned",
              eos_token_id: int | None = None) -> list[int]:
    """Labels of one unpadded example, as long as the example.

    The policy `padding_supervised` differs from `aligned` in the collator only.

    Raises:
        ValueError: unknown policy, or no answer token is left.
    Example:
        >>> label_ids([1, 5, 6, 7, 2], prompt_tokens=3)
        [-100, -100, -100, 7, 2]
        >>> label_ids([1, 5, 6, 7, 2], prompt_tokens=3, policy="preshifted")
        [-100, -100, 7, 2, -100]
    """
    if policy not in POLICIES:
        raise ValueError(f"Unknown label policy {policy!r}; expected one of {', '.join(POLICIES)}.")
    if not 0 < prompt_tokens < len(input_ids):
        raise ValueError(f"No answer token is left: {prompt_tokens} prompt tokens of {len(input_ids)}. "
                         "Raise max_length.")
    if policy == "full_sequence":
        return list(input_ids)
    labels = [IGNORE_INDEX] * prompt_tokens + input_ids[prompt_tokens:]
    if policy == "preshifted":
        return labels[1:] + [IGNORE_INDEX]
    if policy == "no_eos" and labels[-1] == eos_token_id:
        labels[-1] = IGNORE_INDEX
    return labels


def make_collator(tokenizer: PreTrainedTokenizerBase, policy: str = "aligned",
                  max_length: int | None = None) -> DataCollatorForSeq2Seq:
    """transformers' collator: input_ids, attention_mask and labels, (B, T) each, padded on the right.

    Padding is labelled by its position, not by its id: the pad token often is EOS, which is to be learned.
    """
    from transformers import DataCollatorForSeq2Seq

    if policy == "padding_supervised":
        return DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=max_length,
                                      label_pad_token_id=tokenizer.eos_token_id)
    return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, label_pad_token_id=IGNORE_INDEX)


def encode_example(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, max_length: int,
                   policy: str = "aligned", truncation: str = "sentence") -> dict[str, list[int]]:
    """Prompt, answer and EOS as {"input_ids", "labels"}: lists of at most max_length ids, unpadded.

    Prompt and answer are tokenised together: apart, a Llama tokenizer would put a space before the answer.
    Truncation: `cut` ends mid-answer without EOS, `drop` refuses the row, `sentence` ends with EOS after the
    last sentence that fits. If not even the first one fits, it does as `cut`: EOS would teach to stop there.

    Raises:
        ValueError: unknown policy or truncation, or the row cannot be used; the message says why.
    """
    (ids, prompt_tokens, outcome), = _encode_batch(tokenizer, [question], [answer], max_length, truncation)
    if outcome in UNUSABLE:
        raise ValueError(f"The row cannot be used (max_length {max_length}): {UNUSABLE[outcome]}. "
                         f"It begins {question[:60]!r}.")
    return {"input_ids": ids, "labels": label_ids(ids, prompt_tokens, policy, tokenizer.eos_token_id)}


def encode_split(tokenizer: PreTrainedTokenizerBase, split: Dataset, max_length: int, policy: str = "aligned",
                 truncation: str = "sentence") -> tuple[Dataset, dict[str, int]]:
    """Every row of a split (question, answer, perhaps source) as `encode_example` encodes it.

    Returns:
        (Dataset with input_ids, labels and source; counts: rows, kept, tokens, supervised_tokens and those of
        whole, cut_at_sentence, cut_mid_answer and the keys of `UNUSABLE` that occurred)
    Raises:
        ValueError: unknown policy or truncation, or no row is left.
    """
    from datasets import Dataset

    columns, outcomes = {"input_ids": [], "labels": [], "source": []}, Counter()
    for start in range(0, len(split), _BATCH_ROWS):
        rows = split[start:start + _BATCH_ROWS]
        sources = rows.get("source", [""] * len(rows["question"]))
        encoded = _encode_batch(tokenizer, rows["question"], rows["answer"], max_length, truncation)
        for (ids, prompt_tokens, outcome), source in zip(encoded, sources, strict=True):
            outcomes[outcome] += 1
            if outcome not in UNUSABLE:
                columns["input_ids"].append(ids)
                columns["labels"].append(label_ids(ids, prompt_tokens, policy, tokenizer.eos_token_id))
                columns["source"].append(source)
    kept = len(columns["input_ids"])
    if not kept:
        raise ValueError(f"None of {len(split)} rows is usable (max_length {max_length}): {dict(outcomes)}.")
    supervised = sum(len(row) - row.count(IGNORE_INDEX) for row in columns["labels"])
    counts = {"rows": len(split), "kept": kept, "tokens": sum(map(len, columns["input_ids"])),
              "supervised_tokens": supervised, **outcomes}
    return Dataset.from_dict(columns), counts


def _encode_batch(tokenizer, questions, answers, max_length: int,
                  truncation: str) -> list[tuple[list[int], int, str]]:
    """(ids with EOS, prompt tokens, outcome) of each row; ids of an unusable row have no meaning."""
    if truncation not in TRUNCATIONS:
        raise ValueError(f"Unknown truncation {truncation!r}; expected one of {', '.join(TRUNCATIONS)}.")
    prompts = [format_prompt(question) for question in questions]
    answers = [escape_special_tokens(answer.strip()) for answer in answers]
    prompt_rows = strip_eos(tokenizer, tokenizer(prompts, split_special_tokens=True)["input_ids"])
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    encoding = tokenizer(texts, split_special_tokens=True, verbose=False)  # long rows are cut below
    rows = zip(questions, answers, prompt_rows, strip_eos(tokenizer, encoding["input_ids"]), strict=True)
    controls = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    encoded = []
    for row, (question, answer, prompt_ids, ids) in enumerate(rows):
        outcome = "whole"
        if not question.strip() or not answer:
            outcome = "empty"
        elif len(prompt_ids) + 2 > max_length:  # one answer token and EOS must fit
            outcome = "prompt_too_long"
        elif ids[:len(prompt_ids)] != prompt_ids:
            outcome = "prompt_not_prefix"
        elif not controls.isdisjoint(ids[1:]):
            outcome = "control_token"
        elif len(ids) >= max_length:
            kept, outcome = _tokens_to_keep(encoding, row, len(prompts[row]), answer, max_length, truncation)
            ids = ids[:kept]
        if outcome != "cut_mid_answer":
            ids = [*ids, tokenizer.eos_token_id]
        encoded.append((ids, len(prompt_ids), outcome))
    return encoded


def _tokens_to_keep(encoding, row: int, prompt_chars: int, answer: str, max_length: int,
                    truncation: str) -> tuple[int, str]:
    """(ids to keep, outcome) of a row that does not fit with its EOS."""
    if truncation == "drop":
        return 0, "dropped_too_long"
    if truncation == "sentence":
        last_char = encoding.token_to_chars(row, max_length - 2).end  # with room for EOS behind it
        room = max(0, last_char + 1 - prompt_chars)
        ends = [prompt_chars + match.end() for match in _SENTENCE_END.finditer(answer, 0, room)]
        for end in reversed(ends):
            last = encoding.char_to_token(row, end - 1)
            whole = last is not None and encoding.token_to_chars(row, last).end == end
            if whole and last < max_length - 1:
                return last + 1, "cut_at_sentence"
    return max_length, "cut_mid_answer"


# What each policy is to `audit`, which knows no policies: the faults it finds in such labels.
POLICY_FAULTS = {"aligned": set(), "preshifted": {"double_shift"}, "full_sequence": {"prompt_supervised"},
                 "padding_supervised": {"padding_supervised"}, "no_eos": {"no_eos"}}


def audit_policy(model, tokenizer, examples, collator=None) -> dict:
    """`audit.audit_batches` of encoded examples, and `policy`: the policy that was found, or None."""
    from medqa_lib import audit

    report = audit.audit_batches(examples, collator or make_collator(tokenizer), tokenizer, model, RESPONSE)
    policy = next((name for name, faults in POLICY_FAULTS.items() if faults == set(report["faults"])), None)
    return report | {"policy": policy}


def require_policy(report: dict, policy: str) -> None:
    """Raise ValueError unless `audit_policy` found the declared policy."""
    if report["policy"] != policy:
        raise ValueError(f"The experiment declares labels {policy!r}, the audit found {report['policy']!r}: "
                         f"{report['verdict']}. "
                         "Check the policy of the encoded data set, the collator, and who shifts the labels.")
