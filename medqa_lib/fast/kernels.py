"""Triton kernels of the fast training path, and the functions that launch them.

Shapes: T tokens of all documents laid end to end, W the width of a linear layer's input, V the vocabulary.
Arithmetic is float32 inside a kernel; results are rounded where LlamaRMSNorm, LlamaMLP and PEFT round theirs.

A "group" is the linear layers that read the same input (q, k, v; o; gate, up; down), with at most three LoRA
adapters. Its input is computed where it is needed, forward and backward, and never stored: PLAIN takes
`source` as it is, NORM is `source * rstd * norm`, SWIGLU is `silu(source[:, :W]) * source[:, W:]`. Nor is
dropout: an adapter's mask is a hash of (seed, token, column, adapter). So each has its own mask, as in PEFT,
and the backward pass finds the same one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language import constexpr

CHUNK = 512  # tokens per program of `group_grad_kernel`; the chunks' sums are added up in a fixed order


@triton.jit
def add_rstd_kernel(h_ptr, d_ptr, sum_ptr, rstd_ptr, eps, W: constexpr, ADD: constexpr, BLOCK: constexpr):
    """sum = h + d and rstd = 1 / sqrt(mean(sum^2) + eps) of one row; without ADD the sum is h."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(h_ptr + row * W + col, mask=col < W, other=0.0)
    if ADD:
        delta = tl.load(d_ptr + row * W + col, mask=col < W, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * W + col, x, mask=col < W)
    x = x.to(tl.float32)
    tl.store(rstd_ptr + row, 1.0 / tl.sqrt(tl.sum(x * x, 0) / W + eps))


@triton.jit
def norm_grad_kernel(x_ptr, rstd_ptr, norm_ptr, grad_ptr, residual_ptr, out_ptr, W: constexpr, ADD: constexpr,
                     BLOCK: constexpr):
    """out = gradient of x, where grad is that of x * rstd * norm; with ADD plus the residual's gradient."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    x = tl.load(x_ptr + row * W + col, mask=col < W, other=0.0).to(tl.float32) * rstd
    grad = tl.load(grad_ptr + row * W + col, mask=col < W, other=0.0).to(tl.float32)
    grad *= tl.load(norm_ptr + col, mask=col < W, other=0.0).to(tl.float32)
    out = rstd * (grad - x * (tl.sum(grad * x, 0) / W))
    if ADD:
        out += tl.load(residual_ptr + row * W + col, mask=col < W, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * W + col, out.to(out_ptr.dtype.element_ty), mask=col < W)


@triton.jit
def _load_input(src_ptr, rstd_ptr, norm_ptr, t, k, inside, W: constexpr, MODE: constexpr):
    """The (tokens, columns) tile of a group's input; PLAIN = 0, NORM = 1, SWIGLU = 2."""
    stride: tl.constexpr = 2 * W if MODE == 2 else W
    at = src_ptr + t.to(tl.int64)[:, None] * stride + k[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    if MODE == 1:
        rstd = tl.load(rstd_ptr + t, mask=t >= 0, other=0.0)
        norm = tl.load(norm_ptr + k, mask=k < W, other=0.0)
        normed = (x.to(tl.float32) * rstd[:, None]).to(x.dtype).to(tl.float32)
        x = (normed * norm.to(tl.float32)[None, :]).to(x.dtype)
    if MODE == 2:
        gate = x.to(tl.float32)
        up = tl.load(at + W, mask=inside, other=0.0)
        x = ((gate * tl.sigmoid(gate)).to(x.dtype).to(tl.float32) * up.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _random_bits(t, k, seed, W: constexpr):
    """32 hashed bits a (token, column): two rounds of multiply and xor-shift, the seed between them."""
    x = (t[:, None] * W + k[None, :]).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (x >> 15) ^ seed.to(tl.uint32)
    x = (x ^ (x >> 17)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _drop(x, bits, MULTIPLIER: constexpr, THRESHOLD: constexpr):
    """Zero where this adapter's mask says so, with p = THRESHOLD / 2^32; the caller divides by 1 - p."""
    if THRESHOLD > 0:
        x = tl.where(bits * MULTIPLIER >= THRESHOLD, x, 0.0)
    return x


@triton.jit
def _load_a(a_ptr, k, dtype: constexpr, W: constexpr, RANK: constexpr, PAD: constexpr):
    """(PAD, columns) of LoRA's A (RANK, W), rows past RANK zero."""
    r = tl.arange(0, PAD)
    inside = (r < RANK)[:, None] & (k < W)[None, :]
    return tl.load(a_ptr + r[:, None] * W + k[None, :], mask=inside, other=0.0).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def group_input_kernel(src_ptr, rstd_ptr, norm_ptr, a0_ptr, a1_ptr, a2_ptr, out_ptr, rows, seed_ptr, factor,
                       W: constexpr, STRIDE: constexpr, MODE: constexpr, N: constexpr, RANK: constexpr,
                       PAD: constexpr, THRESHOLD: constexpr, BT: constexpr, BK: constexpr):
    """out[:, :W] = input, out[:, W:] = xa = factor * dropout(input) @ A.T of each adapter."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t = tl.where(t < rows, t, -1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    seed = tl.load(seed_ptr)
    xa0 = tl.zeros((BT, PAD), tl.float32)
    xa1 = tl.zeros((BT, PAD), tl.float32)
    xa2 = tl.zeros((BT, PAD), tl.float32)
    for start in range(0, W, BK):
        k = start + tl.arange(0, BK)
        inside = (t >= 0)[:, None] & (k < W)[None, :]
        x = _load_input(src_ptr, rstd_ptr, norm_ptr, t, k, inside, W, MODE)
        tl.store(out_ptr + t.to(tl.int64)[:, None] * STRIDE + k[None, :], x, mask=inside)
        bits = _random_bits(t, k, seed, W)
        if N > 0:
            a = tl.trans(_load_a(a0_ptr, k, dtype, W, RANK, PAD))
            xa0 += tl.dot(_drop(x, bits, 0x9E3779B1, THRESHOLD).to(dtype), a)
        if N > 1:
            a = tl.trans(_load_a(a1_ptr, k, dtype, W, RANK, PAD))
            xa1 += tl.dot(_drop(x, bits, 0x85EBCA77, THRESHOLD).to(dtype), a)
        if N > 2:
            a = tl.trans(_load_a(a2_ptr, k, dtype, W, RANK, PAD))
            xa2 += tl.dot(_drop(x, bits, 0xC2B2AE3D, THRESHOLD).to(dtype), a)
    at = out_ptr + t.to(tl.int64)[:, None] * STRIDE + W + tl.arange(0, PAD)[None, :]
    if N > 0:
        tl.store(at, (xa0 * factor).to(dtype), mask=(t >= 0)[:, None])
    if N > 1:
        tl.store(at + PAD, (xa1 * factor).to(dtype), mask=(t >= 0)[:, None])
    if N > 2:
        tl.store(at + 2 * PAD, (xa2 * factor).to(dtype), mask=(t >= 0)[:, None])


@triton.jit
def _adapter_grad(x, dx, da, bits, dxa_ptr, a, t, factor, COLUMNS: constexpr, PAD: constexpr,
                  MULTIPLIER: constexpr, THRESHOLD: constexpr):
    """Add one adapter's part to the gradients of the input (dx) and of A (da), through its dropout mask."""
    r = tl.arange(0, PAD)
    dxa = tl.load(dxa_ptr + t.to(tl.int64)[:, None] * COLUMNS + r[None, :], mask=(t >= 0)[:, None], other=0.0)
    da += tl.dot(tl.trans(dxa), _drop(x, bits, MULTIPLIER, THRESHOLD).to(x.dtype))
    dx += _drop(tl.dot(dxa, a), bits, MULTIPLIER, THRESHOLD) * factor
    return dx, da


@triton.jit(do_not_specialize=["rows"])
def group_grad_kernel(src_ptr, rstd_ptr, norm_ptr, a0_ptr, a1_ptr, a2_ptr, grad_ptr, dxa_ptr, out_ptr, da_ptr,
                      rows, seed_ptr, factor, W: constexpr, MODE: constexpr, N: constexpr, RANK: constexpr,
                      PAD: constexpr, THRESHOLD: constexpr, NEED_INPUT: constexpr, BT: constexpr,
                      BK: constexpr, CHUNK: constexpr):
    """out = gradient of the input (SWIGLU: of gate, up), da[chunk] = its part of A's (N * PAD, W)."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    first = tl.program_id(1) * CHUNK
    dtype: tl.constexpr = src_ptr.dtype.element_ty
    seed = tl.load(seed_ptr)
    a0 = _load_a(a0_ptr, k, dtype, W, RANK, PAD)
    a1 = _load_a(a1_ptr, k, dtype, W, RANK, PAD)
    a2 = _load_a(a2_ptr, k, dtype, W, RANK, PAD)
    da0 = tl.zeros((PAD, BK), tl.float32)
    da1 = tl.zeros((PAD, BK), tl.float32)
    da2 = tl.zeros((PAD, BK), tl.float32)
    for start in range(0, CHUNK, BT):
        t = first + start + tl.arange(0, BT)
        t = tl.where(t < rows, t, -1)
        at = t.to(tl.int64)[:, None]
        inside = (t >= 0)[:, None] & (k < W)[None, :]
        x = _load_input(src_ptr, rstd_ptr, norm_ptr, t, k, inside, W, MODE)
        dx = tl.zeros((BT, BK), tl.float32)
        if NEED_INPUT:
            dx = tl.load(grad_ptr + at * W + k[None, :], mask=inside, other=0.0).to(tl.float32)
        bits = _random_bits(t, k, seed, W)
        if N > 0:
            dx, da0 = _adapter_grad(x, dx, da0, bits, dxa_ptr, a0, t, factor, N * PAD, PAD,
                                    0x9E3779B1, THRESHOLD)
        if N > 1:
            dx, da1 = _adapter_grad(x, dx, da1, bits, dxa_ptr + PAD, a1, t, factor, N * PAD, PAD,
                                    0x85EBCA77, THRESHOLD)
        if N > 2:
            dx, da2 = _adapter_grad(x, dx, da2, bits, dxa_ptr + 2 * PAD, a2, t, factor, N * PAD, PAD,
                                    0xC2B2AE3D, THRESHOLD)
        if MODE == 2:
            gate = tl.load(src_ptr + at * (2 * W) + k[None, :], mask=inside, other=0.0).to(tl.float32)
            up = tl.load(src_ptr + at * (2 * W) + W + k[None, :], mask=inside, other=0.0).to(tl.float32)
            s = tl.sigmoid(gate)
            dgate = dx * up * s * (1.0 + gate * (1.0 - s))
            tl.store(out_ptr + at * (2 * W) + k[None, :], dgate.to(dtype), mask=inside)
            tl.store(out_ptr + at * (2 * W) + W + k[None, :], (dx * gate * s).to(dtype), mask=inside)
        elif NEED_INPUT:
            tl.store(out_ptr + at * W + k[None, :], dx.to(dtype), mask=inside)
    r = tl.arange(0, PAD)[:, None]
    at = da_ptr + tl.program_id(1) * (N * PAD * W) + r * W + k[None, :]
    if N > 0:
        tl.store(at, da0 * factor, mask=(k < W)[None, :])
    if N > 1:
        tl.store(at + PAD * W, da1 * factor, mask=(k < W)[None, :])
    if N > 2:
        tl.store(at + 2 * PAD * W, da2 * factor, mask=(k < W)[None, :])


@triton.jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, sign, STRIDE: constexpr, HEADS: constexpr, D: constexpr,
                BLOCK: constexpr, HALF: constexpr):
    """Rotate the first HEADS heads of a token in place: forwards (sign 1) or back (-1), the gradient."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, HALF)[None, :]
    inside = (head < HEADS) & (d < D // 2)
    cos = tl.load(cos_ptr + t * D + d, mask=d < D // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * D + d, mask=d < D // 2, other=0.0).to(tl.float32) * sign
    at = x_ptr + t * STRIDE + head * D + d
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (low * cos - high * sin).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(at + D // 2, (high * cos + low * sin).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_kernel(logits_ptr, target_ptr, loss_ptr, scale_ptr, V: constexpr, GRAD: constexpr,
                         BLOCK: constexpr):
    """loss[row] = -scale * log softmax(logits[row])[target[row]]; GRAD: logits become gradient / scale."""
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * V
    target = tl.load(target_ptr + row)
    counts = (target >= 0).to(tl.float32)
    target_logit = tl.load(at + tl.maximum(target, 0)).to(tl.float32)  # before any gradient overwrites it
    largest = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(at + col, mask=col < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    log_sum = largest + tl.log(total)
    tl.store(loss_ptr + row, (log_sum - target_logit) * counts * tl.load(scale_ptr))
    if GRAD:
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(at + col, mask=col < V, other=0.0).to(tl.float32)
            grad = (tl.exp(x - log_sum) - tl.where(col == target, 1.0, 0.0)) * counts
            tl.store(at + col, grad.to(logits_ptr.dtype.element_ty), mask=col < V)


def add_rstd(hidden, delta, eps: float):
    """hidden + delta and the reciprocal root mean square of each row, (T, W) and (T,) float32."""
    total, width = hidden if delta is None else torch.empty_like(hidden), hidden.shape[1]
    rstd = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    add_rstd_kernel[hidden.shape[0],](hidden, delta, total, rstd, eps, W=width, ADD=delta is not None,
                                      BLOCK=triton.next_power_of_2(width))
    return total, rstd


def norm_grad(grad, x, rstd, norm, residual=None):
    """Gradient of an RMSNorm's input, plus what arrives beside it through the residual connection."""
    out, width = torch.empty_like(x), x.shape[1]
    norm_grad_kernel[x.shape[0],](x, rstd, norm, grad, residual, out, W=width, ADD=residual is not None,
                                  BLOCK=triton.next_power_of_2(width))
    return out
