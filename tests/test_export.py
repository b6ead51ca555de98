"""The exported files hold the merged model and its prompt, and the parity gate notices a path that answers differently."""

import gguf
import numpy as np
import pytest
import torch
from smoke_adapters import SMOKE, make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqa_lib.model import load_merged
from medqa_lib.prompts import format_prompt
from medqa_lib.publish import demo, export

QUESTIONS = ["What is gout?", "How is malaria diagnosed?", "Is it?"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    return export.export_merged(adapter, tmp_path_factory.mktemp("merged"), SMOKE)


@pytest.fixture(scope="module")
def reader(merged, tmp_path_factory):
    return gguf.GGUFReader(export.export_gguf(merged, tmp_path_factory.mktemp("gguf") / "medqa.gguf"))


def test_export_merged_loads_without_this_project_and_is_the_evaluated_model(adapter, merged):
    ids = torch.arange(2, 20).view(1, -1)
    found = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert torch.equal(found, load_merged(adapter, SMOKE)(ids).logits)
    chat = [{"role": "user", "content": "What is gout?"}]
    assert AutoTokenizer.from_pretrained(merged).apply_chat_template(chat, tokenize=False) == format_prompt(
        "What is gout?"
    )


def test_interleave_rotary_puts_the_two_halves_of_a_head_side_by_side():
    rows = torch.arange(8.0).view(8, 1)
    assert export.interleave_rotary(rows, heads=2).view(-1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_export_gguf_holds_every_weight(merged, reader):
    state = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert len(found) == len(state)
    assert torch.equal(found["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"].half())
    assert torch.equal(found["blk.1.attn_norm.weight"], state["model.layers.1.input_layernorm.weight"])
    query = state[
        "model.layers.0.self_attn.q_proj.weight"
    ].half()  # 4 heads of 16: row 1 in the file is row 8 of the first head
    assert torch.equal(found["blk.0.attn_q.weight"][1], query[8]) and torch.equal(
        found["blk.0.attn_q.weight"][2], query[1]
    )


def test_export_gguf_describes_model_tokenizer_and_prompt(reader, merged):
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (
        fields["llama.block_count"] == 2
        and fields["llama.attention.head_count_kv"] == 2
        and fields["llama.rope.dimension_count"] == 16
    )
    assert fields["general.license"] == "cc-by-nc-sa-4.0"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert (
        fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
        and fields["tokenizer.ggml.add_bos_token"] is False
    )
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert (
        "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"
        in reader.data.filename.with_name("Modelfile").read_text()
    )


def test_name_pre_tokenizer_refuses_what_it_does_not_know():
    assert (
        export._name_pre_tokenizer(
            {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
        )
        == "smollm"
    )
    with pytest.raises(ValueError, match="Metaspace.*merged safetensors"):
        export._name_pre_tokenizer({"type": "Metaspace"})


def test_check_parity_passes_when_all_paths_answer_alike(adapter, merged):
    table = export.check_parity(adapter, merged, QUESTIONS, SMOKE).set_index("path")
    assert table["passed"].all() and (table["n"] == 3).all()
    gate = ["merged", "NF4 + adapter", "exported safetensors", "demo"]
    assert (table.loc[gate, "common_prefix"] == 1).all()
    assert table.loc["untuned (control)", "identical"] == 0


def test_check_parity_fails_a_path_with_another_prompt(adapter, merged, monkeypatch):
    monkeypatch.setattr(demo, "encode_prompt", lambda tokenizer, question: tokenizer(question)["input_ids"])
    table = export.check_parity(adapter, merged, QUESTIONS, SMOKE).set_index("path")
    assert table["passed"].to_dict() | {"demo": False} == table["passed"].to_dict()
    assert table.loc["exported safetensors", "passed"]
