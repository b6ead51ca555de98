"""The fast training path: loss and LoRA gradients of a Llama, replayed as CUDA graphs.

It computes what transformers and PEFT compute, on PEFT's own parameters, for documents laid end to end (T
tokens, no padding): checkpoints, callbacks, clipping, float16's loss scale and `accelerate launch` see the
model that they know. Needs a GPU of capability 7.5. What makes it fast, and why that is exact:

- The GPU never waits for the CPU: two thousand kernels are recorded once per size and replayed (`FastStep`).
- NF4 is dequantised once instead of at every use: the same numbers, kept.
- q, k, v and gate, up are one matmul each, and LoRA's B is inside it (`LinearGroup`).
- What is cheap to compute again (norms, SwiGLU, dropout masks) is not stored (`kernels`).
- Logits exist for a few thousand tokens at a time and turn into their gradient in place.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from peft.utils.integrations import dequantize_module_weight

from medqa_lib.labels import IGNORE_INDEX

try:
    import triton

    from medqa_lib.fast import kernels
except ImportError:  # no Triton on this platform: the standard path is used
    triton = None

LOGIT_ROWS = 4096
BUCKET = 512  # graphs are recorded for multiples of this many tokens
CAUSAL = 1  # mask of torch's memory-efficient attention: from the upper left corner of each document
PLAIN, NORM, SWIGLU = 0, 1, 2  # what a group's input is made from, see kernels


class LinearGroup:
    """The linear layers that read one input, as one matmul: their weights lie below each other.

    To the right of the frozen weight (rows, W) are LoRA's matrices B, and to the right of the input (T, W) is
    xa = scaling * dropout(x) @ A.T. One matmul then gives W x + B xa, the sum that PEFT writes out.
    """

    def __init__(self, modules, adapter: str, keep_weights: bool):
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.width, heights = self.bases[0].in_features, [base.out_features for base in self.bases]
        self.rows = [slice(sum(heights[:i]), sum(heights[: i + 1])) for i in range(len(heights))]
        tuned = [pair for pair in zip(self.rows, modules, strict=True) if hasattr(pair[1], "lora_A")]
        self.parameters = [part[adapter].weight for _, each in tuned for part in (each.lora_A, each.lora_B)]
        self.rank = self.parameters[0].shape[0] if tuned else 0
        self.pad = max(16, triton.next_power_of_2(self.rank))  # matrix units take at least 16 columns
        self.columns = len(tuned) * self.pad
        left = [self.width + i * self.pad for i in range(len(tuned))]
        self.slots = [(rows, slice(at, at + self.rank)) for (rows, _), at in zip(tuned, left, strict=True)]
        self.scaling = tuned[0][1].scaling[adapter] if tuned else 1.0
        self.dropout = getattr(tuned[0][1].lora_dropout[adapter], "p", 0.0) if tuned else 0.0
        self.kept = self._dequantize() if keep_weights else None

    def _dequantize(self) -> torch.Tensor:
        """(rows, W + columns): dequantised weights, zeros where B goes. Rows begin on 128 bytes."""
        weights = [dequantize_module_weight(base) for base in self.bases]
        stride = -(-(self.width + self.columns) // 64) * 64
        buffer = weights[0].new_zeros(self.rows[-1].stop, stride)[:, : self.width + self.columns]
        for rows, weight in zip(self.rows, weights, strict=True):
            buffer[rows, : self.width] = weight
        return buffer

    def weight(self) -> torch.Tensor:
        """(rows, W + columns): the frozen weights with the present B beside them."""
        if self.kept is not None:
            return self.kept  # `FastStep` has put B there
        weight = self._dequantize()
        self.copy_b(weight)
        return weight

    def copy_b(self, weight: torch.Tensor) -> None:
        """Put the present B beside the frozen weights."""
        for slot, b in zip(self.slots, self.parameters[1::2], strict=True):
            weight[slot].copy_(b)

    def _arguments(self, source, training: bool):
        """A's pointers (any tensor for an unused one), the factor on xa and what both kernels share."""
        p = self.dropout if training else 0.0
        a = (self.parameters[0::2] + [source] * 3)[:3]
        constants = {"W": self.width, "N": len(self.slots), "RANK": self.rank, "PAD": self.pad,
                     "THRESHOLD": round(p * 2**32)}
        return a, self.scaling / (1.0 - p), constants

    def forward(self, mode: int, source, rstd, norm, training: bool, seed):
        """(T, rows) output and (T, columns) xa (None without LoRA) of a source (T, W), SWIGLU: (T, 2 W)."""
        tokens, weight = source.shape[0], self.weight()
        if mode == PLAIN and not self.slots:
            return source @ weight.t(), None
        a, factor, constants = self._arguments(source, training)
        x = torch.empty(tokens, weight.stride(0), dtype=source.dtype, device=source.device)
        kernels.group_input_kernel[triton.cdiv(tokens, 16),](
            source, rstd, norm, *a, x, tokens, seed, factor, STRIDE=x.stride(0), MODE=mode, BT=16, BK=128,
            **constants)
        x = x[:, : self.width + self.columns]
        return x @ weight.t(), x[:, self.width :].contiguous() if self.slots else None  # a view would keep x

    def backward(self, grad, xa, mode: int, source, rstd, norm, training: bool, seed, need_input=True):
        """Gradient of the source (NORM: of the norm's output); those of A and B go into `gradients`."""
        weight = self.weight()
        dx = grad @ weight[:, : self.width] if need_input else None
        if mode != SWIGLU and not self.slots:
            return dx
        a, factor, constants = self._arguments(source, training)
        dxa = grad @ weight[:, self.width :]
        chunks = triton.cdiv(grad.shape[0], kernels.CHUNK)
        da = torch.empty(chunks, self.columns, self.width, dtype=torch.float32, device=grad.device)
        out = torch.empty_like(source) if mode == SWIGLU else dx
        kernels.group_grad_kernel[triton.cdiv(self.width, 64), chunks](
            source, rstd, norm, *a, dx, dxa, out, da, grad.shape[0], seed, factor, MODE=mode,
            NEED_INPUT=need_input, BT=32, BK=64, CHUNK=kernels.CHUNK, **constants)
        if self.slots:
            db = grad.t() @ xa
        for i, (rows, _) in enumerate(self.slots):
            part = slice(i * self.pad, i * self.pad + self.rank)
            torch.sum(da[:, part], 0, out=self.gradients[2 * i])
            self.gradients[2 * i + 1].copy_(db[rows, part])
        return out


class DecoderLayer:
    """Forward and backward pass of one LlamaDecoderLayer, on its own weights."""

    def __init__(self, layer, config, adapter: str, keep_weights: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.groups = [LinearGroup(modules, adapter, keep_weights) for modules in (
            (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))]
        self.norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.eps, self.scaling, self.head_dim = config.rms_norm_eps, attention.scaling, attention.head_dim
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        norm = self.norms[0]
        self.flash = norm.dtype != torch.float32 and torch.cuda.get_device_capability(norm.device) >= (8, 0)

    def rotate(self, qkv, batch, sign: float) -> None:
        heads, half = self.heads + self.key_heads, triton.next_power_of_2(self.head_dim // 2)
        kernels.rope_kernel[qkv.shape[0],](qkv, batch.cos, batch.sin, sign, STRIDE=qkv.stride(0), HEADS=heads,
                                           D=self.head_dim, BLOCK=triton.next_power_of_2(heads), HALF=half)

    def split(self, qkv):
        """(T, heads, D), (T, key heads, D), (T, key heads, D): views of qkv."""
        sizes = [self.heads, self.key_heads, self.key_heads]
        return qkv.view(qkv.shape[0], -1, self.head_dim).split(sizes, 1)

    def expand(self, qkv):
        """`split` with keys and values repeated, (1, T, heads, D): the efficient kernel has no groups."""
        query, *pair = self.split(qkv)
        return query[None], *(part.repeat_interleave(self.heads // self.key_heads, 1)[None] for part in pair)

    def attend(self, qkv, batch):
        """(T, heads, D) causal attention within each document, and what the backward pass needs of it."""
        bounds = batch.starts, batch.starts, batch.longest, batch.longest
        if self.flash:
            return torch.ops.aten._flash_attention_forward(*self.split(qkv), *bounds, 0.0, True, False,
                                                           scale=self.scaling)[:4]
        out, *rest = torch.ops.aten._efficient_attention_forward(
            *self.expand(qkv), None, *bounds, 0.0, CAUSAL, True, scale=self.scaling)
        return out[0], *rest[:3]

    def attend_backward(self, grad, qkv, attended, batch):
        """Gradients of q, k and v, (T, heads, D) each; `attended` is what `attend` returned."""
        out, log_sums, *random = attended
        bounds = batch.starts, batch.starts, batch.longest, batch.longest
        if self.flash:
            return torch.ops.aten._flash_attention_backward(
                grad, *self.split(qkv), out, log_sums, *bounds, 0.0, True, *random, scale=self.scaling)
        query, *pair = torch.ops.aten._efficient_attention_backward(
            grad[None], *self.expand(qkv), None, out[None], *bounds, log_sums, 0.0, *random, CAUSAL, False,
            scale=self.scaling)[:3]
        return query[0], *(part.view(len(grad), self.key_heads, -1, self.head_dim).sum(2) for part in pair)

    def forward(self, hidden, delta, batch, seeds):
        """Hidden and delta, (T, W) each, whose sum is the next layer's input, and what `backward` needs."""
        qkv_group, o_group, up_group, down_group = self.groups
        h1, rstd1 = kernels.add_rstd(hidden, delta, self.eps)
        qkv, xa1 = qkv_group.forward(NORM, h1, rstd1, self.norms[0], batch.training, seeds[0])
        self.rotate(qkv, batch, 1.0)
        attended = self.attend(qkv, batch)
        delta, xa2 = o_group.forward(PLAIN, attended[0].flatten(1), None, None, batch.training, seeds[1])
        h2, rstd2 = kernels.add_rstd(h1, delta, self.eps)
        gate_up, xa3 = up_group.forward(NORM, h2, rstd2, self.norms[1], batch.training, seeds[2])
        delta, xa4 = down_group.forward(SWIGLU, gate_up, None, None, batch.training, seeds[3])
        return h2, delta, (h1, rstd1, qkv, h2, rstd2, gate_up, xa1, xa2, xa3, xa4, attended)

    def backward(self, grad, saved, batch, seeds, need_input: bool):
        """Gradient of hidden, and so of delta: both are only ever added. `grad` is the outputs', likewise."""
        qkv_group, o_group, up_group, down_group = self.groups
        h1, rstd1, qkv, h2, rstd2, gate_up, xa1, xa2, xa3, xa4, attended = saved
        dx = down_group.backward(grad, xa4, SWIGLU, gate_up, None, None, batch.training, seeds[3])
        dx = up_group.backward(dx, xa3, NORM, h2, rstd2, self.norms[1], batch.training, seeds[2])
        grad = kernels.norm_grad(dx, h2, rstd2, self.norms[1], grad)
        dx = o_group.backward(grad, xa2, PLAIN, attended[0].flatten(1), None, None, batch.training, seeds[1])
        dqkv = torch.cat(self.attend_backward(dx.view_as(attended[0]), qkv, attended, batch), 1).flatten(1)
        self.rotate(dqkv, batch, -1.0)
        dx = qkv_group.backward(dqkv, xa1, NORM, h1, rstd1, self.norms[0], batch.training, seeds[0],
                                need_input)
        return kernels.norm_grad(dx, h1, rstd1, self.norms[0], grad) if need_input else None


class FastStep:
    """Loss and gradients of a batch: kernel by kernel the first time, afterwards as CUDA graphs.

    A graph is tied to its sizes, so T is filled up to a multiple of BUCKET by a document whose tokens have no
    target: no other document sees it. One pass runs at a time, so all graphs share a pool of memory.
    """

    def __init__(self, causal, adapter: str, keep_weights: bool):
        self.causal = causal
        layers = causal.model.layers
        self.layers = [DecoderLayer(layer, causal.config, adapter, keep_weights) for layer in layers]
        self.groups = [group for layer in self.layers for group in layer.groups]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        size = sum(parameter.numel() for parameter in self.parameters)
        self.gradient = torch.zeros(size, device=causal.device)  # of all parameters, one after another
        self.factor = torch.ones(1, device=causal.device)  # gradient of the plain sum of the tokens' losses
        views = iter(self.parts(self.gradient))
        for group in self.groups:
            group.gradients = [next(views) for _ in group.parameters]
        self.graphs, self.largest, self.compiled = {}, 0, set()

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The flat gradient as one tensor per parameter."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def run(self, batch, need_grad: bool):
        """The loss, a () tensor, and a callable (gradient of the loss) -> None that fills `gradient`."""
        if need_grad and batch.training in self.compiled and batch.ids.is_cuda:
            return self.replay(batch)
        loss, saved = self.forward(batch, need_grad)

        def backward(grad):
            self.factor.copy_(grad * batch.scale)
            self.backward(saved, batch)
            self.compiled.add(batch.training)  # the first pass compiles the kernels, which a recording cannot

        return loss, backward

    @torch.autocast("cuda", enabled=False)  # every type is chosen here
    def forward(self, batch, need_grad: bool):
        """The loss and, with `need_grad`, what `backward` pops from."""
        model = self.causal.model
        for group in self.groups:
            if group.kept is not None:
                group.copy_b(group.kept)
        hidden, delta, saved = model.embed_tokens(batch.ids), None, []
        cos, sin = model.rotary_emb(hidden, batch.positions[None])
        batch.cos, batch.sin = cos[0], sin[0]
        for layer, seeds in zip(self.layers, batch.seeds, strict=True):
            hidden, delta, kept = layer.forward(hidden, delta, batch, seeds)
            saved.append(kept if need_grad else None)
        loss, kept = self.completion_loss(hidden, delta, batch, need_grad)
        return loss, [*saved, kept]

    @torch.autocast("cuda", enabled=False)
    def backward(self, saved: list, batch) -> None:
        """Fill `gradient`. All gradients are scaled from here on, so a `GradScaler` keeps float16's alive."""
        x, hidden, rstd = saved.pop()
        grad = kernels.norm_grad(x.mul_(self.factor), hidden, rstd, self.causal.model.norm.weight)
        for i in reversed(range(len(self.layers))):
            grad = self.layers[i].backward(grad, saved.pop(), batch, batch.seeds[i], need_input=i > 0)

    def completion_loss(self, hidden, delta, batch, need_grad: bool):
        """The sum of the tokens' losses times `batch.scale`, and what `backward` pops first."""
        norm, head = self.causal.model.norm.weight, self.causal.lm_head.weight
        h, rstd = kernels.add_rstd(hidden, delta, self.causal.config.rms_norm_eps)
        x = (h.float() * rstd[:, None]).to(h.dtype) * norm
        losses = torch.empty(len(h), dtype=torch.float32, device=h.device)
        for start in range(0, len(h), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = x[part] @ head.t()
            kernels.cross_entropy_kernel[len(logits),](logits, batch.targets[part], losses[part], batch.scale,
                                                       V=head.shape[0], GRAD=need_grad, BLOCK=4096)
            if need_grad:
                torch.mm(logits, head, out=x[part])  # the logits are their own gradient now
        return losses.sum(), (x, h, rstd)

    def replay(self, batch):
        """`run` with graphs, recorded first if there are none of these sizes."""
        size = -(-len(batch.ids) // BUCKET) * BUCKET
        key = (size, len(batch.starts), -(-batch.longest // BUCKET), batch.training)
        if key not in self.graphs:
            self.graphs[key] = self.record(batch, size)
        forward, backward, static, loss = self.graphs[key]
        self.fill(static, batch)
        forward.replay()

        def replay_backward(grad):
            self.factor.copy_(grad * batch.scale)
            backward.replay()

        return loss.clone(), replay_backward

    def record(self, batch, size: int):
        """CUDA graphs of `forward` and `backward` for T = size, their input tensors and the loss."""
        if size > self.largest:  # a pool's blocks cannot grow: let the largest size set the memory
            self.graphs.clear()
            self.pool, self.largest = torch.cuda.graph_pool_handle(), size
        static, graphs = self.blank(batch, size), (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
        options = {"pool": self.pool, "capture_error_mode": "thread_local"}  # data loaders go on meanwhile
        with torch.cuda.graph(graphs[0], **options):
            loss, saved = self.forward(static, need_grad=True)
        with torch.cuda.graph(graphs[1], **options):
            self.backward(saved, static)
        return *graphs, static, loss

    def blank(self, batch, size: int):
        """A batch of T = size to be filled with one like `batch`; what is left over is the last document."""
        tensors = {name: getattr(batch, name).new_zeros(size) for name in ("ids", "positions", "targets")}
        starts = torch.nn.functional.pad(batch.starts, (0, 1), value=size)
        return SimpleNamespace(**tensors, starts=starts, seeds=batch.seeds.clone(), scale=batch.scale.clone(),
                               longest=-(-batch.longest // BUCKET) * BUCKET, training=batch.training)

    def fill(self, static, batch) -> None:
        """Copy a batch into one of `blank`."""
        for name in ("ids", "positions", "targets", "starts", "seeds", "scale"):
            value = getattr(batch, name)
            getattr(static, name)[: len(value)].copy_(value)
        static.targets[len(batch.targets) :].fill_(IGNORE_INDEX)  # of an earlier batch


class StepFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, batch, need_grad, *parameters):
        loss, ctx.fill_gradient = step.run(batch, need_grad)
        ctx.step = step
        return loss

    @staticmethod
    def backward(ctx, grad):
        ctx.fill_gradient(grad)
        return None, None, None, *ctx.step.parts(ctx.step.gradient.clone())  # it is overwritten


def fast_forward(model, step, original, input_ids=None, labels=None, cu_seq_lens_q=None, **inputs):
    """`LlamaForCausalLM.forward` for flattened batches: only the loss. Other calls go to the original."""
    if cu_seq_lens_q is None or labels is None:
        return original(input_ids=input_ids, labels=labels, cu_seq_lens_q=cu_seq_lens_q, **inputs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    targets = torch.nn.functional.pad(labels[0, 1:], (0, 1), value=IGNORE_INDEX)
    items = inputs.get("num_items_in_batch")
    items = (targets != IGNORE_INDEX).sum() if items is None else items
    # Dropout's seeds come from the CPU's generator, whose state the Trainer keeps in its checkpoints.
    seeds = torch.randint(2**31, (len(step.layers), 4), dtype=torch.int32)
    batch = SimpleNamespace(
        ids=input_ids[0], positions=inputs["position_ids"][0], targets=targets, starts=cu_seq_lens_q,
        longest=inputs["max_length_q"], training=model.training,
        seeds=seeds.to(labels.device, non_blocking=True),
        scale=1.0 / torch.as_tensor(items, dtype=torch.float32, device=labels.device).view(1))
    loss = StepFunction.apply(step, batch, torch.is_grad_enabled(), *step.parameters)
    return CausalLMOutputWithPast(loss=loss)


def install_fast_layers(model, keep_weights: bool = True) -> None:
    """Give a PEFT Llama the fast forward pass for flattened batches, with weights kept dequantised or not."""
    causal = model.get_base_model()
    remove_fast_layers(model)
    with torch.no_grad():
        step = FastStep(causal, model.active_adapter, keep_weights)
    causal.forward = partial(fast_forward, causal, step, causal.forward)


def remove_fast_layers(model) -> None:
    """Undo `install_fast_layers` and free what it kept."""
    model.get_base_model().__dict__.pop("forward", None)
