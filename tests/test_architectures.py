"""Eleven architectures, tiny and random, through the untuned evaluation and exp_004: each ends, or says in a sentence why not."""

import dataclasses
import tempfile
from pathlib import Path

import pandas as pd
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
MODELS = {
    "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "Qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "Qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=16)),
    "Gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**WINDOWED)),
    "Gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**WINDOWED)),
    "Olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SIZES)),
    "SmolLM3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SIZES)),
    "Mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=32)),
    "Granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES)),
    "Phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SIZES)),
    "GPT2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
}
TABLE = Path(__file__).parents[1] / "assets" / "results" / "architectures.csv"

pytestmark = pytest.mark.slow  # each is evaluated, trained and evaluated again


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return data.prepare_splits(home=tmp_path_factory.mktemp("splits"))


def try_out(name, splits, folder):
    """A row of the table: what the untuned evaluation and exp_004 end in."""
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder / name)
    t.AutoTokenizer.from_pretrained(standin.model_path(SMOKE)).save_pretrained(folder / name)
    profile = dataclasses.replace(SMOKE, model=str(folder / name))
    untuned = run_base(splits, profile, folder)
    row = {"architecture": name, "untuned": f"evaluated on {untuned.metrics['n_test']} questions"}
    try:
        tuned = run_experiment("exp_004", splits, profile, folder)
    except ValueError as error:
        return row | {"exp_004": f"refused: {error}"}
    assert tuned.metrics["validation_loss"] != untuned.metrics["validation_loss"]
    numbers = "{trained_steps} steps, {trainable_parameters:,} parameters".format(**tuned.metrics)
    return row | {"exp_004": f"trained: {numbers}"}


@pytest.mark.parametrize("name", MODELS)
def test_architecture_does_what_the_table_of_notebook_17_says(splits, tmp_path, name):
    table = pd.read_csv(TABLE).set_index("architecture", drop=False)
    assert list(table.index) == list(MODELS)
    assert try_out(name, splits, tmp_path) == table.loc[name].to_dict()


if __name__ == "__main__":  # makes the table
    with tempfile.TemporaryDirectory() as folder:
        parts = data.prepare_splits(home=folder)
        pd.DataFrame([try_out(name, parts, Path(folder)) for name in MODELS]).to_csv(TABLE, index=False)
