"""The padding-free path is taken only by models on which it computes what each document alone gives: tried on kinds of attention, on the CPU."""

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch.nn.attention import varlen

from medqa_lib.fast import paths

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GEMMA = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 1}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
SOUND = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=16)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SIZES)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SIZES)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=None)),
}
LEAKY = {
    "mistral with a window": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=8)),
    "gemma2, capped": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GEMMA, attn_logit_softcapping=1.0)),
    "gemma3 with a window": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GEMMA, **WINDOW)),
    "lfm2, convolutions": lambda: t.Lfm2ForCausalLM(t.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])),
    "falcon_h1, state-space": lambda: t.FalconH1ForCausalLM(t.FalconH1Config(**SIZES, **MAMBA)),
}


def attend(query, key, value, starts, _, longest, __, scale=None, window_size=None):
    """What varlen_attn computes on a GPU, document by document."""
    outs = []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        states = (part[first:last].transpose(0, 1)[None].float() for part in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).to(query.dtype)


def prove(make, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", attend)
    torch.manual_seed(1)
    net = make()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    rows = [torch.randint(2, 300, (length,)).tolist() for length in (30, 22)]
    return paths.disprove(model, "padding_free", [{"input_ids": row, "labels": row} for row in rows])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for the CPU")
@pytest.mark.parametrize("name", SOUND)
def test_padding_free_is_exact(monkeypatch, name):
    assert prove(SOUND[name], monkeypatch) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for the CPU")
@pytest.mark.parametrize("name", LEAKY)
def test_padding_free_is_refused(monkeypatch, name):
    assert prove(LEAKY[name], monkeypatch) != ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for the CPU")
def test_a_leak_below_the_tolerance_of_the_loss_is_found(monkeypatch):
    """A document that sees a little of the one before it: the mean loss and the gradients hardly change."""
    monkeypatch.setattr(paths, "_compare", lambda found, expected: "")
    assert "logits" in prove(LEAKY["lfm2, convolutions"], monkeypatch)
    assert prove(SOUND["llama"], monkeypatch) == ""
