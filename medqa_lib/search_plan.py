"""What the search for exp_005 tries: the best recipe within 400 steps of 32 examples and 0.6% of TinyLlama's weights.

A coordinate search that starts from exp_004's recipe with r 8 on all linear layers and looks at validation loss only:

1. learning rate and schedule; beside them q/k/v only, and exp_004's own recipe as the reference;
2. one change at a time on the best trial of round 1;
3. all changes that lowered the loss by more than MARGIN, together, at 1, 0.67 and 1.5 times the learning rate. Of changes to the same
   field (LoRA+ 4 and 16, `cut` and `drop`, rsLoRA and DoRA) only the best one.

The trial with the lowest loss of all becomes exp_005.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from medqa_lib.config import ALL_LINEAR, QKV, Experiment, LoraSettings, get_experiment
from medqa_lib.model import add_lora, trainable_share

MAX_SHARE = 0.006  # of TinyLlama's weights
MARGIN = 0.002  # nats
RATES = (("linear", "2e-4"), ("cosine", "5e-4"), ("cosine", "1e-3"), ("cosine", "2e-3"), ("cosine", "4e-3"), ("linear", "1e-3"))
ROUND_1 = {
    "exp_004_recipe": {},
    "qkv_cosine_1e-3": {"lr_scheduler": "cosine", "learning_rate": 1e-3},
    **{f"{schedule}_{rate}": {"lr_scheduler": schedule, "learning_rate": float(rate), "target_modules": ALL_LINEAR}
       for schedule, rate in RATES},
}
CHANGES = {
    "rslora": {"use_rslora": True, "use_dora": False},  # both switches, so that rsLoRA and DoRA change the same field
    "dora_r7": {"use_dora": True, "use_rslora": False, "r": 7, "alpha": 14},  # r 8 with the magnitudes is 0.606% of TinyLlama
    "qkvo_r16": {"r": 16, "alpha": 32, "target_modules": (*QKV, "o_proj")},  # alpha / r stays 2
    "lora_plus_4": {"lora_plus_ratio": 4.0},
    "lora_plus_16": {"lora_plus_ratio": 16.0},
    "dropout_0": {"dropout": 0.0},
    "warmup_0.1": {"warmup_share": 0.1},
    "weight_decay_0.01": {"weight_decay": 0.01},
    "length_1024": {"max_length_tokens": 1024},
    "truncation_cut": {"truncation": "cut"},
    "truncation_drop": {"truncation": "drop"},
}
RATE_FACTORS = {"": 1.0, "@0.67x": 0.67, "@1.5x": 1.5}
TINYLLAMA = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "tie_word_embeddings": False}


def plan_round(number: int, losses: dict[str, float]) -> list[Experiment]:
    """The trials of round 1, 2 or 3, at full size. A name holds the whole recipe, so the same name in two rounds is the same trial.

    Args:
        losses: trial name -> validation loss, of the earlier rounds; a trial that failed is not in it.
    Raises:
        ValueError: no trial of round 1 has a loss.
    """
    first = {name: change_recipe(get_experiment("exp_004"), name, changes) for name, changes in ROUND_1.items()}
    if number == 1:
        return list(first.values())
    finished = [name for name in first if name in losses]
    if not finished:
        raise ValueError(f"No trial of round 1 has a validation loss, so there is nothing to build round {number} on. See why they failed.")
    base = first[min(finished, key=losses.get)]
    if number == 2:
        return [change_recipe(base, f"{base.name}+{name}", changes) for name, changes in CHANGES.items()]
    chosen = choose_changes(base.name, losses)
    name, together = "+".join([base.name, *chosen]), {field: value for name in chosen for field, value in CHANGES[name].items()}
    return [change_recipe(base, name + suffix, {**together, "learning_rate": float(f"{factor * base.learning_rate:.4g}")})
            for suffix, factor in RATE_FACTORS.items()]


def choose_changes(base: str, losses: dict[str, float]) -> list[str]:
    """The changes of round 2 that lowered the base's loss by more than MARGIN, the best first, none to a field already changed."""
    gains = {name: losses[base] - losses[f"{base}+{name}"] for name in CHANGES if f"{base}+{name}" in losses}
    chosen, fields = [], set()
    for name in sorted(gains, key=gains.get, reverse=True):
        if gains[name] > MARGIN and fields.isdisjoint(CHANGES[name]):
            chosen.append(name)
            fields |= CHANGES[name].keys()
    return chosen


def change_recipe(experiment: Experiment, name: str, changes: dict) -> Experiment:
    """The experiment under another name with some fields changed, its own or those of its LoRA settings."""
    lora = {field: value for field, value in changes.items() if hasattr(experiment.lora, field)}
    own = {field: value for field, value in changes.items() if field not in lora}
    return dataclasses.replace(experiment, name=name, lora=dataclasses.replace(experiment.lora, **lora), **own)


def changed_fields(experiment: Experiment, reference: Experiment) -> dict:
    """Field -> the experiment's value where the recipes differ; fields of the LoRA settings as `lora.r`."""
    flat = []
    for recipe in map(dataclasses.asdict, (experiment, reference)):
        flat.append({**recipe, **{f"lora.{field}": value for field, value in recipe["lora"].items()}})
    return {field: value for field, value in flat[0].items()
            if field not in ("name", "question", "partner", "differs_in", "lora") and value != flat[1][field]}


@functools.cache
def measure_tinyllama_share(lora: LoraSettings) -> float:
    """The share of TinyLlama's parameters that these settings would train, from its configuration alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return trainable_share(add_lora(LlamaForCausalLM(LlamaConfig(**TINYLLAMA)), lora))[1]
