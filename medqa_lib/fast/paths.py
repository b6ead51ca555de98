"""Which fast path a PEFT model may take on this GPU, and the proof before a run that it computes the same."""

from __future__ import annotations

import re
from functools import partial

import torch

from medqa_lib.fast.train import install_fast_layers, remove_fast_layers, triton
from medqa_lib.labels import IGNORE_INDEX
from medqa_lib.model import compute_dtype

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.02, 0.2  # see `disprove`
PROOF_SCALE = 1024.0  # of the loss: float16 has no smaller gradients


def choose_path(model, wanted: str | None = None, examples: list[dict] | None = None) -> tuple[str, str]:
    """(fastest path proved exact for this model here, why not a faster one); `wanted`: try no other."""
    reasons = []
    for path in ("fast", "padding_free"):
        if wanted in (None, path):
            reason = refuse(model, path) or disprove(model, path, examples)
            if not reason:
                return path, "; ".join(reasons)
            reasons.append(f"not {path}: {reason}")
    return "padded", "; ".join(reasons)


def refuse(model, path: str) -> str:
    """Why this machine or this model cannot take the path; "" if it can."""
    capability = torch.cuda.get_device_capability(next(model.parameters()).device)
    least = (7, 5) if path == "fast" else (8, 0)
    if capability < least:
        return f"it needs a GPU of capability {least[0]}.{least[1]} or more"
    if path == "padding_free":
        return ""
    return refuse_architecture(model) if triton else "it needs Triton and bitsandbytes"


def refuse_architecture(model) -> str:
    """The part of `refuse` for the fast path that depends on the model alone."""
    causal, adapter = model.get_base_model(), model.active_adapter
    config = causal.config
    if type(causal).__name__ != "LlamaForCausalLM" or config.hidden_act != "silu":
        return f"it is written for Llama with SiLU, not {type(causal).__name__}"
    if config.attention_dropout or config.attention_bias or config.mlp_bias:
        return "it is written for Llama without attention dropout and biases"
    tuned = [module for module in model.modules() if hasattr(module, "lora_A")]
    known = {id(part[adapter].weight) for module in tuned for part in (module.lora_A, module.lora_B)}
    linear = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.")
    other = [name for name, parameter in model.named_parameters()
             if parameter.requires_grad and not (id(parameter) in known and linear.search(name))]
    if other:  # DoRA's magnitudes, LoRA on the head, biases: parameters that would get no gradient
        return f"{other[0]} is trained and is not LoRA of a decoder layer's linear layer"
    if any(module.lora_variant or module.merged or module.disable_adapters for module in tuned):
        return "the adapter is a variant of LoRA, merged or disabled"
    if len({(ly.r[adapter], ly.scaling[adapter], str(ly.lora_dropout[adapter])) for ly in tuned}) != 1:
        return "rank, scaling or dropout differ between layers, or there is no adapter"
    return ""


def prepare(model, path: str) -> None:
    """Let the PEFT `model` take the path's batches, and forget an earlier path."""
    remove_fast_layers(model)
    torch.cuda.empty_cache()
    causal = model.get_base_model()
    if path == "fast":
        layers = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
        needed = 2 * sum(layer.in_features * layer.out_features for layer in layers)
        install_fast_layers(model, needed < torch.cuda.mem_get_info(causal.device)[0] / 4)
    if path == "padding_free":
        causal.forward = partial(_flattened_forward, causal, causal.forward)


def disprove(model, path: str, examples: list[dict] | None = None) -> str:
    """Why the path must not be used for this model; "" if it computes what transformers' own layers compute.

    Loss and gradients of a few examples laid end to end are compared with those of each example alone, with a
    B that is not zero and without dropout. So a wrong kernel, a document that sees another one, or attention
    that needs more than the documents' starts (sliding window, capped logits, state-space layers) is found
    before the first step. The loss may differ by 0.02, gradients of one kind of layer by 20% of their norm.
    A leak can be smaller than that, so the last document's logits must not change when the first one does.
    """
    from transformers import DataCollatorWithFlattening

    examples = examples or [{"input_ids": [*range(1, n)], "labels": [*range(1, n)]} for n in (50, 30)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    alone = [{name: [example[name]] for name in ("input_ids", "labels")} for example in examples]
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start, training = {name: weight.detach().clone() for name, weight in weights.items()}, model.training
    try:
        gpus = [model.device] if model.device.type == "cuda" else []  # none in a test
        with torch.random.fork_rng(gpus):  # the fast path draws seeds for dropout, too
            for name, parameter in weights.items():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.02)
            expected = _loss_and_gradients(model.eval(), alone)
            prepare(model, path)
            for _ in range(2):  # the first pass of the fast path compiles, the second records graphs
                found = _loss_and_gradients(model, [collate(examples)])
        return _compare(found, expected) or (_find_leak(model, examples, collate) if path != "fast" else "")
    except Exception as error:  # whatever it is, the padded path does without
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        remove_fast_layers(model)
        model.train(training)
        for name, parameter in weights.items():
            parameter.data.copy_(start[name])
            parameter.grad = None


def _loss_and_gradients(model, batches: list[dict]) -> tuple[float, dict]:
    """Mean loss over all targets and its gradients, one vector per kind of weight (name without layer)."""
    model.zero_grad(set_to_none=True)
    batches = [{name: torch.as_tensor(value, device=model.device) if not isinstance(value, int) else value
                for name, value in batch.items()} for batch in batches]
    targets, total = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches), 0.0
    for batch in batches:
        with torch.autocast("cuda", compute_dtype()):
            loss = model(**batch, num_items_in_batch=targets, use_cache=False).loss
        (loss * PROOF_SCALE).backward()
        total += float(loss.detach())
    kinds = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(parameter.grad.float().flatten())
    return total, {kind: torch.cat(parts) for kind, parts in kinds.items()}


@torch.no_grad()
def _find_leak(model, examples: list[dict], collate) -> str:
    """Whether a document sees the one before it; "" if not. Same shapes: without a leak nothing changes."""
    last = examples[-1]
    others = [examples[0], examples[0] | {"input_ids": examples[0]["input_ids"][::-1]}]
    logits = []
    for other in others:
        batch = {name: value.to(model.device) if torch.is_tensor(value) else value
                 for name, value in collate([other, last]).items()}
        with torch.autocast("cuda", compute_dtype()):
            logits.append(model(**batch, use_cache=False).logits[0, len(other["input_ids"]):].float())
    change = float((logits[0] - logits[1]).norm() / logits[0].norm())
    return "" if change < 1e-3 else f"logits change by {change:.1%} with the document before"


def _compare(found, expected) -> str:
    """What differs by more than the tolerance; "" if nothing does."""
    if not abs(found[0] - expected[0]) <= LOSS_TOLERANCE:  # not: NaN must fail
        return f"its loss is {found[0]:.4f}, transformers' {expected[0]:.4f}"
    for kind, gradient in expected[1].items():
        error = float((found[1][kind] - gradient).norm() / gradient.norm())
        if not error <= GRADIENT_TOLERANCE:
            return f"the gradient of {kind} differs by {error:.0%} from transformers'"
    return ""


def _flattened_forward(causal, original, *args, **inputs):
    """transformers' own forward pass, with varlen attention where the batch is flattened."""
    if "cu_seq_lens_q" not in inputs:
        return original(*args, **inputs)
    from transformers import AttentionInterface

    AttentionInterface.register("medqa_varlen", _attend_varlen)  # without a mask
    before, causal.config._attn_implementation = causal.config._attn_implementation, "medqa_varlen"
    try:
        return original(*args, **{**inputs, "use_cache": False})
    finally:
        causal.config._attn_implementation = before


def _attend_varlen(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                   **kwargs):
    """(1, heads, T, D) queries, causal within each document; grouped-query heads are read natively.

    Raises:
        NotImplementedError: the layer's attention is another one, which varlen_attn does not compute.
    """
    from torch.nn.attention.varlen import varlen_attn

    if other := [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(other)}")
    dtype = torch.get_autocast_dtype("cuda") if query.dtype == torch.float32 else query.dtype  # as DoRA
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    bounds = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    out = varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0))
    return out[None], None
