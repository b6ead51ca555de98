"""Greedy decoding at the speed of the hardware, for a plain LlamaForCausalLM on a GPU of capability 7.5.

`generate()` waits for the CPU: it launches hundreds of small kernels per token. Here the decode step is
captured once as a CUDA graph and replayed. The model's own `forward` computes it, with torch's fused RMSNorm.
On a CPU the same steps run without graphs, which is how tests compare them with `generate()`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from medqa_lib.model import cache_argument

SLOT_BUCKET = 128  # attention reads the cache up to a multiple of this: one graph serves as many steps
ROW_BUCKET = 32  # a shrunk batch keeps a multiple of this many rows, so that batches share graphs
CHECK_STEPS = 32  # steps between two looks at which rows have finished; each look waits for the GPU


def is_supported(model) -> bool:
    """Whether `FastDecoder` can decode this: plain Llama without adapter, sdpa, capability 7.5."""
    linear = {type(module) for module in model.modules() if hasattr(module, "in_features")}
    return (type(model) is LlamaForCausalLM and linear == {torch.nn.Linear} and model.device.type == "cuda"
            and model.config._attn_implementation == "sdpa"
            and torch.cuda.get_device_capability(model.device) >= (7, 5))


def attend_grouped(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of one position without repeated keys: (B, H, 1, D) as (B, key heads, H / key heads, D)."""
    rows, heads, _, head_dim = query.shape
    query = query.reshape(rows, key.shape[1], -1, head_dim)
    out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, head_dim), None


AttentionInterface.register("medqa_grouped", attend_grouped)


@contextmanager
def decoding_layers(model):
    """Attention of one position; each RMSNorm in one kernel instead of seven (it rounds once, not twice)."""
    attention = model.config._attn_implementation
    norms = [module for module in model.modules() if type(module) is LlamaRMSNorm]
    model.set_attn_implementation("medqa_grouped")
    for norm in norms:
        norm.forward = partial(rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight,
                               eps=norm.variance_epsilon)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        for norm in norms:
            del norm.forward


class _CacheView:
    """What attention sees as its cache: rows and slots of the buffers, (layers, B, key heads, slots, D)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor):
        self.keys, self.values, self.slot = keys, values, slot

    def update(self, key, value, layer: int, *_, **__):
        """Write (B, key heads, 1, D) at the current slot; return all slots: later ones are masked."""
        self.keys[layer].index_copy_(2, self.slot, key)
        self.values[layer].index_copy_(2, self.slot, value)
        return self.keys[layer], self.values[layer]


class FastDecoder:
    """Callable (ids, mask, max_new_tokens) -> new ids per row up to and including EOS; keeps its graphs."""

    def __init__(self, model: LlamaForCausalLM, eos_id: int):
        self.model, self.eos_id, self.size = model, eos_id, (0, 0, 0)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int) -> list[list[int]]:
        rows, width = ids.shape
        self._reserve(rows, -(-(width + max_new_tokens) // SLOT_BUCKET) * SLOT_BUCKET, max_new_tokens)
        self._prefill(ids, mask)
        owners, answers, done = list(range(rows)), [[]] * rows, 1
        with decoding_layers(self.model):
            while done < max_new_tokens and owners:
                slot = width + done - 1
                length = (slot // SLOT_BUCKET + 1) * SLOT_BUCKET
                steps = min(max_new_tokens - done, CHECK_STEPS, length - slot)
                self._advance(len(owners), length, steps)
                done += steps
                owners = self._drop_finished(owners, answers, done, slot + steps)
        for owner, row in zip(owners, self.tokens[: len(owners), :max_new_tokens].tolist(), strict=True):
            answers[owner] = row
        return [ids[: ids.index(self.eos_id) + 1] if self.eos_id in ids else ids for ids in answers]

    def _reserve(self, rows: int, slots: int, new_tokens: int) -> None:
        """Buffers for so many rows, cache slots and new tokens. Zeros: a masked NaN would still spread."""
        if all(have >= need for have, need in zip(self.size, (rows, slots, new_tokens), strict=True)):
            return
        self.keys = self.values = self.pool = None
        self.graphs, self.size = {}, (rows, slots, new_tokens)
        model, config = self.model, self.model.config
        head_dim = model.model.layers[0].self_attn.head_dim
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, head_dim)
        self.keys, self.values = (model.lm_head.weight.new_zeros(shape) for _ in range(2))
        sizes = rows, rows, (rows, new_tokens), 1, 1  # also slot and step: a graph reads no numbers
        self.last, self.padding, self.tokens, self.slot, self.step = (
            torch.zeros(size, device=model.device, dtype=torch.long) for size in sizes)

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """The prompts as `generate()` computes them; their keys and values are copied to the buffers."""
        rows, width = ids.shape
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                            logits_to_keep=1, **{cache_argument(): cache}).logits
        for layer, kept in enumerate(cache.layers):
            self.keys[layer, :rows, :, :width] = kept.keys
            self.values[layer, :rows, :, :width] = kept.values
        self.padding[:rows] = width - mask.sum(-1)
        self.slot.fill_(width)
        self.step.zero_()
        self._take(logits, rows)

    def _take(self, logits: torch.Tensor, rows: int) -> None:
        """Each row's next token: the argmax in float32, as `generate()` takes it."""
        self.last[:rows] = logits[:, -1].float().argmax(-1)
        self.tokens[:rows].index_copy_(1, self.step, self.last[:rows, None])
        self.step += 1

    def _forward(self, rows: int, length: int) -> None:
        """One token for each of the first `rows` rows, from buffers to buffers: it can be captured."""
        slots, padding = torch.arange(length, device=self.slot.device), self.padding[:rows, None]
        hidden = (slots < padding) | (slots > self.slot)
        bias = torch.zeros_like(hidden, dtype=self.model.dtype).masked_fill(hidden, float("-inf"))
        cache = _CacheView(self.keys[:, :rows, :, :length], self.values[:, :rows, :, :length], self.slot)
        logits = self.model(input_ids=self.last[:rows, None], attention_mask=bias[:, None, None],
                            position_ids=self.slot - padding, use_cache=True,
                            **{cache_argument(): cache}).logits
        self.slot += 1
        self._take(logits, rows)

    def _advance(self, rows: int, length: int, steps: int) -> None:
        """`steps` tokens. A shape's first step runs eagerly, as capture needs; capture computes nothing."""
        replay = self.graphs.get((rows, length))
        if replay is None:
            self._forward(rows, length)
            steps -= 1
            replay = self.graphs[rows, length] = self._capture(rows, length)
        for _ in range(steps):
            replay()

    def _capture(self, rows: int, length: int):
        """Callable that repeats `_forward` for this shape: a graph's replay, on a CPU the function itself."""
        if self.slot.device.type == "cpu":
            return lambda: self._forward(rows, length)
        graph, self.pool = torch.cuda.CUDAGraph(), self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # one pool for all
            self._forward(rows, length)
        return graph.replay

    def _drop_finished(self, owners: list[int], answers: list, done: int, slots: int) -> list[int]:
        """Move unfinished rows to the front if that leaves out a quarter; returns which are still decoded."""
        rows = len(owners)
        finished = (self.tokens[:rows, :done] == self.eos_id).any(1).tolist()
        keep = -(-finished.count(False) // ROW_BUCKET) * ROW_BUCKET
        if keep > 0.75 * rows:
            return owners
        for owner, ids in zip(owners, self.tokens[:rows, :done].tolist(), strict=True):
            answers[owner] = ids
        order = sorted(range(rows), key=finished.__getitem__)[:keep]
        index = torch.tensor(order, device=self.slot.device, dtype=torch.long)
        caches = *self.keys[:, :, :, :slots], *self.values[:, :, :, :slots]
        for buffer in (self.last, self.padding, self.tokens, *caches):
            buffer[:keep] = buffer[index]
        return [owners[row] for row in order]
