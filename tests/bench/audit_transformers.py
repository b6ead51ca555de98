"""Audits the loss of every generative class of the installed transformers, built tiny and with random weights.

    python tests/bench/audit_transformers.py                        # writes assets/results/audit/transformers_VERSION.csv
    python tests/bench/audit_transformers.py --only Git,JetMoe      # prints those, writes nothing
    ENVIRONMENT/bin/python tests/bench/audit_transformers.py --backtest     # adds this release to assets/results/audit/backtest.csv

It needs torch and transformers only, so it runs in an environment with another release of transformers as well.
"""

import argparse
import csv
import importlib.util
import inspect
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("audit", ROOT / "medqa_lib" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

VOCABULARY, LAYERS, PARAMETERS = 120, 4, 100_000_000
GENERATIVE = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|LMHead|ForSpeechSeq2Seq|DoubleHeadsModel|EncoderDecoderModel)$")
# The first rule whose pattern is in an integer's name gives its value; a function is given the default.
RULES = [
    (r"vocab_size|num_embeddings$", VOCABULARY),
    (r"chunk_size_feed_forward", 0),
    (r"(num_key_value_heads|num_kv_heads|multi_query_group_num|n_head_kv)", lambda old: min(old, 4)),
    (r"num_experts_per_tok|top_?k$|moe_topk|num_experts_per_token|num_selected_experts|moe_k", 2),
    (r"^n_groups?$|topk_group|n_shared_experts|num_shared_experts|moe_num_shared", 1),
    (r"experts", lambda old: 4 if old > 4 else old),
    (r"heads$|n_head$|n_heads$", 4),
    (r"(head_dim|d_kv|kv_channels|head_size|qk_\w+_dim|v_head_dim|attention_key_value_size)", 16),
    (r"^rotary_dim$", 16),
    (r"(lora_rank|q_lora|kv_lora)", 16),
    (r"(layers|n_layer|num_blocks|depth|n_layers|num_hidden_layers)$", lambda old: min(old, LAYERS)),
    (r"(intermediate|ffn|n_inner|d_ff|mlp_dim|feed_forward)", 64),
    (r"(^|_)(hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|embedding_size|width|projection_dim|d_embed|output_dim|conv_dim)$", 64),
    (r"image_size", 32),
    (r"patch_size", lambda old: min(old, 16)),
    (r"max_source_positions", 20),
    (r"max_(target_)?position", lambda old: min(old, 128)),
]  # fmt: skip


DEFAULTS = {"head_dim": 16, "num_key_value_heads": 4, "num_experts_per_tok": 2, "vocabulary_map": {"<image>": 5}}

# What reading the source of a flagged class (transformers 5.24.0) has shown; the first pattern that fits.
READ = [
    (r"^(Bart|BigBirdPegasus|Blenderbot|BlenderbotSmall|MBart|Marian|Mvp|PLBart|Pegasus|TrOCR|Whisper|Speech2Text2)ForCausalLM",
     "convention: a decoder for encoder-decoders; CrossEntropyLoss on labels as they are, and its docstring says 'not shifted inside'"),
    (r"^(XLM)?ProphetNetForCausalLM",
     "convention: future n-gram loss (_compute_loss repeats unshifted labels for each stream), so there is no one offset"),
    (r"^XLNetLMHeadModel", "convention: permutation LM; labels belong to target_mapping, CrossEntropyLoss unshifted"),
    (r"^CpmAntForCausalLM",
     "fault: CrossEntropyLoss on unshifted labels, nothing in the docstring says so; labels = input_ids trains to copy"),
    (r"^(XLM|Flaubert)WithLMHeadModel",
     "fault of the documentation: cross_entropy(scores, y) is unshifted (made for masked LM), the docstring says "
     "'labels are shifted inside, set labels = input_ids'"),
    (r"^GPTSanJapanese", "convention: a prefix language model of its own; CrossEntropyLoss on labels as they are"),
    (r"^Musicgen", "convention: labels are audio codes per codebook, not the ids of the text"),
]  # fmt: skip


def explain(name: str) -> str:
    return next((words for pattern, words in READ if re.search(pattern, name)), "not read yet")


# Classes that shifted labels twice in some release, and the pull request about it.
BACKTEST = {"GitForCausalLM": 47395, "Florence2ForConditionalGeneration": 46898, "MoonshineForConditionalGeneration": 46784,
            "CohereAsrForConditionalGeneration": 46895, "JetMoeForCausalLM": 37830,
            "PPFormulaNetForConditionalGeneration": 46903, "MoshiForCausalLM": 36928}  # fmt: skip


def add_release(path: Path, rows: list[dict], skipped: int) -> None:
    """The release's rows in backtest.csv, in place of those of an earlier run."""
    columns = ("transformers", "class", "offset", "leaks_across_rows", "verdict", "expected")
    release = transformers.__version__
    kept = [row for row in csv.DictReader(open(path)) if row["transformers"] != release] if path.exists() else []
    for row in rows:
        if row["class"] in BACKTEST or row["verdict"] != "correct":
            mended = f"pull request {BACKTEST[row['class']]}" if row["class"] in BACKTEST else ""
            new = {**row, "transformers": release, "expected": mended or row["convention_or_fault"]}
            kept.append({column: new[column] for column in columns})
    others = sum(row["verdict"] == "correct" and row["class"] not in BACKTEST for row in rows)
    kept.append({**dict.fromkeys(columns, ""), "transformers": release, "class": f"{others} other classes", "offset": 1,
                 "verdict": "correct", "expected": f"{skipped} skipped"})  # fmt: skip
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(sorted(kept, key=lambda row: [int(part) for part in row["transformers"].split(".")]))


def shrink(config):
    """Make the numbers of a configuration and of those in it small; lists with one entry per layer are cut."""
    for name, value in list(vars(config).items()):
        if isinstance(value, (transformers.PretrainedConfig, list, tuple)) or name.startswith("_"):
            if isinstance(value, transformers.PretrainedConfig):
                shrink(value)
            elif isinstance(value, list) and len(value) > 8 and name != "architectures":
                setattr(config, name, value[:LAYERS])
        elif isinstance(value, dict) and "mrope_section" in value:  # adds up to half of a head, or of its rotated part
            value["mrope_section"] = [2, 1, 1] if value.get("partial_rotary_factor", 1) < 1 else [4, 2, 2]
        elif name.endswith("token_id") or name.endswith("token_index"):
            if isinstance(value, int) and value >= VOCABULARY:
                setattr(config, name, VOCABULARY - 1 - sum(map(ord, name)) % 8)
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, new in RULES:
                if re.search(pattern, name):
                    setattr(config, name, new(value) if callable(new) else new)
                    break
    if config.model_type == "jetmoe":
        config.num_attention_heads = config.num_key_value_heads * config.num_experts_per_tok
        config.kv_channels = config.hidden_size // config.num_attention_heads
    for name, value in DEFAULTS.items():  # numbers that a class derives from others, or asks for
        if vars(config).get(name, value) is None:
            setattr(config, name, value)
    if hasattr(config, "languages"):
        config.default_language = config.languages[0]
    inner = {"mamba2": ("num_heads", "head_dim"), "bamba": ("mamba_n_heads", "mamba_d_head"), "zamba2": ("n_mamba_heads", "mamba_headdim")}
    if config.model_type in inner:  # heads times their size is the width of the inner layer
        count, size = inner[config.model_type]
        setattr(config, size, config.hidden_size * getattr(config, "expand", getattr(config, "mamba_expand", 2)) // getattr(config, count))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(rope, dict) and re.search(r"vl|glm", config.model_type):
        rope["mrope_section"] = [2, 1, 1] if rope.get("partial_rotary_factor", 1) < 1 else [4, 2, 2]
    for name in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, name, None) is None and (hasattr(config, name) or getattr(config, "is_encoder_decoder", False)):
            setattr(config, name, 0)
    return config


def find_classes():
    """Every generative class with a `labels` argument, by name; other modules of transformers do not hold any."""
    for name in sorted(dir(transformers)):
        if GENERATIVE.search(name) and not name.startswith(("TF", "Flax", "Auto", "_")):
            try:
                kind = getattr(transformers, name)
            except Exception as error:  # a package of its own is missing
                yield name, f"import: {type(error).__name__}"
                continue
            if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel):
                yield name, kind


def build(kind):
    config = shrink(kind.config_class())
    if not getattr(config, "is_encoder_decoder", False) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(config).parameters())
    if size > PARAMETERS:
        raise MemoryError(f"{size / 1e6:.0f} M parameters")
    return kind(config).float().eval()


def make_batches(model):
    """Batches to try in turn: text alone, then with the sounds or pictures that the class asks for."""
    text = audit.probe_batch(model)
    ids = text["labels"].masked_fill(text["labels"] == audit.IGNORE, 5)
    parameters = inspect.signature(model.forward).parameters
    config = model.config

    def find(name, default):
        for part in (config, *(value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig))):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
        return default

    size = find("image_size", 32)
    pictures = {"pixel_values": torch.randn(3, find("num_channels", 3), size, size)}
    mels = {"input_features": torch.randn(3, find("num_mel_bins", 80), 2 * find("max_source_positions", 20))}
    sound = {"input_values": torch.randn(3, 4000)}
    labels = {"labels": ids}
    tries = []
    if "input_ids" in parameters and "GitForCausalLM" != type(model).__name__:
        tries.append(text)
    for extra in (pictures, mels, sound, {"input_features": mels["input_features"].transpose(1, 2)}):
        if set(extra) <= set(parameters):
            tries += [{**text, **extra}] if "input_ids" in parameters else []
            tries.append({**extra, **labels})
    if "input_features" in parameters:
        shape = mels["input_features"].transpose(1, 2)
        for mask in ("attention_mask", "feature_attention_mask"):
            if mask in parameters:
                tries.append({"input_features": shape, mask: torch.ones(shape.shape[:2], dtype=torch.long), **labels})
    return tries


def audit_class(kind) -> dict:
    """The row of one class, or {"skipped": reason}."""
    if "labels" not in inspect.signature(kind.forward).parameters:
        return {"skipped": "no labels argument"}
    try:
        model = build(kind)
        batches = make_batches(model)
    except Exception as error:
        return {"skipped": f"not built: {type(error).__name__}", "why": str(error)}
    problem = None
    for batch in batches:
        try:
            found = audit.audit_loss(model, batch)
        except Exception as error:
            problem = problem or error
            continue
        if found["faults"] != ["no_loss"]:
            return {**found, "input": "+".join(name for name in batch if name not in ("labels", "attention_mask"))}
        problem = problem or ValueError("no loss")
    return {"skipped": f"not run: {type(problem).__name__}", "why": str(problem)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="parts of class names, with commas")
    parser.add_argument("--backtest", action="store_true", help="all classes; keeps the flagged ones, those of BACKTEST and a count")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "results" / "audit")
    options = parser.parse_args()
    start, rows, skipped = time.perf_counter(), [], Counter()
    for name, kind in find_classes():
        if options.only and not any(part.lower() in name.lower() for part in options.only.split(",")):
            continue
        found = {"skipped": kind} if isinstance(kind, str) else audit_class(kind)
        if options.only or os.environ.get("VERBOSE"):
            print(name, {k: v for k, v in found.items() if k != "constant"}, flush=True)
        if "skipped" in found:
            skipped[found["skipped"]] += 1
        else:
            columns = ("offset", "leaks_across_rows", "ignores_minus_100", "normalisation", "honours_num_items", "input", "verdict")
            kept = {column: found.get(column) for column in columns}
            rows.append({"class": name, **kept, "convention_or_fault": explain(name) if found["faults"] else ""})
    print(f"transformers {transformers.__version__}: {len(rows)} classes audited in {time.perf_counter() - start:.0f} s, "
          f"{sum(row['verdict'] != 'correct' for row in rows)} flagged; skipped {sum(skipped.values())}: {dict(skipped)}")  # fmt: skip
    if options.backtest:
        add_release(options.out / "backtest.csv", rows, sum(skipped.values()))
    elif rows and not options.only:
        with open(options.out / f"transformers_{transformers.__version__}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    sys.exit(main())
