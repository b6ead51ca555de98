"""The merged model as files that other programs read, and the parity table of all ways to ask it.

GGUF is written with `gguf`, llama.cpp's own package. Its converter script is on PyPI only as one person's
copy, whose wheel overwrites `gguf`; a Llama needs little of what that script can do.
"""

import ctypes
import json
import logging
from pathlib import Path

import pandas as pd
import torch

from medqa_lib.config import Profile
from medqa_lib.evaluation.generation import compare_answers
from medqa_lib.model import load_merged, load_tokenizer
from medqa_lib.prompts import TEMPLATE
from medqa_lib.publish.hub import chat_template

# Mean share of an answer's words before its first difference. A wrong template, a forgotten adapter or a
# permuted weight puts it near the untuned model's; rounding moves one answer in several, and only late.
NEEDED = 0.75
# llama.cpp's name of the rule that splits text before merging, by the tokenizer's own parts
PRE_TOKENIZERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}


def export_merged(adapter_dir: Path, folder: Path, profile: Profile | None = None) -> Path:
    """Base and adapter as one model in safetensors, for plain transformers, with tokenizer and template."""
    model, tokenizer = load_merged(adapter_dir, profile), load_tokenizer(profile)
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def export_gguf(merged: Path, file: Path) -> Path:
    """The model of `export_merged` as a 16-bit GGUF file, and beside it a Modelfile for `ollama create`.

    Raises:
        ValueError: the tokenizer is of a kind that this writer does not know.
    """
    import gguf
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(merged, dtype="auto")
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_license("cc-by-nc-sa-4.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    _add_tokenizer(writer, merged, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (layer := name.split(".")[-2]) in heads:
            tensor = interleave_rotary(tensor, heads[layer])
        tensor = tensor.to(torch.float32 if tensor.dim() == 1 else torch.float16)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    modelfile = Path(__file__).with_name("Modelfile").read_text(encoding="utf-8")
    modelfile = modelfile.format(file=file.name, template=TEMPLATE.format(question="{{ .Prompt }}"),
                                 context=min(2048, config.max_position_embeddings))
    file.with_name("Modelfile").write_text(modelfile, encoding="utf-8")
    return file


def quantize_gguf(file: Path, kind: str = "Q4_K_M") -> Path:
    """The file of `export_gguf` quantised by llama.cpp itself (`pip install llama-cpp-python`).

    Rows that 256 does not divide get blocks of 32 instead, with more bits: SmolLM2-135M has 576 columns.

    Returns:
        The new file; the Modelfile beside it names it from now on.
    Raises:
        RuntimeError: llama.cpp refused.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel("CRITICAL")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    smaller = file.with_name(f"{file.stem.removesuffix('-F16')}-{kind}.gguf")
    if code := llama_cpp.llama_model_quantize(bytes(file), bytes(smaller), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {file} to {kind} (code {code}).")
    modelfile = file.with_name("Modelfile")
    modelfile.write_text(modelfile.read_text("utf-8").replace(file.name, smaller.name), encoding="utf-8")
    return smaller


def interleave_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder (heads * D, in): in each head transformers rotates i with i + D/2, llama.cpp 2i with 2i + 1."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer, merged: Path, vocab_size: int) -> None:
    """Tokens, merges, control tokens, and this project's prompt as the chat template."""
    import gguf
    from transformers import AutoTokenizer

    tokenizer, kinds = AutoTokenizer.from_pretrained(merged), gguf.TokenType
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [tokenizer.convert_ids_to_tokens(i) or f"[PAD{i}]" for i in range(vocab_size)]
    types = [kinds.BYTE if len(token) == 6 and token.startswith("<0x") else kinds.NORMAL for token in tokens]
    for added in state["added_tokens"]:
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    sentencepiece, merges = state["model"]["byte_fallback"], state["model"]["merges"]
    if sentencepiece:  # as in Llama 2; a piece's score is the first rank at which it is merged
        ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    else:  # byte-level BPE
        rule = state["pre_tokenizer"]
        parts = tuple(part["type"] for part in rule.get("pretokenizers", [rule]))
        if parts not in PRE_TOKENIZERS:
            raise ValueError(f"The tokenizer splits text by {parts}; known are {list(PRE_TOKENIZERS)}. Use "
                             "the merged safetensors instead.")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(PRE_TOKENIZERS[parts])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(merged, load_merges=bool(merges) and not sentencepiece, n_vocab=vocab_size)
    special.add_special_token = {"bos": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id}
    special.add_to_gguf(writer, quiet=True)


def compare_paths(answers: dict[str, list[str]]) -> pd.DataFrame:
    """The parity gate: all ways to the model answered the same questions; each is compared with the first.

    Args:
        answers: way -> answers. The first is the evaluated model; the last, untuned, is a control.
    Returns:
        path, n, identical, common_prefix (both shares), needed, passed.
    """
    evaluated, control = next(iter(answers.values())), list(answers)[-1]
    rows = [{"path": path, **compare_answers(evaluated, found), "needed": 0.0 if path == control else NEEDED}
            for path, found in answers.items()]
    return pd.DataFrame(rows).assign(passed=lambda table: table["common_prefix"] >= table["needed"])
