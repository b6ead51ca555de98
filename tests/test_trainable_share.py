"""On TinyLlama's configuration, without its weights: what the listed targets really train."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medqa_lib.config import ALL_LINEAR, QKV, LoraSettings
from medqa_lib.model import add_lora, trainable_share

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
        model = add_lora(LlamaForCausalLM(LlamaConfig(**TINYLLAMA)), LoraSettings(target_modules=targets))
    trainable, share = trainable_share(model)
    assert trainable == parameters
    assert f"{share:.3%}" == percent
