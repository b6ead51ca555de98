"""Eleven architectures, tiny and random, through the untuned evaluation and exp_004 of the command line: each ends, or says in a sentence why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as t

from medqa_lib import standin
from medqa_lib.config import PROFILES

ROOT = Path(__file__).parents[1]
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

pytestmark = pytest.mark.slow  # each evaluates, trains and evaluates again in a process of its own


def train(tmp_path, name, make):
    folder = tmp_path / f"tiny-{name.lower()}"
    torch.manual_seed(0)
    make().save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(standin.model_path(PROFILES["smoke"])).save_pretrained(folder)
    home = {"MEDQA_PROFILE": "smoke", "MEDQA_HOME": str(tmp_path / "home"), "MEDQA_MODEL": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "medqa_lib.training", "base", "exp_004"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | home, text=True, capture_output=True)
    runs = {path.parent.name for path in (tmp_path / "home" / "results").glob("*/*/metrics.json")}
    return done, runs


@pytest.mark.parametrize("name", TRAINS)
def test_architecture_is_evaluated_and_trained(tmp_path, name):
    done, runs = train(tmp_path, name, TRAINS[name])
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs == {"base", "exp_004"}


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_without_the_targets_is_refused_in_a_sentence(tmp_path, name):
    make, offered = REFUSED[name]
    done, runs = train(tmp_path, name, make)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and runs == {"base"}, done.stderr[-3000:]
    assert "q_proj" in lines[-1] and offered in lines[-1] and "Traceback" not in done.stderr
