"""Which fast path a PEFT model may take on this GPU, and the proof before a run that it computes the same thing."""

from __future__ import annotations

import os
import re
from functools import partial

import torch

from medqa_lib.fast.train import install_fast_layers, remove_fast_layers, triton
from medqa_lib.model import compute_dtype

TOLERANCE = {"loss": 0.02, "gradient": 0.2}  # see `disprove`
PROOF_TOKENS = (70, 45)  # two short documents
PROOF_SCALE = 1024.0  # float16 has no smaller gradients


def choose_path(model, wanted: str | None = None) -> tuple[str, str]:
    """(fastest path proved exact for this PEFT model on this GPU, why not a faster one); only `wanted` is tried, if given."""
    reasons = []
    for path in ("fast", "padding_free"):
        if wanted in (None, path):
            reason = refuse(model, path) or disprove(model, path)
            if not reason:
                return path, "; ".join(reasons)
            reasons.append(f"not {path}: {reason}")
    return "padded", "; ".join(reasons)


def refuse(model, path: str) -> str:
    """Why this machine or this model cannot take the path; "" if it can."""
    capability = torch.cuda.get_device_capability(next(model.parameters()).device)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        return "FSDP shards the weights, and this path reads them whole"
    if capability < (8, 0):
        return "it needs a GPU of capability 8.0 or more"
    if path == "padding_free":
        return ""
    return refuse_architecture(model) if triton else "it needs Triton and bitsandbytes"


def refuse_architecture(model) -> str:
    """The part of `refuse` for the fast path that depends on the model alone."""
    causal, adapter = model.get_base_model(), model.active_adapter
    config = causal.config
    if type(causal).__name__ != "LlamaForCausalLM" or config.hidden_act != "silu" or config.attention_dropout:
        return f"it is written for Llama with SiLU and no attention dropout, not {type(causal).__name__}"
    if config.attention_bias or config.mlp_bias:
        return "linear layers have biases"
    tuned = [module for module in model.modules() if hasattr(module, "lora_A")]
    known = {id(part[adapter].weight) for module in tuned for part in (module.lora_A, module.lora_B)}
    linear = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.")
    other = [name for name, parameter in model.named_parameters()
             if parameter.requires_grad and not (id(parameter) in known and linear.search(name))]
    if other:  # DoRA's magnitudes, LoRA on the head, biases: parameters that would get no gradient
        return f"{other[0]} is trained and is not LoRA of a decoder layer's linear layer"
    if any(module.lora_variant or module.merged or module.disable_adapters for module in tuned):
        return "the adapter is a variant of LoRA, merged or disabled"
    if len({(module.r[adapter], module.scaling[adapter], str(module.lora_dropout[adapter])) for module in tuned}) != 1:
        return "rank, scaling or dropout differ between layers, or there is no adapter"
    return ""


def prepare(model, path: str) -> None:
    """Let the PEFT `model` take the path's batches, and forget an earlier path."""
    remove_fast_layers(model)
    torch.cuda.empty_cache()
    causal = model.get_base_model()
    if path == "fast":
        install_fast_layers(model, keep_weights(model))
    if path == "padding_free":
        causal.forward = partial(_flattened_forward, causal, causal.forward)


def keep_weights(model) -> bool:
    """Whether the dequantised weights fit into a quarter of the free memory."""
    layers = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
    needed = 2 * sum(layer.in_features * layer.out_features for layer in layers)
    return needed < torch.cuda.mem_get_info(next(model.parameters()).device)[0] / 4


def disprove(model, path: str) -> str:
    """Why the path must not be used for this model; "" if it computes what transformers' own layers compute.

    Loss and gradients of two short documents laid end to end are compared with those of each document alone, with a B that is not
    zero and no dropout. So a document that sees the other one, or attention that needs more than the documents' starts (a sliding
    window, a cap on its logits, state-space layers), is found before the first step. The loss may differ by 0.02, the gradients
    of all A or B of one kind of layer by 20% of their norm: rounding to 16 bits makes about 5%.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_base_model().config.vocab_size
    documents = [torch.randint(vocabulary, (1, tokens), generator=generator).to(device) for tokens in PROOF_TOKENS]
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start, training = {name: parameter.detach().clone() for name, parameter in weights.items()}, model.training
    with torch.random.fork_rng(devices=[device]), torch.no_grad():
        for name, parameter in weights.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    try:
        remove_fast_layers(model)
        expected = _losses_and_gradients(model.eval(), [{"input_ids": ids, "labels": ids} for ids in documents])
        prepare(model, path)
        for _ in range(2):  # the fast path's first pass compiles, its second one records and replays a graph
            found = _losses_and_gradients(model, [lay_end_to_end(documents)])
        return _compare(found, expected)
    except Exception as error:  # whatever it is, the padded path does without
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        remove_fast_layers(model)
        model.train(training)
        for name, parameter in weights.items():
            parameter.data.copy_(start[name])
            parameter.grad = None


def lay_end_to_end(documents: list[torch.Tensor]) -> dict:
    """The batch of `DataCollatorWithFlattening` for documents (1, T)."""
    starts = torch.tensor([0, *(ids.shape[1] for ids in documents)]).cumsum(0).int().to(documents[0].device)
    longest = max(ids.shape[1] for ids in documents)
    labels = torch.cat(documents, 1)
    labels[:, starts[:-1].long()] = -100
    positions = torch.cat([torch.arange(ids.shape[1], device=starts.device) for ids in documents])
    return {"input_ids": torch.cat(documents, 1), "labels": labels, "position_ids": positions[None], "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def _losses_and_gradients(model, batches: list[dict]) -> tuple[float, dict]:
    """Mean loss per target over the batches and its gradients, one vector per kind of weight (its name without the layer)."""
    model.zero_grad(set_to_none=True)
    targets = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, targets, strict=True):
        with torch.autocast("cuda", compute_dtype()):
            loss = model(**batch, use_cache=False).loss * (count / sum(targets))
        (loss * PROOF_SCALE).backward()
        total += float(loss.detach())
    kinds = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(parameter.grad.float().flatten())
    return total, {kind: torch.cat(parts) for kind, parts in kinds.items()}


def _compare(found, expected) -> str:
    """What differs by more than TOLERANCE; "" if nothing does."""
    if not abs(found[0] - expected[0]) <= TOLERANCE["loss"]:  # not: NaN must fail
        return f"its loss is {found[0]:.4f}, transformers' {expected[0]:.4f}"
    for kind, gradient in expected[1].items():
        error = float((found[1][kind] - gradient).norm() / gradient.norm())
        if not error <= TOLERANCE["gradient"]:
            return f"the gradient of {kind} differs by {error:.0%} from transformers'"
    return ""


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

    dtype = torch.get_autocast_dtype("cuda") if query.dtype == torch.float32 else query.dtype  # DoRA leaves float32
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    out = varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                      window_size=(-1, 0))
    return out[None], None
