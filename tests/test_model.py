"""An EOS that the model knows, weights that a CPU does not repack, what LoRA trains, and loading without a word."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medqa_lib import model
from medqa_lib.config import ALL_LINEAR, PROFILES, QKV, LoraSettings


@pytest.mark.parametrize(
    ("own", "right"), [(1, True), ([7, 1], True), (None, True), (2, False), ([7, 2], False)]
)
def test_check_model_compares_eos_of_tokenizer_and_model(own, right):
    smoke = PROFILES["smoke"]
    tokenizer, base = model.load_tokenizer(smoke), model.load_base_model(smoke, quantized=False)
    base.generation_config.eos_token_id = own
    if right:
        assert model.check_model(base, tokenizer) is None
    else:
        with pytest.raises(ValueError, match=r"'</s>' \(1\).*\(2\)"):
            model.check_model(base, tokenizer)


def test_base_model_keeps_its_weights_on_a_cpu_for_which_bitsandbytes_repacks_them(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model._load_once.cache_clear()
    base, tokens = model.load_base_model(PROFILES["smoke"]), torch.arange(2, 20).view(1, -1)
    with torch.no_grad():
        four_bit = base(tokens).logits
        dequantised = base.dequantize(dtype=torch.float32)(tokens).logits
    fresh = model.load_base_model(PROFILES["smoke"]).dequantize(dtype=torch.float32)(tokens).logits
    assert torch.equal(dequantised, fresh)
    assert torch.allclose(four_bit, fresh, atol=1e-6)


TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("targets", "parameters", "percent"), [(QKV, 1_531_904, "0.139%"), (ALL_LINEAR, 6_307_840, "0.570%")]
)
def test_trainable_share_on_tinyllama(targets, parameters, percent):
    with torch.device("meta"):
        tuned = model.add_lora(
            LlamaForCausalLM(LlamaConfig(**TINYLLAMA)), LoraSettings(target_modules=targets)
        )
    trainable, share = model.trainable_share(tuned)
    assert trainable == parameters
    assert f"{share:.3%}" == percent


@pytest.mark.slow
def test_loading_tuning_and_merging_print_nothing():
    code = (
        "from medqa_lib import model\n"
        "from medqa_lib.config import PROFILES, LoraSettings\n"
        "smoke = PROFILES['smoke']\n"
        "model.load_tokenizer(smoke), model.add_lora(model.load_base_model(smoke), LoraSettings())\n"
        "model.load_merged(profile=smoke)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
