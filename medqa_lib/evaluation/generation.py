"""Greedy answers in batches, kept in a file that survives a disconnect.

`generate_records` plans batches over all questions, longest prompts first, and appends each finished batch to
the answers file in one synced write. A run that was cut off plans the same batches, so it computes what the
unbroken run would have.
"""

import os
import sys
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import GenerationConfig

from medqa_lib.evaluation.answers import Answer, AnswerStore
from medqa_lib.evaluation.results import VERSIONS
from medqa_lib.model import context_length
from medqa_lib.prompts import encode_prompt

MAX_ROWS = {"cpu": 32, "cuda": 256, "fast": 512}
# Not cuDNN, which torch prefers on an H100: it plans 30 ms per length, and each token is a new length.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def generate_answers(*args, **kwargs) -> list[str]:
    """The texts of `generate_records`."""
    return [answer.text for answer in generate_records(*args, **kwargs)]


def generate_records(model, tokenizer, questions: list, max_new_tokens: int = 256,
                     store: AnswerStore | None = None, batch_size: int | None = None) -> list[Answer]:
    """Greedy answers, one per question, in the questions' order.

    Under `accelerate launch` every process must call this: each answers its share, and all get all answers.

    Args:
        model: a causal language model; None is enough when `store` holds all answers.
        questions: texts, which are put into the prompt format, or token ids, which are taken as they are.
        store: answers found there are read instead of generated; new ones are appended.
        batch_size: rows per batch; halved whenever memory runs out.
    Raises:
        ValueError: an answer is not in `store` and there is no model, or no prompt fits its context.
        torch.OutOfMemoryError: a single question does not fit.
    """
    prompts = [tuple(encode_prompt(tokenizer, each) if isinstance(each, str) else each) for each in questions]
    room = context_length(model) - max_new_tokens if model is not None else None
    if room is not None and room < 1:
        raise ValueError(f"The model reads {context_length(model)} tokens, which leaves no prompt beside "
                         f"{max_new_tokens} new ones: lower max_new_tokens.")
    if room and any(len(prompt) > room for prompt in prompts):
        print(f"{sum(len(prompt) > room for prompt in prompts)} prompts do not fit into the model's context: "
              f"of each the last {room} tokens are read.")
        prompts = [prompt[-room:] for prompt in prompts]
    settings = {"greedy": True, "max_new_tokens": max_new_tokens, "eos": tokenizer.eos_token_id,
                "version": VERSIONS["generation"]}
    state = PartialState(cpu=not torch.cuda.is_available())
    mine = sorted(dict.fromkeys(prompts), key=len, reverse=True)[state.process_index::state.num_processes]
    found = {prompt: store.get(prompt, settings) for prompt in mine} if store else {}
    missing = {prompt for prompt in mine if not found.get(prompt)}
    if missing and model is None:
        raise ValueError(f"{len(missing)} of {len(mine)} answers are not in the store; pass the model.")
    for batch in _generate_batches(model, tokenizer, mine, missing, max_new_tokens, batch_size):
        new = {prompt: answer for prompt, answer in batch.items() if prompt in missing}
        found |= new
        if store:
            store.append(new, settings, state.process_index)
    if state.num_processes > 1:
        found = dict(gather_object(list(found.items())))
    return [found[prompt] for prompt in prompts]


def _generate_batches(model, tokenizer, prompts: list[tuple], missing: set, max_new_tokens: int,
                      batch_size: int | None):
    """Yield {prompt: Answer} of each batch of `prompts`, longest first, with an answer that is `missing`.

    A batch is computed whole even if some of its answers are known: in bfloat16 an answer can depend on the
    batch's shape.
    """
    if not missing:
        return
    ends, pad_id, start = end_ids(model, tokenizer), tokenizer.eos_token_id, 0
    decode, most = _choose_decoder(model, ends)
    limit = batch_size or most
    bar = tqdm(total=len(prompts), desc="Answers", unit="answer", leave=False, file=sys.stdout,
               disable=not PartialState().is_main_process)
    with bar, _greedy_mode(model), sdpa_kernel(BACKENDS):
        while batch := prompts[start:start + limit]:
            if missing.intersection(batch):
                decode = decode or _choose_decoder(model, ends)[0]
                try:
                    answers = decode(*pad_left(batch, pad_id, model.device), max_new_tokens)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    decode = None
                if decode is None:  # not in the handler, whose traceback keeps the batch's tensors alive
                    torch.cuda.empty_cache()
                    limit = len(batch) // 2
                    continue
                yield {prompt: _to_answer(tokenizer, ids, ends)
                       for prompt, ids in zip(batch, answers, strict=True)}
            start += len(batch)
            bar.update(len(batch))


def end_ids(model, tokenizer) -> list[int]:
    """What ends an answer: the tokenizer's EOS, which training appends, and the model's own end tokens."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def pad_left(prompts: list, pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and mask. Padding goes left: every row's next token comes from the last position."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def _greedy_mode(model):
    """Evaluation mode and an empty generation config: `generate` fills gaps in ours from the model's own."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, config = model.training, inner.generation_config
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = config
        model.train(training)


def _choose_decoder(model, ends: list[int]):
    """(callable (ids, mask, max_new_tokens) -> token ids per row up to an end token, most rows at a time)."""
    try:
        from medqa_lib.fast.decode import FastDecoder, is_supported

        if len(ends) == 1 and is_supported(model):
            return FastDecoder(model, *ends), MAX_ROWS["fast"]
    except ModuleNotFoundError:  # the folder was deleted: generate() answers
        pass
    return partial(decode_plain, model, ends), MAX_ROWS[model.device.type]


def decode_plain(model, ends: list[int], ids, mask, max_new_tokens: int) -> list[list[int]]:
    """`generate()`, greedy, with nothing that changes the argmax."""
    greedy = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=max_new_tokens,
                              eos_token_id=ends, pad_token_id=ends[0])
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    return [cut_after_eos(row, *ends) for row in output[:, ids.shape[1]:].tolist()]


def cut_after_eos(ids: list[int], *ends: int) -> list[int]:
    """The ids up to and including the first end token."""
    return ids[:next((place + 1 for place, token in enumerate(ids) if token in ends), None)]


def _to_answer(tokenizer, ids: list[int], ends: list[int]) -> Answer:
    stopped = ids[-1] in ends
    ids = ids[:-1] if stopped else ids  # an end token of the model's may not be special to the tokenizer
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), stopped, len(ids))


def compare_answers(a: list[str], b: list[str]) -> dict[str, float]:
    """Share of identical answers of two models, and mean share of words before the first difference.

    Example:
        >>> compare_answers(["rest and water", "no"], ["rest and sleep", "no"])
        {'n': 2, 'identical': 0.5, 'common_prefix': 0.8333333333333333}
    """
    shares = []
    for left, right in zip(map(str.split, a), map(str.split, b), strict=True):
        same = len(os.path.commonprefix([left, right]))
        shares.append(same / max(len(left), len(right)) if left or right else 1.0)
    identical = sum(left == right for left, right in zip(a, b, strict=True))
    return {"n": len(a), "identical": identical / len(a), "common_prefix": sum(shares) / len(a)}
