"""The exported files hold the merged model and its prompt, and the parity gate notices a path that answers differently."""

import gguf
import numpy as np
import pytest
import torch
from smoke_adapters import SMOKE, make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqa_lib.config import PROFILES
from medqa_lib.model import load_merged
from medqa_lib.prompts import format_prompt
from medqa_lib.publish import export


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
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == format_prompt("What is gout?")


def test_interleave_rotary_puts_the_two_halves_of_a_head_side_by_side():
    rows = torch.arange(8.0).view(8, 1)
    assert export.interleave_rotary(rows, heads=2).view(-1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_export_gguf_holds_every_weight(merged, reader):
    state = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert len(found) == len(state)
    assert torch.equal(found["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"].half())
    assert torch.equal(found["blk.1.attn_norm.weight"], state["model.layers.1.input_layernorm.weight"])
    query = state["model.layers.0.self_attn.q_proj.weight"].half()  # 4 heads of 16
    assert torch.equal(
        found["blk.0.attn_q.weight"][1], query[8]
    )  # the second half's first row of the first head
    assert torch.equal(found["blk.0.attn_q.weight"][2], query[1])


def test_export_gguf_describes_model_tokenizer_and_prompt(reader, merged):
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert fields["llama.block_count"] == 2 and fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 16 and fields["general.license"] == "cc-by-nc-sa-4.0"
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_export_gguf_writes_a_modelfile_with_the_prompt_and_without_a_repetition_penalty(reader):
    lines = reader.data.filename.with_name("Modelfile").read_text().splitlines()
    parameters = dict(line.split()[1:] for line in lines if line.startswith("PARAMETER"))
    assert float(parameters["temperature"]) == 0 and float(parameters["repeat_penalty"]) == 1
    assert int(parameters["num_predict"]) == PROFILES["gpu"].max_new_tokens and int(parameters["num_ctx"]) > 0
    template = "\n".join(lines).partition('"""')[2].partition('"""')[0]
    assert template == format_prompt("{{ .Prompt }}")


def test_export_gguf_refuses_a_tokenizer_that_it_does_not_know(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "PRE_TOKENIZERS", {})
    with pytest.raises(ValueError, match="ByteLevel"):
        export.export_gguf(merged, tmp_path / "medqa.gguf")


def test_compare_paths_passes_what_answers_alike_and_needs_nothing_of_the_control():
    table = export.compare_paths(
        {
            "merged": ["rest and drink water", "no"],
            "rounded": ["rest and drink tea", "no"],  # 3/4 of the first answer, all of the second
            "other": ["rest well", "yes"],  # 1/4 of the first, none of the second
            "untuned": ["who knows", "maybe"],
        }
    ).set_index("path")
    assert table["common_prefix"].tolist() == [1, 0.875, 0.125, 0]
    assert table["passed"].tolist() == [True, True, False, True]


def test_quantize_gguf_keeps_names_and_prompt_and_the_modelfile_names_the_new_file(merged, tmp_path):
    pytest.importorskip("llama_cpp")
    file = export.export_gguf(merged, tmp_path / "medqa-F16.gguf")
    smaller = export.quantize_gguf(file)
    old, new = gguf.GGUFReader(file), gguf.GGUFReader(smaller)
    assert smaller.name == "medqa-Q4_K_M.gguf" and f"FROM ./{smaller.name}" in (tmp_path / "Modelfile").read_text()
    assert sorted(tensor.name for tensor in new.tensors) == sorted(tensor.name for tensor in old.tensors)
    assert {tensor.tensor_type for tensor in new.tensors} != {tensor.tensor_type for tensor in old.tensors}
    template = "tokenizer.chat_template"
    assert new.fields[template].contents() == old.fields[template].contents()
