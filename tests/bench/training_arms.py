"""The project's own arms of the training benchmark, a job a process (see bench_training.py). `--cpu` runs on Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import statistics
import sys
import time

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
import bitsandbytes
import measuring as m
import peft
import torch
import transformers
from measuring import CPU, CYCLE, DEVICE, DTYPE, ROWS, SMALL, guarded, record
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from medqa_lib.config import ALL_LINEAR, QKV
from medqa_lib.fast import paths
from medqa_lib.fast import train as fast_train
from medqa_lib.fast.train import FastStep, LinearGroup
from medqa_lib.training import plan as planning

# Steps, of which warm-up: two rounds of the batches, since a larger batch than before has the graphs of all sizes recorded again.
LONG, SHORT = ((7, 6), (2, 1)) if CPU else ((8 * CYCLE, 2 * CYCLE), (6 * CYCLE, 2 * CYCLE))


# ---------------------------------------------------------------- the model and the machine


def prepare() -> None:
    """Save the random model once, with a tokenizer because Unsloth wants one, and measure the two ceilings."""
    sizes = (
        (64, 2, 4, 2, 96, 96)
        if CPU
        else (576, 30, 9, 3, 1536, 49_152)
        if SMALL
        else (2048, 22, 32, 4, 5632, 32_000)
    )
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    config = LlamaConfig(
        **dict(zip(names, sizes, strict=True)),
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=SMALL,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(DTYPE)
    model.save_pretrained(m.MODEL_DIR)
    save_tokenizer(config.vocab_size)
    linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    linear += config.vocab_size * config.hidden_size * config.tie_word_embeddings
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    if fast_train.triton:
        versions["triton"] = fast_train.triton.__version__
    ceilings = {"gpu": "cpu"}
    m.wait_for("quiet")  # the others have imported
    if not CPU:
        ceilings = {
            "gpu": torch.cuda.get_device_name(),
            "matmul_tflops": matmul_ceiling(),
            "copy_tb_s": copy_ceiling(),
        }
    # a forward pass multiplies each linear weight once (2 operations), the backward pass once more: frozen weights need no gradient
    size = "SmolLM2-135M's" if SMALL else "a tiny" if CPU else "TinyLlama's"
    record(
        **ceilings,
        model=f"{size} configuration, random weights",
        date=time.strftime("%Y-%m-%d"),
        versions=versions,
        flop_a_token=4 * linear,
        rows=ROWS,
    )


def save_tokenizer(size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(size - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=2048,
        padding_side="right",
    ).save_pretrained(m.MODEL_DIR)


def median_ms(function, times: int = 30) -> float:
    for _ in range(5):
        function()
    spans = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
    return statistics.median(spans)


def matmul_ceiling(n: int = 8192) -> float:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return round(2 * n**3 / median_ms(lambda: a @ b) / 1e9, 1)


def copy_ceiling() -> float:
    a = torch.randn(2**28, device="cuda")
    b = torch.empty_like(a)
    return round(2 * a.nbytes / median_ms(lambda: b.copy_(a)) / 1e9, 2)


def load_model(targets=ALL_LINEAR, dropout: float = 0.05, dtype=DTYPE):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(
        m.MODEL_DIR,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": DEVICE},
        attn_implementation="sdpa",
    )
    base.config.use_cache = False
    return add_adapter(base, targets, dropout)


def add_adapter(base, targets=ALL_LINEAR, dropout: float = 0.05):
    torch.manual_seed(42)
    model = get_peft_model(
        base,
        LoraConfig(
            r=8, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
        ),
    )
    m.set_adapter(model)
    return model


def renew(model, targets=ALL_LINEAR, dropout: float = 0.05):
    """The same base model with a new adapter, and the memory of what was there before freed."""
    fast_train.remove_fast_layers(model)
    base = model.unload()
    del model
    m.free_memory()
    return add_adapter(base, targets, dropout)


# ---------------------------------------------------------------- one arm


def pad(examples: list[dict], width: int | None = None) -> dict:
    width = width or math.ceil(max(len(example["input_ids"]) for example in examples) / 8) * 8
    fill = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    return {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
        for key, value in fill.items()
    }


class SequentialTrainer(Trainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


def plan_for(path: str, per_device_train_batch_size: int = ROWS, rows: int = ROWS):
    return planning.TrainingPlan(
        path,
        DTYPE,
        per_device_train_batch_size,
        rows // per_device_train_batch_size,
        "as the benchmark says",
    )


def train(
    model,
    plan,
    arm: str,
    steps: int,
    warm: int,
    cap: int = 512,
    cycle: int = CYCLE,
    checkpointing: bool = False,
    width: int | None = None,
    about: dict | None = None,
    **extra,
) -> None:
    """Train `steps` steps, time those after `warm` and record the arm's row."""
    rows = plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    data = m.training_examples(steps, rows, cap, cycle)
    arguments = dict(
        max_steps=steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=CPU,
        seed=42,
        label_names=["labels"],
        gradient_checkpointing=checkpointing,
        optim="adamw_torch_fused",
        bf16=plan.dtype == torch.bfloat16,
        fp16=plan.dtype == torch.float16,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        logging_nan_inf_filter=False,
        accelerator_config={"non_blocking": True},
    )
    if checkpointing:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if CPU:
        arguments |= {
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
            "accelerator_config": {"non_blocking": False},
        }
    clock = m.Clock(steps, warm)
    with graph_times() as times:
        trainer = SequentialTrainer(
            model,
            TrainingArguments(str(m.WORK / m.NAME), **arguments | extra),
            train_dataset=data,
            data_collator=plan.collator(functools.partial(pad, width=width)),
            callbacks=[clock],
        )
        trainer.train()
    row = clock.row(arm, trainer, data, rows, plan.per_device_train_batch_size, checkpointing) | (about or {})
    if plan.path == "fast" and not CPU:
        row |= graph_row(times, row["timed_steps"] * plan.gradient_accumulation_steps)
    record(**row)


@contextlib.contextmanager
def patched(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def graph_times():
    """Seconds of each recording, CUDA events around each replayed pass."""
    times, record_graph, replay = {"record_s": [], "passes": []}, FastStep.record, FastStep.replay

    def timed_record(self, batch, size):
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = record_graph(self, batch, size)
        torch.cuda.synchronize()
        times["record_s"].append(time.perf_counter() - start)
        return found

    def timed_replay(self, batch):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        loss, backward = replay(self, batch)
        times["passes"].append(events)

        def timed_backward(grad):
            backward(grad)
            events[1].record()

        return loss, timed_backward

    with patched(FastStep, "record", timed_record), patched(FastStep, "replay", timed_replay):
        yield times


def graph_row(times: dict, timed_passes: int) -> dict:
    """The pass's own time in a step (the rest is the optimizer, the Trainer and waiting for them) and what recordings cost."""
    row = {
        "pass_ms": round(statistics.median(a.elapsed_time(b) for a, b in times["passes"][-timed_passes:]), 2)
    }
    if times["record_s"]:
        row |= {
            "recordings": len(times["record_s"]),
            "record_ms": round(1e3 * statistics.median(times["record_s"]), 1),
        }
    return row


def count_recordings(steps: int) -> int:
    """How many graphs FastStep.replay records in `steps` steps of different batches: a larger size than before drops the others."""
    data, known, largest, count = m.make_examples(steps * ROWS), set(), 0, 0
    for i in range(0, len(data), ROWS):
        size = -(-sum(len(example["input_ids"]) for example in data[i : i + ROWS]) // fast_train.BUCKET)
        known = set() if size > largest else known
        largest, count = max(largest, size), count + (size not in known)
        known.add(size)
    return count


# ---------------------------------------------------------------- the jobs


def run_padded() -> None:
    model = load_model(dropout=0.0)
    with guarded("padded, dropout 0"):
        train(model, plan_for("padded", ROWS // 4), "padded, dropout 0", 6, 5)
    model = renew(model, dropout=0.0)
    with guarded("padded to 512, dropout 0"):
        train(
            model,
            plan_for("padded", ROWS // 8 or 1),
            "padded to 512, dropout 0",
            6,
            5,
            width=512,
            checkpointing=True,
        )
    model = renew(model)
    steps = (7, 6) if CPU else (7, 2)
    with guarded("padded"):
        train(model, plan_for("padded", ROWS // 4), "padded", *steps, checkpointing=True)
    model = renew(model)
    with guarded("padded to 512"):
        train(
            model,
            plan_for("padded", ROWS // 8 or 1),
            "padded to 512",
            *(steps if CPU else (5, 1)),
            width=None if CPU else 512,
            checkpointing=True,
        )


def run_flattened() -> None:
    if CPU:
        paths._attend_varlen = varlen_on_cpu
    model = load_model()
    with guarded("padding_free"):
        planning.prepare_model(model, "padding_free")
        train(model, plan_for("padding_free"), "flattened", *((7, 6) if CPU else (2 * CYCLE, CYCLE)))
    if "." in m.NAME:  # the repetition
        return
    model = renew(model, dropout=0.0)
    with guarded("flattened, dropout 0"):
        planning.prepare_model(model, "padding_free")
        train(model, plan_for("padding_free"), "flattened, dropout 0", 6, 5)


def varlen_on_cpu(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_):
    heads = [states[0].transpose(0, 1) for states in (query, key, value)]
    out = [
        scaled_dot_product_attention(
            *(s[a:b].transpose(0, 1)[None] for s in heads), is_causal=True, scale=scaling, enable_gqa=True
        )[0].transpose(0, 1)
        for a, b in itertools.pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(out)[None], None


def fast_arm(
    name: str,
    model=None,
    steps=SHORT,
    targets=ALL_LINEAR,
    dropout: float = 0.05,
    keep_weights: bool = True,
    per_device_train_batch_size: int = ROWS,
    **extra,
):
    """Train one arm of the fast path on a new adapter; returns the model for the next one."""
    model = load_model(targets, dropout) if model is None else renew(model, targets, dropout)
    with guarded(name):
        fast_train.install_fast_layers(model, keep_weights)
        train(model, plan_for("fast", per_device_train_batch_size), name, *steps, **extra)
    return model


def run_fast() -> None:
    fast_arm("fast", steps=LONG, about={"recordings_in_400_steps": count_recordings(20 if CPU else 400)})


def run_settings() -> None:
    model = fast_arm("fast, dropout 0", steps=LONG, dropout=0.0)
    model = fast_arm("fast, q k v only", model, targets=QKV)
    with guarded("checks"):
        check_numbers(renew(model, dropout=0.0))


def run_nf4() -> None:
    fast_arm("fast, NF4 at every use", keep_weights=False)


def run_nf4_16() -> None:
    fast_arm("fast, NF4 at every use, 16 x 2", keep_weights=False, per_device_train_batch_size=ROWS // 2)


def run_ablation() -> None:
    """`fast` less one ingredient each, or with a setting that was not chosen. The two last could break a recording: nothing follows."""
    model = None
    for bucket in (256, 1024):
        with patched(fast_train, "BUCKET", bucket):
            model = fast_arm(f"fast, graphs for multiples of {bucket}", model)
    model = fast_arm("fast less fused AdamW", model, optim="adamw_torch")
    if not CPU:
        model = fast_arm("fast less non-blocking copies", model, accelerator_config={"non_blocking": False})
        model = fast_arm("fast less unfiltered losses", model, logging_nan_inf_filter=True)
        model = fast_arm("fast, two loader workers", model, dataloader_num_workers=2)
    with patched(FastStep, "replay", replay_without_graphs):
        model = fast_arm("fast less graphs", model)
    with patched(LinearGroup, "forward", forward_with_separate_b):
        model = fast_arm("fast less B inside the matmul", model)
    with patched(FastStep, "completion_loss", torch_answer_loss):
        fast_arm("fast less own cross-entropy", model)


def replay_without_graphs(self, batch):
    """The first pass again and again."""
    self.compiled.clear()
    return self.run(batch, need_grad=True)


def forward_with_separate_b(self, mode, source, rstd, norm, training, seed, plain=LinearGroup.forward):
    """Ablation: the frozen matmul first, B's product added to it afterwards."""
    weight, matmul = self.weight(), torch.Tensor.__matmul__
    if not self.slots:
        return plain(self, mode, source, rstd, norm, training, seed)

    def split_matmul(x, w):
        return matmul(x[:, : self.width], w[: self.width]).addmm_(
            x[:, self.width :].contiguous(), weight[:, self.width :].t()
        )

    with patched(torch.Tensor, "__matmul__", split_matmul):
        return plain(self, mode, source, rstd, norm, training, seed)


def torch_answer_loss(self, hidden, delta, batch, need_grad):
    """Ablation: final norm, logits and loss by torch, in one piece."""
    model = self.causal
    h, rstd = fast_train.kernels.add_rstd(hidden, delta, model.config.rms_norm_eps)
    x = (h.float() * rstd[:, None]).to(h.dtype) * model.model.norm.weight
    with torch.enable_grad():
        logits = x.requires_grad_() @ model.lm_head.weight.t()
        loss = cross_entropy(logits.float(), batch.targets, reduction="sum")
    grad = torch.autograd.grad(loss, x)[0] if need_grad else None
    return loss.detach() * batch.scale.sum(), (grad, h, rstd)


def run_growth() -> None:
    """How speed grows with the step's size; `filled` is what graphs for multiples of BUCKET compute more than the real tokens."""
    model = load_model()
    steps, cycle = (SHORT, 1) if CPU else ((16, 8), 4)
    for cap, rows in [(12, ROWS)] if CPU else itertools.product((256, 512, 1024), (8, 16, 32, 64)):
        tokens = [
            sum(
                len(example["input_ids"])
                for example in m.make_examples(cycle * rows, cap)[i * rows : (i + 1) * rows]
            )
            for i in range(cycle)
        ]
        filled = sum(-(-n // fast_train.BUCKET) * fast_train.BUCKET for n in tokens) / sum(tokens) - 1
        with guarded(f"growth {rows} {cap}"):
            model = renew(model)
            fast_train.install_fast_layers(model)
            train(
                model,
                plan_for("fast", rows, rows=rows),
                f"growth: {rows} examples, {cap} tokens",
                *steps,
                cap=cap,
                cycle=cycle,
                about={"growth_examples": rows, "growth_tokens": cap, "filled": round(filled, 3)},
            )


def run_memory() -> None:
    """Planned settings with the allocator capped to smaller GPUs' memory, every row at full length: the worst batch there is."""
    total = 1e9 if CPU else torch.cuda.get_device_properties(0).total_memory
    model = None
    for gpu, limit, path in (
        ("T4", 15e9, "fast"),
        ("L4", 22e9, "fast"),
        ("A100", 40e9, "fast"),
        ("this GPU", total, "fast"),
    ):
        dtype = torch.float16 if gpu == "T4" and not CPU else DTYPE
        for tokens in (512, 1024):
            with guarded(f"memory {gpu} {tokens}"):
                if not CPU:
                    torch.cuda.set_per_process_memory_fraction(1.0)
                if gpu in ("T4", "L4") and tokens == 512:  # their types differ
                    model = None
                    m.free_memory()
                    model = load_model(dtype=dtype)
                model = renew(model)
                if CPU:
                    plan = planning.plan_training(model, ROWS, tokens)
                else:
                    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
                    free = int(limit - torch.cuda.memory_allocated())
                    capability = (7, 5) if gpu == "T4" else (8, 0)
                    with (
                        patched(torch.cuda, "mem_get_info", lambda device=None, found=(free, int(limit)): found),
                        patched(torch.cuda, "get_device_capability", lambda device=None, c=capability: c),
                    ):
                        plan = planning.plan_training(model, ROWS, tokens, path=path)
                row = full_length_steps(model, plan, tokens)
                record(
                    memory=gpu,
                    limit_gb=round(limit / 1e9, 1),
                    tokens=tokens,
                    path=plan.path,
                    per_device_train_batch_size=plan.per_device_train_batch_size,
                    dtype=str(dtype),
                    why=plan.why,
                    **row,
                )


def full_length_steps(model, plan, tokens: int) -> dict:
    """Peak memory of steps whose rows all have full length; as many rows at a time as planned."""
    ids = [5] * (12 if CPU else tokens)
    batch = plan.collator(pad)(
        [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]}] * plan.per_device_train_batch_size
    )
    batch = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    if not CPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with torch.autocast(DEVICE, plan.dtype, enabled=not CPU):
            loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return m.peak_memory()


# ---------------------------------------------------------------- checks


def check_numbers(model) -> None:
    """Kept weights bit for bit; gradients of both paths against float32, with a B that is not zero."""
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    fast_train.install_fast_layers(model)
    layers = model.get_base_model().forward.args[1].layers
    equal = all(
        torch.equal(
            group.kept[rows, : group.width], dequantize_4bit(base.weight.data, base.weight.quant_state)
        )
        for layer in layers
        for group in layer.groups
        for rows, base in zip(group.rows, group.bases, strict=True)
    )
    record(check="kept weights equal bitsandbytes' bit for bit", ok=equal)
    examples = m.make_examples(4)
    batch = flat_batch(examples)
    fast = gradients(model, batch, DTYPE)
    fast_train.remove_fast_layers(model)
    batch = {key: value.to(DEVICE) for key, value in pad(examples).items()}
    plain = gradients(model, batch, DTYPE)
    exact = gradients(to_float32(model), batch, torch.float32)
    total = sum(g.pow(2).sum().item() for g in exact[1].values())
    for name, (loss, grads) in (("fast", fast), ("transformers", plain)):
        error = math.sqrt(sum((grads[n] - g).pow(2).sum().item() for n, g in exact[1].items()) / total)
        record(check=f"{name} against float32", loss=loss, loss_float32=exact[0], gradient_error=error)


def flat_batch(examples: list[dict]) -> dict:
    return {
        key: value.to(DEVICE) if torch.is_tensor(value) else value
        for key, value in plan_for("fast").collator(None)(examples).items()
    }


def gradients(model, batch, dtype):
    model.train()
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    found = {
        re.sub(r".*layers", "layers", n): p.grad.float().clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    return loss.item(), found


def to_float32(model):
    """A float32 copy of the dequantised model with the same adapter."""
    from bitsandbytes.functional import dequantize_4bit

    state = {}
    for name, module in model.get_base_model().named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and "lora_" not in name:
            quantised = getattr(weight, "quant_state", None)
            weight = weight.data if quantised is None else dequantize_4bit(weight.data, quantised)
            state[name.replace(".base_layer", "") + ".weight"] = weight.float()
    with torch.device(DEVICE):
        settings = {
            k: v
            for k, v in model.get_base_model().config.to_dict().items()
            if k not in ("quantization_config", "dtype")
        }
        exact = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    exact.load_state_dict(state, strict=False)
    exact = add_adapter(exact.float(), dropout=0.0)
    exact.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    return exact


if CPU:
    from fast_helpers import attend_backward_on_cpu, attend_on_cpu

    fast_train.DecoderLayer.attend, fast_train.DecoderLayer.attend_backward = (
        attend_on_cpu,
        attend_backward_on_cpu,
    )
JOBS = {
    "prepare": prepare,
    "padded": run_padded,
    "padding_free": run_flattened,
    "fast": run_fast,
    "settings": run_settings,
    "nf4": run_nf4,
    "nf4_16": run_nf4_16,
    "ablation": run_ablation,
    "growth": run_growth,
    "memory": run_memory,
}
m.wait_for_turn()
with guarded(m.NAME):
    JOBS[m.NAME.split(".")[0]]()
os._exit(0)  # data-loader workers and CUDA need no tidy end
