"""Eleven architectures, tiny and random, through the untuned evaluation and exp_004: each ends, or says in a sentence why not."""

import dataclasses

import pytest
import torch
import transformers as t

from medqa_lib import data, standin
from medqa_lib.config import PROFILES
from medqa_lib.evaluation.run import run_base
from medqa_lib.training import run_experiment

SMOKE = PROFILES["smoke"]
SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WINDOWED = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
GPT2 = {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048, "bos_token_id": 0, "eos_token_id": 1}
TRAINS = {
    "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "Qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "Qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=16)),
    "Gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**WINDOWED)),
    "Gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**WINDOWED)),
    "Olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SIZES)),
    "SmolLM3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SIZES)),
    "Mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=32)),
    "Granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES)),
}
REFUSED = {  # and the layers that PEFT offers instead
    "Phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**SIZES)), "all-linear"),
    "GPT2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), "c_attn"),
}

pytestmark = pytest.mark.slow  # each is evaluated, trained and evaluated again


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return data.prepare_splits(home=tmp_path_factory.mktemp("splits"))


def profile_of(make, folder):
    """The smoke profile with this model in a folder of its own."""
    torch.manual_seed(0)
    make().save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(standin.model_path(SMOKE)).save_pretrained(folder)
    return dataclasses.replace(SMOKE, model=str(folder))


@pytest.mark.parametrize("name", TRAINS)
def test_architecture_is_evaluated_and_trained(splits, tmp_path, name):
    profile = profile_of(TRAINS[name], tmp_path / name)
    untuned = run_base(splits, profile, tmp_path)
    tuned = run_experiment("exp_004", splits, profile, tmp_path)
    assert tuned.metrics["trained_steps"] == 4 and tuned.metrics["trainable_parameters"] > 0
    assert tuned.metrics["validation_loss"] != untuned.metrics["validation_loss"]


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_without_the_targets_is_refused_in_a_sentence(splits, tmp_path, name):
    make, offered = REFUSED[name]
    profile = profile_of(make, tmp_path / name)
    run_base(splits, profile, tmp_path)
    with pytest.raises(ValueError, match=f"q_proj.*{offered}") as error:
        run_experiment("exp_004", splits, profile, tmp_path)
    assert "\n" not in str(error.value)
