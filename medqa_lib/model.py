"""The LoRA setup: tokenizer, 4-bit base model, LoRA adapter, and the merged model that evaluation uses."""

from __future__ import annotations

import functools
import inspect
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medqa_lib.config import LoraSettings, Profile
from medqa_lib.reasons import hub_reason
from medqa_lib.standin import hub_answers, model_path

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compute_dtype() -> torch.dtype:
    """bfloat16 from capability 8.0, float16 below (a T4 only emulates bfloat16), float32 without a GPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


@functools.cache
def cache_argument() -> str:
    """What `forward` calls earlier keys and values: `cache`, before transformers 5.24 `past_key_values`."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def load_tokenizer(profile: Profile | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with EOS as padding where it has none: the collator never supervises padding."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model_path(profile))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_base_model(profile: Profile | None = None, quantized: bool = True) -> PreTrainedModel:
    """The untuned model on this process's device: NF4 with double quantisation, or in the compute dtype.

    Raises:
        RuntimeError: it can be neither downloaded nor found in the cache.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=compute_dtype())
    device = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
    model = _from_pretrained(AutoModelForCausalLM, model_path(profile), dtype=compute_dtype(),
                             device_map={"": device}, attn_implementation="sdpa",
                             **({"quantization_config": nf4} if quantized else {}))
    for module in model.modules() if device == "cpu" else ():
        # On a CPU with AVX512-BF16 bitsandbytes would repack the weights at the first forward pass without
        # gradients. `dequantize` does not know that layout and would return other weights, without an error.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False  # a training default; generation asks for its cache itself
    return model


def _from_pretrained(auto_class, path: str, **options):
    from transformers.utils import logging

    if not Path(path).exists() and not hub_answers():
        print(f"The Hub does not answer: {path} is taken from the cache.")
        options["local_files_only"] = True
    logging.disable_progress_bar()  # with its widgets GitHub does not render a notebook
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except OSError as error:
        raise RuntimeError(f"{path!r} could not be loaded: {hub_reason(error)}. Check the model's name in "
                           "notebook 00, or run again: files already fetched are kept.") from None


def check_eos_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop unless the tokenizer's EOS, which training appends, is one that ends the model's own answers.

    Raises:
        ValueError: it is another one; the message names both.
    """
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    if own != [None] and tokenizer.eos_token_id not in own:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in own)
        raise ValueError(f"The tokenizer's EOS is {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), the "
                         f"model's is {names}: it would never stop. Correct the tokenizer's eos_token.")


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int = 42) -> PeftModel:
    """Freeze the model and add a LoRA adapter in float32; the same seed gives the same start.

    `prepare_model_for_kbit_training` is left out: it makes embeddings, norms and head float32, which takes a
    fifth more memory for activations and changes nothing here.
    """
    from peft import LoraConfig, get_peft_model

    fields = asdict(settings) | {"target_modules": list(settings.target_modules)}
    revision = getattr(model.config, "_commit_hash", None)  # the Hub's, if the model came from there
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", revision=revision, **fields))


def trainable_share(model: PeftModel) -> tuple[int, float]:
    """Trainable parameters and their share of all; a 4-bit weight counts as the parameters it stands for."""
    trainable, total = model.get_nb_trainable_parameters()
    return trainable, trainable / total


def load_merged(adapter_dir: str | Path | None = None, profile: Profile | None = None,
                base: PreTrainedModel | None = None) -> PreTrainedModel:
    """The model that evaluation uses: NF4 base dequantised to the compute dtype, the adapter merged into it.

    In this order merging adds a relative logit error of 0.010; in 4 bits 0.18, into the original weights
    0.21, since the adapter was trained on the quantised ones. A `base` in NF4 is changed in place.
    """
    from peft import PeftModel

    model = (base or load_base_model(profile)).dequantize(dtype=compute_dtype())
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload()
    return model.to(compute_dtype()).eval()
