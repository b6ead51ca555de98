"""The merged model as files that other programs read, and the gate that holds every way of asking it against the evaluated one.

GGUF is written with `gguf`, the llama.cpp project's own package. Its converter script is on PyPI only as one person's copy, whose wheel
overwrites `gguf`; of what that script can do a Llama needs little, and this writer gives the same tensors bit for bit.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from medqa_lib.config import Profile
from medqa_lib.evaluation.generation import compare_answers, generate_answers
from medqa_lib.model import load_base_model, load_merged, load_tokenizer
from medqa_lib.prompts import TEMPLATE, format_prompt
from medqa_lib.publish.hub import chat_template, load_adapters

# Mean share of an answer's words before its first difference. A wrong template, a forgotten adapter or a permuted weight puts it near
# the control's; rounding moves one answer in several, and only late.
PARITY_TOLERANCE = 0.25
PARITY_NEW_TOKENS = 48


def export_merged(adapter_dir: Path, folder: Path, profile: Profile | None = None) -> Path:
    """Base and adapter as one model in safetensors, with tokenizer and chat template: needs neither PEFT nor this project."""
    model, tokenizer = load_merged(adapter_dir, profile), load_tokenizer(profile)
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def export_gguf(merged: Path, file: Path) -> Path:
    """The merged model as a 16-bit GGUF file for llama.cpp, and beside it a Modelfile for `ollama create`.

    Args:
        merged: folder of `export_merged`.
        file: where the .gguf goes.
    Raises:
        ValueError: the tokenizer is of a kind that this writer does not know.
    """
    import gguf
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(merged, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(file.stem)
    writer.add_license("cc-by-nc-sa-4.0")
    _add_settings(writer, model.config)
    _add_tokenizer(writer, tokenizer, model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}.get(name.split(".")[-2])
        tensor = interleave_rotary(tensor, heads) if heads else tensor
        dtype = torch.float32 if tensor.dim() == 1 else torch.float16
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _write_modelfile(file)
    return file


def interleave_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection (heads * D, in): transformers rotates i with i + D/2, llama.cpp 2i with 2i + 1."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_settings(writer, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1)  # mostly float16


def _add_tokenizer(writer, tokenizer, config) -> None:
    """Vocabulary, merges and this project's prompt as the chat template."""
    import gguf

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges, kinds = state["model"]["merges"], gguf.TokenType
    tokens = [tokenizer.convert_ids_to_tokens(i) or f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [kinds.BYTE if len(token) == 6 and token.startswith("<0x") else kinds.NORMAL for token in tokens]
    for added in state["added_tokens"]:
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    if state["model"]["byte_fallback"]:  # SentencePiece, as in Llama 2: a piece's score is the rank at which it is merged
        ranks = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_pre_tokenizer(state["pre_tokenizer"]))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _name_pre_tokenizer(settings: dict) -> str:
    """llama.cpp's name of the rule that splits text before merging."""
    kinds = [part["type"] for part in settings.get("pretokenizers", [settings])]
    names = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
    if tuple(kinds) not in names:
        raise ValueError(f"The tokenizer splits text by {kinds}; this writer knows {list(names)}. Use the merged safetensors instead.")
    return names[tuple(kinds)]


def _write_modelfile(file: Path) -> None:
    template = TEMPLATE.format(question="{{ .Prompt }}")
    (file.parent / "Modelfile").write_text(f'FROM ./{file.name}\nTEMPLATE """{template}"""\nPARAMETER temperature 0\n', encoding="utf-8")


def ask_gguf(file: Path, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers of llama.cpp itself, from the package `xllamacpp`, which brings it ready-built."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(file), 2048, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)
    answers = [server.handle_completions({"prompt": format_prompt(question), "max_tokens": max_new_tokens, "temperature": 0})
               for question in questions]
    return [answer["choices"][0]["text"].strip() for answer in answers]


def check_parity(adapter_dir: Path, merged: Path, questions: Sequence[str], profile: Profile | None = None,
                 gguf_file: Path | None = None) -> pd.DataFrame:
    """The same questions through every way to the model, each compared with the merged model, which is the evaluated one.

    Args:
        adapter_dir: the trained adapter.
        merged: folder of `export_merged`.
        questions: ten or so.
        gguf_file: file of `export_gguf`, asked too if the package `xllamacpp` is installed.
    Returns:
        path, n, identical, common_prefix (both shares), needed, passed. The last row is a control, of which nothing is needed: the
        untuned model, to show what the table looks like when answers differ.
    """
    from transformers import AutoModelForCausalLM

    from medqa_lib.publish.demo import Engine

    tokenizer, questions = load_tokenizer(profile), list(questions)

    def ask(model) -> list[str]:
        return generate_answers(model, tokenizer, questions, PARITY_NEW_TOKENS)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = {"merged": ask(load_merged(adapter_dir, profile)),
               "NF4 + adapter": ask(load_adapters(load_base_model(profile), {"adapter": adapter_dir})),
               "exported safetensors": ask(AutoModelForCausalLM.from_pretrained(merged, dtype="auto", device_map=device))}
    engine = Engine({"adapter": adapter_dir}, profile)
    shown = [list(engine.stream(question, "adapter", PARITY_NEW_TOKENS))[-1] for question in questions]
    answers["demo"] = [tuned for _, tuned in shown]
    if gguf_file and importlib.util.find_spec("xllamacpp"):
        answers["GGUF in llama.cpp"] = ask_gguf(gguf_file, questions, PARITY_NEW_TOKENS)
    rows = [{"path": path, **compare_answers(answers["merged"], found), "needed": 1 - PARITY_TOLERANCE} for path, found in answers.items()]
    rows.append({"path": "untuned (control)", **compare_answers(answers["merged"], [base for base, _ in shown]), "needed": 0.0})
    return pd.DataFrame(rows).assign(passed=lambda table: table["common_prefix"] >= table["needed"])
