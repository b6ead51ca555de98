"""The LoRA setup: tokenizer, 4-bit base model, LoRA adapter, and the merged model that evaluation uses."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medqa_lib.config import LoraSettings, Profile
from medqa_lib.prompts import encode_prompt
from medqa_lib.reasons import CUT, hub_answers, hub_reason
from medqa_lib.standin import model_path

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compute_dtype() -> torch.dtype:
    """bfloat16 from capability 8.0, float16 below (a T4 only emulates bfloat16), float32 without a GPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def is_sharded() -> bool:
    """Whether `accelerate launch` shards the model over several GPUs (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight that FSDP has sharded, gathered (each process must call this); any other as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


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

    One that will be sharded stays on the CPU, in a storage dtype that FSDP can split.

    Raises:
        RuntimeError: it can be neither downloaded nor found in the cache, or is no whole causal model.
    """
    path = model_path(profile)
    if torch.cuda.is_available() or is_sharded():
        return _load(path, quantized)
    changed = max((file.stat().st_mtime_ns for file in Path(path).glob("*")), default=0)  # of a local folder
    return copy.deepcopy(_load_once(path, quantized, changed))  # quantising takes 20 times as long as a copy


@functools.lru_cache(maxsize=1)
def _load_once(path: str, quantized: bool, changed: int) -> PreTrainedModel:
    return _load(path, quantized)


@contextlib.contextmanager
def _quantize_on(device):
    """Quantise the CPU's weights on a GPU, one after another: a CPU takes 5 minutes for 8 billion."""
    from bitsandbytes import functional

    quantize = functional.quantize_4bit

    def there_and_back(weight, *args, **kwargs):
        packed, state = quantize(weight.to(device), *args, **kwargs)
        state.to(weight.device)
        return packed.to(weight.device), state

    functional.quantize_4bit = there_and_back
    try:
        yield
    finally:
        functional.quantize_4bit = quantize


def _load(path: str, quantized: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=compute_dtype(),
                             bnb_4bit_quant_storage=compute_dtype() if is_sharded() else torch.uint8)
    gpu = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else None
    device = "cpu" if gpu is None or is_sharded() else gpu
    if gpu is not None:
        torch.cuda.set_device(gpu)  # kernels of our own start on the current one
    with contextlib.nullcontext() if gpu is None or device == gpu else _quantize_on(gpu):
        model, loaded = _from_pretrained(AutoModelForCausalLM, path, dtype=compute_dtype(),
                                         device_map={"": device}, output_loading_info=True,
                                         **({"quantization_config": nf4} if quantized else {}))
    if missing := sorted(loaded["missing_keys"]):
        raise RuntimeError(f"{path!r} lacks {len(missing)} of the weights of {type(model).__name__}, such as "
                           f"{missing[0]}; {len(loaded['unexpected_keys'])} have unknown names. It was saved "
                           "from a wrapper that renames weights, or not as a whole.")
    if quantized and not any(hasattr(weight, "quant_state") for weight in model.parameters()):
        raise RuntimeError(f"{path!r}: bitsandbytes finds no layer of {type(model).__name__} for 4 bits.")
    for module in model.modules() if device == "cpu" else ():
        # On a CPU with AVX512-BF16 bitsandbytes would repack the weights at the first forward pass without
        # gradients. `dequantize` does not know that layout and would return other weights, without an error.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False  # a training default; generation asks for its cache itself
    return model


def _from_pretrained(auto_class, path: str, **options):
    from transformers.utils import find_adapter_config_file, logging

    is_folder = Path(path).is_dir()
    for file in filter(Path.is_file, Path(path).iterdir()) if is_folder else ():
        if file.stat().st_size < 1000 and file.read_bytes().startswith(b"version https://git-lfs."):
            raise RuntimeError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` there.")
    if not is_folder and not hub_answers():
        print(f"The Hub does not answer: {path} is taken from the cache.")
        options["local_files_only"] = True
    logging.disable_progress_bar()  # with its widgets GitHub does not render a notebook
    logging.set_verbosity_error()  # what it would report of missing weights is raised
    try:
        adapter = find_adapter_config_file(path, local_files_only=options.get("local_files_only", False))
        loaded = None if adapter else auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # each library that reads a file has errors of its own
        what = "Check the model's name in notebook 00, or run again: files already fetched are kept"
        if is_folder:
            what = "The folder must hold config.json, safetensors and tokenizer of a causal language model"
        reason = "a file is damaged or was cut short" if hub_reason(error) == CUT else hub_reason(error)
        raise RuntimeError(f"{path!r} could not be loaded: {reason}. {what}.") from error
    if adapter:
        base = json.loads(Path(adapter).read_text("utf-8")).get("base_model_name_or_path")
        raise RuntimeError(f"{path!r} is an adapter, not a model: choose the model it belongs to, {base!r}.")
    return loaded


def context_length(model: PreTrainedModel) -> int:
    """How many tokens the model reads at once: what its configuration says, or 2**20."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20


@torch.no_grad()
def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop before hours are spent on a model and a tokenizer that cannot be trained or evaluated.

    Raises:
        ValueError: the tokenizer has no EOS, not the model's, or ids that the model has not; or logits are
            not finite, or depend on later tokens.
    """
    eos, own = tokenizer.eos_token_id, model.generation_config.eos_token_id
    own, name = own if isinstance(own, list) else [own], type(model).__name__
    if eos is None:
        raise ValueError(f"The tokenizer of {name} has no EOS: no answer would end. Set its eos_token.")
    if own != [None] and eos not in own:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in own)
        raise ValueError(f"The tokenizer's EOS is {tokenizer.eos_token!r} ({eos}), the model's is {names}: "
                         "it would never stop. Correct the tokenizer's eos_token.")
    # Without added tokens: some tokenizers have one for images, which no text of ours holds.
    text_ids = set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys()
    largest = max(text_ids | {eos, tokenizer.pad_token_id or eos})
    size = len(model.get_input_embeddings().weight)
    if largest >= size:
        raise ValueError(f"The tokenizer has ids up to {largest}, {name} embeds {size}: they do not belong "
                         "together. Take the tokenizer of this model, or resize the model's embeddings.")
    prompt = encode_prompt(tokenizer, "What is gout?")
    if len(prompt) < 5 or set(prompt) <= {tokenizer.unk_token_id, tokenizer.bos_token_id}:
        raise ValueError(f"The tokenizer of {name} cannot read plain English: it is empty, or another's.")
    ids = torch.tensor([prompt, [*prompt[:-1], eos]], device=model.device)
    try:
        logits = model(ids).logits.float()
    except Exception as error:  # a weight of another shape, for instance
        raise ValueError(f"{name} cannot read a prompt: {' '.join(str(error).split())[:200]}") from error
    if not logits.isfinite().all():
        raise ValueError(f"{name} gives logits that are not finite: weights are damaged, or too large for "
                         f"{model.dtype}.")
    first, second = logits[:, :-1]  # they differ in the last token only
    if (first - second).norm() > (1e-5 if model.dtype == torch.float32 else 1e-2) * first.norm():
        raise ValueError(f"{name} lets a position see later tokens: it is no causal language model.")


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int = 42) -> PeftModel:
    """Freeze the model and add a LoRA adapter in float32; the same seed gives the same start.

    `prepare_model_for_kbit_training` is left out: it makes embeddings, norms and head float32, which takes a
    fifth more memory for activations and changes nothing here.

    Raises:
        ValueError: the model lacks one of the target modules; the message names those that it has.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    targets = "all-linear" if "all-linear" in settings.target_modules else list(settings.target_modules)
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    lacking = [name for name in targets if name.rpartition(".")[2] not in ends]
    if lacking and targets != "all-linear":
        usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
        raise ValueError(f"{type(model).__name__} has no layers {', '.join(lacking)} for LoRA. PEFT takes "
                         f"LoraSettings(target_modules={usual or ['all-linear']})"
                         + (", or all: ['all-linear']." if usual else "."))
    fields = asdict(settings) | {"target_modules": targets}
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
    0.21, since the adapter was trained on the quantised ones. A `base` in NF4 is changed in place; one that
    was not quantised stays as it is.
    """
    from peft import PeftModel

    model = base or load_base_model(profile)
    model = model.dequantize(dtype=compute_dtype()) if getattr(model, "is_quantized", False) else model
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload()
    return model.to(compute_dtype()).eval()
