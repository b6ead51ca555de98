"""How a training step is computed on this GPU: by which path, in which precision, how many rows at a time.

None of it changes the recipe: a step has as many examples and the same loss whatever is planned.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from medqa_lib.fast.train import install_fast_layers, triton
from medqa_lib.labels import IGNORE_INDEX

PATHS = ("fast", "padding_free", "padded")
PROBE_TOKENS = 1024


class FlatCollator:
    """Examples laid end to end, without padding: T tokens in one row, and where each document starts.

    Attention reads the starts, so no document sees another. The first label of a document is ignored: the shift inside the
    loss would otherwise have the document before predict it.
    """

    def __call__(self, examples: list[dict]) -> dict:
        """input_ids, labels, position_ids (1, T), cu_seq_lens_q (N + 1) and max_length_q of N examples."""
        lengths = [len(example["input_ids"]) for example in examples]
        ids = torch.tensor([token for example in examples for token in example["input_ids"]])
        labels = torch.tensor([label for example in examples for label in (IGNORE_INDEX, *example["labels"][1:])])
        starts = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.arange(len(ids)) - starts[:-1].repeat_interleave(torch.tensor(lengths))
        return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None], "cu_seq_lens_q": starts.int(),
                "max_length_q": max(lengths)}


@dataclass(frozen=True)
class TrainingPlan:
    """What `plan_training` chose. `per_device_train_batch_size * gradient_accumulation_steps * processes` is the effective batch.

    Attributes:
        path: "fast" (`fast_train`), "padding_free" (no padding, varlen attention, transformers' layers) or "padded" (the plain way).
        keep_weights: fast path only: keep the dequantised weights instead of dequantising at every use.
        why: the choice and its reason in one line.
    """

    path: str
    dtype: torch.dtype
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    keep_weights: bool
    why: str

    def halved(self) -> TrainingPlan:
        """The plan to go on with after running out of memory: at most half as many rows at a time, as many in a step.

        Raises:
            ValueError: there is a single row a time already.
        """
        if self.per_device_train_batch_size == 1:
            raise ValueError("Out of memory with one row at a time: shorten max_length or take a larger GPU.")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        per_device_train_batch_size = largest_divisor(rows, self.per_device_train_batch_size // 2)
        gradient_accumulation_steps = rows // per_device_train_batch_size
        return dataclasses.replace(self, per_device_train_batch_size=per_device_train_batch_size, gradient_accumulation_steps=gradient_accumulation_steps,
                                   why=f"{self.path}, {per_device_train_batch_size} rows x {gradient_accumulation_steps}: {self.per_device_train_batch_size} did not fit")

    def collator(self, padding_collator: Callable) -> Callable:
        """The collator of this path; the padded one is the caller's."""
        return padding_collator if self.path == "padded" else FlatCollator()

    def trainer_arguments(self) -> dict:
        """What `transformers.TrainingArguments` must be told; the rest is the experiment's."""
        arguments = {"per_device_train_batch_size": self.per_device_train_batch_size, "gradient_accumulation_steps": self.gradient_accumulation_steps,
                     "bf16": self.dtype == torch.bfloat16, "fp16": self.dtype == torch.float16, "optim": "adamw_torch_fused"}
        if self.path != "padded":  # the CPU must never wait for the GPU: no look at the loss, no blocking copy
            arguments |= {"logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": True}, "dataloader_pin_memory": True}
        return arguments


def plan_training(model, total_batch_size: int = 32, max_length: int = 512, *, path: str | None = None, dtype: torch.dtype | None = None,
                  per_device_train_batch_size: int | None = None, keep_weights: bool | None = None, free_bytes: int | None = None,
                  processes: int = 1) -> TrainingPlan:
    """Choose from the GPU and the model, and leave the PEFT `model` ready for the chosen path. Each choice can be given instead.

    Args:
        free_bytes: memory that training may take, by default what the GPU has free.
        processes: how many train together. Each must call this; the one with the least memory decides how many rows all take at a time.
    Raises:
        ValueError: unknown path, a path or micro-batch that cannot be had here, or rows that cannot be shared equally among the processes.
    """
    if total_batch_size % processes:
        raise ValueError(f"A step of {total_batch_size} rows cannot be shared equally among {processes} processes: the recipe would change. "
                         f"Start {largest_divisor(total_batch_size, processes)}, or another number that divides {total_batch_size}.")
    fast, reason = supports_fast_layers(model)
    device = next(model.parameters()).device
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if path is None:
        path = "fast" if fast else "padding_free" if modern and os.environ.get("MEDQA_FAST") != "0" else "padded"
    if path not in PATHS or (path == "fast" and not fast) or (path == "padding_free" and not modern):
        raise ValueError(f"Path {path!r} cannot be had here ({reason or 'no GPU of capability 8.0'}); expected one of {PATHS}.")
    rows = total_batch_size // processes
    if device.type != "cuda":
        per_device_train_batch_size = per_device_train_batch_size or _smallest_of_all(largest_divisor(rows, 8), processes)
        return _plan(path, dtype or torch.float32, per_device_train_batch_size, rows, False, f"CPU: {reason}")
    free_bytes = free_bytes or torch.cuda.mem_get_info(device)[0]
    weight_bytes = 2 * sum(layer.in_features * layer.out_features for name, layer in model.named_modules() if name.endswith("_proj"))
    if keep_weights is None:
        keep_weights = path == "fast" and weight_bytes < free_bytes / 4
    dtype = dtype or (torch.bfloat16 if modern else torch.float16)
    prepare_model(model, path, keep_weights)
    token_bytes = measure_bytes_per_token(model, path, dtype)
    fits = max(1, int(0.8 * (free_bytes - keep_weights * weight_bytes) / (token_bytes * max_length)))
    per_device_train_batch_size = per_device_train_batch_size or _smallest_of_all(largest_divisor(rows, fits), processes)
    name = torch.cuda.get_device_name(device)
    why = f"{name}, {free_bytes / 2**30:.0f} GiB free, {token_bytes / 2**20:.2f} MiB a token, so {fits} rows of {max_length} tokens fit"
    return _plan(path, dtype, per_device_train_batch_size, rows, keep_weights, f"{why}; {reason}" if reason else why)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _smallest_of_all(number: int, processes: int) -> int:
    """The smallest of the processes' numbers: with unequal micro-batches they would take unequal shares of a step."""
    if processes == 1:
        return number
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())  # joins the process group; the Trainer takes it over
    return min(gather_object([number]))


def _plan(path: str, dtype: torch.dtype, per_device_train_batch_size: int, rows: int, keep_weights: bool, why: str) -> TrainingPlan:
    if rows % per_device_train_batch_size:
        raise ValueError(f"per_device_train_batch_size {per_device_train_batch_size} does not divide the {rows} rows that this process has in a step.")
    gradient_accumulation_steps = rows // per_device_train_batch_size
    return TrainingPlan(path, dtype, per_device_train_batch_size, gradient_accumulation_steps, keep_weights, f"{path}, {per_device_train_batch_size} rows x {gradient_accumulation_steps}: {why}")


def supports_fast_layers(model) -> tuple[bool, str]:
    """Whether the fast path computes this model exactly on this machine, and if not, why not."""
    device = next(model.parameters()).device
    if os.environ.get("MEDQA_FAST") == "0":
        return False, "MEDQA_FAST is 0"
    if triton is None or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False, "it needs Triton and a GPU of capability 8.0 or more"
    return supports_architecture(model)


def supports_architecture(model) -> tuple[bool, str]:
    """The part of `supports_fast_layers` that depends on the model alone."""
    causal, adapter = model.get_base_model(), model.active_adapter
    config = causal.config
    if type(causal).__name__ != "LlamaForCausalLM" or config.hidden_act != "silu" or config.attention_dropout:
        return False, f"it is written for Llama with SiLU and no attention dropout, not {type(causal).__name__}"
    if config.attention_bias or config.mlp_bias:
        return False, "linear layers have biases"
    tuned = [module for module in model.modules() if hasattr(module, "lora_A")]
    known = {id(part[adapter].weight) for module in tuned for part in (module.lora_A, module.lora_B)}
    other = [name for name, parameter in model.named_parameters() if parameter.requires_grad
             and not (id(parameter) in known and re.search(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.", name))]
    if other:  # DoRA's magnitudes, LoRA on the head, biases: parameters that would get no gradient
        return False, f"{other[0]} is trained and is not LoRA of a decoder layer's linear layer"
    if any(module.lora_variant or module.merged or module.disable_adapters for module in tuned):
        return False, "the adapter is a variant of LoRA, merged or disabled"
    if len({(module.r[adapter], module.scaling[adapter], str(module.lora_dropout[adapter])) for module in tuned}) != 1:
        return False, "rank, scaling or dropout differ between layers, or there is no adapter"
    return True, ""


def prepare_model(model, path: str, keep_weights: bool = True) -> None:
    """Let `model` take the batches of the path's collator. Other calls (generation, padded batches) work as before."""
    causal = model.get_base_model()
    causal.__dict__.pop("forward", None)
    if path == "fast":
        install_fast_layers(model, keep_weights)
    if path == "padding_free":
        causal.forward = partial(_flattened_forward, causal, causal.forward)


def _flattened_forward(causal, original, *args, **inputs):
    """transformers' own forward pass, with varlen attention where the batch is flattened."""
    if "cu_seq_lens_q" not in inputs:
        return original(*args, **inputs)
    from transformers import AttentionInterface

    AttentionInterface.register("medqa_varlen", _attend_varlen)  # registered without a mask: attention goes by the starts
    before, causal.config._attn_implementation = causal.config._attn_implementation, "medqa_varlen"
    try:
        return original(*args, **{**inputs, "use_cache": False})
    finally:
        causal.config._attn_implementation = before


def _attend_varlen(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_):
    """(1, heads, T, D) queries, causal within each document; grouped-query heads are read natively."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = torch.get_autocast_dtype("cuda") if query.dtype == torch.float32 else query.dtype  # DoRA leaves float32, flash takes 16 bits
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    out = varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0))
    return out[None], None


def measure_bytes_per_token(model, path: str, dtype: torch.dtype) -> float:
    """Peak memory of one forward and backward pass, a token. Draws no random number that training would."""
    half = [{"input_ids": [1] * (PROBE_TOKENS // 2), "labels": [1] * (PROBE_TOKENS // 2)}] * 2
    batch = FlatCollator()(half)
    if path == "padded":
        ids = batch["input_ids"].view(2, -1)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    device = next(model.parameters()).device
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    training = model.training
    with torch.random.fork_rng(devices=[device]):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast("cuda", dtype):
            loss = model.train()(**batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        model.train(training)
    return (torch.cuda.max_memory_allocated(device) - before) / PROBE_TOKENS
