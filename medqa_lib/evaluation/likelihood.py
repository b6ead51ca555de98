"""What a model itself finds likely: the loss on answer tokens, and the choice among given options."""

import json
import math
import sys
from collections.abc import Sequence

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from medqa_lib.labels import IGNORE_INDEX, encode_example
from medqa_lib.model import context_length

MAX_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
MAX_LOGITS = 2**25  # 0.25 GB in float64


def completion_loss(model, examples: Sequence[dict]) -> float:
    """Mean loss of the supervised tokens in nats, all tokens weigh alike; its exponential is the perplexity.

    Args:
        model: causal language model; it is left in evaluation mode.
        examples: list or Dataset of rows with `input_ids` and unshifted `labels`, (T,) each, as
            `labels.encode_example` gives them.
    Raises:
        ValueError: no token is supervised.
    """
    losses, tokens = sum_answer_losses(model, list(examples))
    if not any(tokens):
        raise ValueError(f"None of {len(losses)} examples has a supervised token: labels are {IGNORE_INDEX}.")
    return math.fsum(losses) / sum(tokens)


def score_options(model, tokenizer, questions: Sequence[str], choices: Sequence[str]) -> pd.DataFrame:
    """Whether the correct option of a multiple-choice question is the likeliest: knowledge, not wording.

    An option's score is the log-likelihood of its text after the prompt, without EOS, divided by its number
    of characters, so that an option is not punished for its length (`acc_norm` of the lm-evaluation-harness).

    Args:
        questions: N questions.
        choices: N strings, "" (no options) or JSON such as `{"options": ["Iron", "Zinc"], "correct": 0}`.
    Returns:
        N rows: `mcq_asked` (1 or 0), `mcq_correct` (1 or 0), `mcq_chance` (what guessing gives), all 0
        without options.
    """
    table = pd.DataFrame(0.0, range(len(questions)), ["mcq_asked", "mcq_correct", "mcq_chance"])
    asked = {row: json.loads(choice) for row, choice in enumerate(choices) if choice}
    limit = context_length(model)
    losses, _ = sum_answer_losses(model, [
        encode_example(tokenizer, questions[row], option, limit, policy="no_eos", truncation="drop")
        for row, choice in asked.items() for option in choice["options"]])
    remaining = iter(losses)
    for row, choice in asked.items():
        scores = [next(remaining) / len(option) for option in choice["options"]]
        table.loc[row] = 1, scores.index(min(scores)) == choice["correct"], 1 / len(scores)
    return table


def sum_answer_losses(model, examples: Sequence[dict]) -> tuple[list[float], list[int]]:
    """(N,) summed loss in nats and (N,) number of supervised tokens, in batches of similar length.

    Under `accelerate launch` every process must call this: each computes its share, and all get all.
    """
    model.eval()
    order, batches = sorted(range(len(examples)), key=lambda row: -len(examples[row]["input_ids"])), []
    while order:
        size = max(1, MAX_BATCH_TOKENS[model.device.type] // len(examples[order[0]]["input_ids"]))
        batches, order = [*batches, order[:size]], order[size:]
    state, found = PartialState(cpu=not torch.cuda.is_available()), []
    # As many batches for each, since a sharded model computes them together.
    batches += batches[-1:] * (-len(batches) % state.num_processes)
    for rows in tqdm(batches[state.process_index::state.num_processes], desc="answer loss", unit="batch",
                     leave=False, file=sys.stdout, disable=len(examples) < 200 or not state.is_main_process):
        losses = _compute_losses(model, [examples[row] for row in rows])
        found += [(row, (float(loss.sum()), len(loss))) for row, loss in zip(rows, losses, strict=True)]
    found = dict(gather_object(found))
    return tuple(map(list, zip(*(found[row] for row in range(len(examples))), strict=True))) or ([], [])


@torch.no_grad()
def _compute_losses(model, batch: Sequence[dict]) -> tuple[torch.Tensor, ...]:
    """Loss of each supervised token, one float64 tensor per example. Padding goes right.

    The sum over a vocabulary of 49,152 loses 2e-5 of the loss in float32, so it is taken in float64.
    """
    def pad(name: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(example[name]) for example in batch], True, value).to(model.device)

    ids, targets = pad("input_ids", -1), pad("labels", IGNORE_INDEX)[:, 1:]
    logits = model(input_ids=ids.clamp(0), attention_mask=(ids >= 0).long(), use_cache=False).logits[:, :-1]
    kept = targets != IGNORE_INDEX
    part = max(1, MAX_LOGITS // logits.shape[-1])
    loss = torch.cat([cross_entropy(some.double(), target, reduction="none") for some, target
                      in zip(logits[kept].split(part), targets[kept].split(part), strict=True)])
    return loss.cpu().split(kept.sum(1).tolist())
