"""The fast training path: a Llama with LoRA whose decoder layers are one autograd function each.

It computes what transformers and PEFT compute, on PEFT's own parameters, for documents laid end to end (T tokens, no padding):
checkpoints, callbacks, gradient clipping and `accelerate launch` see the model that they know. Needs bfloat16 on a GPU of
capability 8.0 or more; MEDQA_FAST=0 switches it off. What makes it fast, and why that is exact:

- NF4 is dequantised once instead of at every use: the same numbers, kept.
- q, k, v and gate, up are one matmul each, and LoRA's B is inside it (`LinearGroup`).
- What is cheap to compute again (norms, SwiGLU, dropout masks) is not stored (`fast_kernels`).
- Logits exist for answer tokens only, a few thousand at a time; the others have no part in the loss.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch

try:
    import triton
    from bitsandbytes.functional import dequantize_4bit

    from medqa_lib import fast_kernels as kernels
except ImportError:  # no Triton on this platform: the standard path is used
    triton = None

LOGIT_ROWS = 4096
PLAIN, NORM, SWIGLU = 0, 1, 2  # what a group's input is made from, see fast_kernels


class LinearGroup:
    """The linear layers that read one input, as one matmul: their weights lie below each other.

    To the right of the frozen weight (rows, W) lie LoRA's matrices B, and to the right of the input (T, W) lies
    xa = scaling * dropout(x) @ A.T. One matmul then gives W x + B xa, the sum that PEFT writes out.
    """

    def __init__(self, modules, adapter: str, keep_weights: bool):
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.width, heights = self.bases[0].in_features, [base.out_features for base in self.bases]
        self.rows = [slice(sum(heights[:i]), sum(heights[: i + 1])) for i in range(len(heights))]
        tuned = [(rows, module) for rows, module in zip(self.rows, modules, strict=True) if hasattr(module, "lora_A")]
        self.parameters = [part[adapter].weight for _, module in tuned for part in (module.lora_A, module.lora_B)]
        self.rank = self.parameters[0].shape[0] if tuned else 0
        self.pad = max(16, triton.next_power_of_2(self.rank))  # the matrix units take no fewer than 16 columns
        self.columns = len(tuned) * self.pad
        self.slots = [(rows, slice(self.width + i * self.pad, self.width + i * self.pad + self.rank)) for i, (rows, _) in enumerate(tuned)]
        self.scaling = tuned[0][1].scaling[adapter] if tuned else 1.0
        self.dropout = getattr(tuned[0][1].lora_dropout[adapter], "p", 0.0) if tuned else 0.0
        self.kept = self._dequantize() if keep_weights else None

    def _dequantize(self) -> torch.Tensor:
        """(rows, W + columns): bitsandbytes' own dequantised weights, and zeros where B goes. Rows begin on 128 bytes."""
        stride = -(-(self.width + self.columns) // 64) * 64
        base = self.bases[0].weight
        dtype = base.quant_state.dtype if hasattr(base, "quant_state") else base.dtype
        buffer = torch.zeros(self.rows[-1].stop, stride, dtype=dtype, device=base.device)[:, : self.width + self.columns]
        for rows, layer in zip(self.rows, self.bases, strict=True):
            state = getattr(layer.weight, "quant_state", None)
            buffer[rows, : self.width] = layer.weight.data if state is None else dequantize_4bit(layer.weight.data, state)
        return buffer

    def weight(self) -> torch.Tensor:
        """(rows, W + columns): the frozen weights with the present B beside them."""
        weight = self._dequantize() if self.kept is None else self.kept
        for slot, b in zip(self.slots, self.parameters[1::2], strict=True):
            weight[slot].copy_(b)
        return weight

    def _arguments(self, source, training: bool):
        """A's pointers (any tensor stands for one that is not used), the factor on xa and the constants that both kernels share."""
        p = self.dropout if training else 0.0
        a = (self.parameters[0::2] + [source] * 3)[:3]
        constants = dict(W=self.width, N=len(self.slots), RANK=self.rank, PAD=self.pad, THRESHOLD=round(p * 2**32))
        return a, self.scaling / (1.0 - p), constants

    def forward(self, mode: int, source, rstd, norm, training: bool, seed: int):
        """(T, rows) output and (T, columns) xa, of a source (T, W) or, for SWIGLU, (T, 2 W)."""
        tokens, weight = source.shape[0], self.weight()
        if mode == PLAIN and not self.slots:
            return source @ weight.t(), None
        a, factor, constants = self._arguments(source, training)
        x = torch.empty(tokens, weight.stride(0), dtype=source.dtype, device=source.device)
        kernels.group_input_kernel[triton.cdiv(tokens, 16),](
            source, rstd, norm, *a, x, tokens, seed, factor, STRIDE=x.stride(0), MODE=mode, BT=16, BK=128, **constants)
        x = x[:, : self.width + self.columns]
        return x @ weight.t(), x[:, self.width :].contiguous()

    def backward(self, grad, xa, mode: int, source, rstd, norm, training: bool, seed: int, need_input: bool = True):
        """Gradients of the source (NORM: of the norm's output) and of this group's A and B in turn."""
        weight = self.weight() if self.kept is None else self.kept
        dx = grad @ weight[:, : self.width] if need_input else None
        if mode != SWIGLU and not self.slots:
            return dx, []
        a, factor, constants = self._arguments(source, training)
        dxa = grad @ weight[:, self.width :]
        chunks = triton.cdiv(grad.shape[0], kernels.CHUNK)
        da = torch.empty(chunks, self.columns, self.width, dtype=torch.float32, device=grad.device)
        out = torch.empty_like(source) if mode == SWIGLU else dx
        kernels.group_grad_kernel[triton.cdiv(self.width, 64), chunks](
            source, rstd, norm, *a, dx, dxa, out, da, grad.shape[0], seed, factor, MODE=mode, NEED_INPUT=need_input, BT=32, BK=64,
            CHUNK=kernels.CHUNK, **constants)
        if not self.slots:
            return out, []
        da, db, grads = da.sum(0), grad.t() @ xa, []
        for i, (rows, _) in enumerate(self.slots):
            part = slice(i * self.pad, i * self.pad + self.rank)
            grads += [da[part], db[rows, part]]  # autograd casts to the parameters' float32
        return out, grads


class DecoderLayer:
    """Weights and sizes of one LlamaDecoderLayer, as `LayerFunction` needs them."""

    def __init__(self, layer, config, adapter: str, keep_weights: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.groups = [LinearGroup(modules, adapter, keep_weights) for modules in (
            (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        self.norms, self.eps = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight), config.rms_norm_eps
        self.heads, self.key_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        self.scaling = attention.scaling

    def rotate(self, qkv, batch, sign: float) -> None:
        heads = self.heads + self.key_heads
        kernels.rope_kernel[qkv.shape[0],](qkv, batch.cos, batch.sin, sign, STRIDE=qkv.stride(0), HEADS=heads, D=self.head_dim,
                                           BLOCK=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(self.head_dim // 2))

    def split(self, qkv):
        """(T, heads, D), (T, key heads, D), (T, key heads, D): views of qkv."""
        return qkv.view(qkv.shape[0], -1, self.head_dim).split([self.heads, self.key_heads, self.key_heads], 1)

    def attend(self, qkv, batch):
        """(T, heads, D) causal attention within each document, and what the backward pass needs of it."""
        return torch.ops.aten._flash_attention_forward(*self.split(qkv), batch.starts, batch.starts, batch.longest, batch.longest,
                                                       0.0, True, False, scale=self.scaling)[:4]

    def attend_backward(self, grad, qkv, out, log_sums, rng, unused, batch):
        """Gradients of q, k and v, (T, heads, D) each."""
        return torch.ops.aten._flash_attention_backward(grad, *self.split(qkv), out, log_sums, batch.starts, batch.starts, batch.longest,
                                                        batch.longest, 0.0, True, rng, unused, scale=self.scaling)


class LayerFunction(torch.autograd.Function):
    """A decoder layer. Its input is hidden + delta, its outputs are the next layer's hidden and delta, (T, W) each.

    The sum is left to the next layer, which reads both anyway to normalise them.
    """

    @staticmethod
    def forward(ctx, hidden, delta, layer, batch, seeds, *parameters):
        qkv_group, o_group, up_group, down_group = layer.groups
        h1, rstd1 = kernels.add_rstd(hidden, delta, layer.eps)
        qkv, xa1 = qkv_group.forward(NORM, h1, rstd1, layer.norms[0], batch.training, seeds[0])
        layer.rotate(qkv, batch, 1.0)
        attended = layer.attend(qkv, batch)
        delta, xa2 = o_group.forward(PLAIN, attended[0].flatten(1), None, None, batch.training, seeds[1])
        h2, rstd2 = kernels.add_rstd(h1, delta, layer.eps)
        gate_up, xa3 = up_group.forward(NORM, h2, rstd2, layer.norms[1], batch.training, seeds[2])
        delta, xa4 = down_group.forward(SWIGLU, gate_up, None, None, batch.training, seeds[3])
        ctx.save_for_backward(h1, rstd1, qkv, h2, rstd2, gate_up, xa1, xa2, xa3, xa4, *attended)
        ctx.layer, ctx.batch, ctx.seeds = layer, batch, seeds
        return h2, delta

    @staticmethod
    def backward(ctx, grad, same_grad):
        """Both outputs are only ever added, so their gradients are equal; so are those of the inputs."""
        layer, batch, seeds, training = ctx.layer, ctx.batch, ctx.seeds, ctx.batch.training
        qkv_group, o_group, up_group, down_group = layer.groups
        h1, rstd1, qkv, h2, rstd2, gate_up, xa1, xa2, xa3, xa4, *attended = ctx.saved_tensors
        dx, down = down_group.backward(grad, xa4, SWIGLU, gate_up, None, None, training, seeds[3])
        dx, up = up_group.backward(dx, xa3, NORM, h2, rstd2, layer.norms[1], training, seeds[2])
        grad = kernels.norm_grad(dx, h2, rstd2, layer.norms[1], grad)
        dx, o = o_group.backward(grad, xa2, PLAIN, attended[0].flatten(1), None, None, training, seeds[1])
        dqkv = torch.cat(layer.attend_backward(dx.view_as(attended[0]), qkv, *attended, batch), 1).flatten(1)
        layer.rotate(dqkv, batch, -1.0)
        dx, qkv = qkv_group.backward(dqkv, xa1, NORM, h1, rstd1, layer.norms[0], training, seeds[0], ctx.needs_input_grad[0])
        grad = kernels.norm_grad(dx, h1, rstd1, layer.norms[0], grad) if ctx.needs_input_grad[0] else None
        return grad, grad if ctx.needs_input_grad[1] else None, None, None, None, *qkv, *o, *up, *down


class AnswerLoss(torch.autograd.Function):
    """Final norm, head and cross-entropy on the answer tokens: sum of their losses times `scale`, a (1,) tensor.

    The gradient is computed on the way forward, while the logits exist; backward only multiplies it.
    """

    @staticmethod
    def forward(ctx, hidden, delta, norm, eps, head, index, targets, scale, need_grad):
        h, rstd = kernels.add_rstd(hidden[index], delta[index], eps)
        x = torch.empty_like(h)
        width = h.shape[1]
        kernels.group_input_kernel[triton.cdiv(h.shape[0], 16),](
            h, rstd, norm, h, h, h, x, h.shape[0], 0, 1.0, STRIDE=width, MODE=NORM, BT=16, BK=128,
            W=width, N=0, RANK=0, PAD=16, THRESHOLD=0)
        losses = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
        for start in range(0, h.shape[0], LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = x[part] @ head.t()
            kernels.cross_entropy_kernel[logits.shape[0],](logits, targets[part], losses[part], scale, V=head.shape[0], GRAD=need_grad,
                                                           BLOCK=4096)
            if need_grad:
                x[part] = logits @ head  # the logits are their own gradient now, and x is not needed again
        if need_grad:
            grad = torch.zeros_like(hidden)
            grad[index] = kernels.norm_grad(x, h, rstd, norm)
            ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        grad = ctx.saved_tensors[0] * grad
        return grad, grad, None, None, None, None, None, None, None


def fast_forward(model, layers, original, input_ids=None, cu_seq_lens_q=None, **inputs):
    """`LlamaForCausalLM.forward` for a batch of `FlatCollator`; any other call goes to the original.

    Returns:
        CausalLMOutputWithPast with the loss only: the mean over answer tokens or, as the Trainer asks, their sum over `num_items_in_batch`.
    """
    if cu_seq_lens_q is None or inputs.get("answer_index") is None:
        return original(input_ids=input_ids, cu_seq_lens_q=cu_seq_lens_q, **inputs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    hidden = model.model.embed_tokens(input_ids)
    cos, sin = model.model.rotary_emb(hidden, inputs["position_ids"])
    batch = SimpleNamespace(cos=cos[0], sin=sin[0], starts=cu_seq_lens_q, longest=inputs["max_length_q"], training=model.training)
    hidden, delta = hidden[0], None
    # Dropout's seeds come from the CPU's generator, whose state the Trainer keeps in its checkpoints.
    for layer, seeds in zip(layers, torch.randint(2**31, (len(layers), 4)).tolist(), strict=True):
        hidden, delta = LayerFunction.apply(hidden, delta, layer, batch, seeds, *layer.parameters)
    items = inputs.get("num_items_in_batch")
    items = len(inputs["answer_index"]) if items is None else items
    scale = 1.0 / torch.as_tensor(items, dtype=torch.float32, device=hidden.device)
    loss = AnswerLoss.apply(hidden, delta, model.model.norm.weight, model.config.rms_norm_eps, model.lm_head.weight,
                            inputs["answer_index"], inputs["answer_targets"], scale, torch.is_grad_enabled())
    return CausalLMOutputWithPast(loss=loss)


def install_fast_layers(model, keep_weights: bool = True) -> None:
    """Give a PEFT Llama the fast forward pass for batches of `FlatCollator`; every other call works as before.

    Args:
        keep_weights: keep the dequantised weights (2 bytes a parameter). Without, NF4 is dequantised at every use: less memory, slower.
    """
    causal, adapter = model.get_base_model(), model.active_adapter
    remove_fast_layers(model)
    with torch.no_grad():
        layers = [DecoderLayer(layer, causal.config, adapter, keep_weights) for layer in causal.model.layers]
    causal.forward = partial(fast_forward, causal, layers, causal.forward)


def remove_fast_layers(model) -> None:
    """Undo `install_fast_layers` and free what it kept."""
    model.get_base_model().__dict__.pop("forward", None)
