"""Training speed, memory and agreement of the paths, on one GPU; `python tests/bench/bench_training.py --quick` for the main arms.

Each family of arms runs in a process of its own, one after another; while one measures, the next imports. A random TinyLlama
(or, with --small, a SmolLM2-sized model) and random token ids stand in for real ones: speed does not depend on them. Lengths follow
the quantiles of the real rows. Results go to $OUT (default `runs/bench`) as training_<gpu>.json, and a short table is printed last.
`--cpu` only checks that the script runs: a tiny model, Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT", ROOT / "runs" / "bench"))
WORK = Path("/tmp/medqa_bench")  # what parent and children tell each other
FAMILIES = {"padded": 150, "flattened": 100, "fast": 200, "scaling": 120, "memory": 150, "compiled": 240}  # seconds allowed
QUICK = ("padded", "flattened", "fast")
LENGTHS = [15, 24, 28, 41, 52, 62, 73, 82, 96, 109, 127, 150, 171, 199, 228, 271, 318, 367, 458, 512, 512]  # 0%, 5%, ... 100%
PROMPTS = [12, 18, 20, 21, 22, 23, 24, 26, 28, 35, 60]
RIVAL_TOKENS_S = 35_403  # Unsloth tuned, torch's varlen attention shimmed in: same machine kind and model size, 2026-11-24
ROWS = 32

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="agreement and the main arms only, about a minute")
parser.add_argument("--families", help="comma-separated, of: " + ", ".join(FAMILIES))
parser.add_argument("--small", action="store_true", help="SmolLM2-135M's size instead of TinyLlama's")
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--child", help=argparse.SUPPRESS)
options = parser.parse_args()
MODEL_DIR = Path("/tmp") / f"medqa_bench_{'cpu' if options.cpu else 'small' if options.small else 'tiny'}llama"


def parent() -> None:
    """Run each family in a child process and put their results together."""
    names = options.families.split(",") if options.families else QUICK if options.quick else [n for n in FAMILIES if n != "compiled"]
    for folder in (OUT, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    children = {name: start_child(name) for name in ("prepare", *names[:1])}
    results = finish_child("prepare", children["prepare"], 120)
    for i, name in enumerate(names):
        if i + 1 < len(names):
            children[names[i + 1]] = start_child(names[i + 1])  # imports while this one measures
        results += finish_child(name, children[name], FAMILIES[name])
    gpu = re.sub(r"\W+", "_", results[0].get("gpu", "failed").lower()) if results else "failed"
    path = OUT / f"training_{gpu}{'_small' if options.small else ''}.json"
    path.write_text(json.dumps(results, indent=1))
    logs = {name: (WORK / f"{name}.log").read_text()[-20_000:] for name in ("prepare", *names)}
    (OUT / "training_logs.txt").write_text("\n".join(f"##### {name}\n{log}" for name, log in logs.items()))
    print_table(results)
    print(f"written: {path}")


def start_child(name: str) -> subprocess.Popen:
    (WORK / f"go_{name}").unlink(missing_ok=True)
    (WORK / f"{name}.jsonl").unlink(missing_ok=True)
    log = open(WORK / f"{name}.log", "w")
    return subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--child", name], stdout=log, stderr=subprocess.STDOUT)


def finish_child(name: str, child: subprocess.Popen, limit_s: int) -> list[dict]:
    """Let the child use the GPU, wait for it, and read what it has measured, even if it failed half-way."""
    (WORK / f"go_{name}").touch()
    start = time.time()
    try:
        child.wait(limit_s if not options.cpu else 900)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    lines = WORK / f"{name}.jsonl"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    print(f"{name}: {time.time() - start:.0f} s, exit {child.returncode}, {len(results)} results", flush=True)
    if child.returncode:
        print("\n".join((WORK / f"{name}.log").read_text().splitlines()[-12:]), flush=True)
    return results


def print_table(results: list[dict]) -> None:
    machine = results[0] if results else {}
    print(json.dumps(machine))
    for row in results[1:]:
        if "tokens_s" in row:
            print(f"{row['arm']:34} {row['tokens_s']:>8,} tokens/s  {row['step_ms']:>7.1f} ms  peak {row['peak_gib']:5.2f} GiB"
                  f"  floor {row.get('floor_share', 0):.0%}  loss {row['losses'][:5]} norm {row['norms'][:5]}")
        else:
            print(json.dumps(row)[:1200])
    by_arm = {row["arm"]: row for row in results if "arm" in row}
    if {"fast", "padded"} <= by_arm.keys():
        fast, padded = by_arm["fast"]["tokens_s"], by_arm["padded"]["tokens_s"]
        print(f"fast / padded {fast / padded:.1f} (target 20), fast / best rival {fast / RIVAL_TOKENS_S:.2f} (target 1.7)")
    reference = by_arm.get("padded, dropout 0")
    for name, row in by_arm.items():
        if reference and name.endswith("dropout 0") and len(row["losses"]) >= 5:
            loss = max(abs(a - b) for a, b in zip(row["losses"][:5], reference["losses"][:5], strict=True))
            norm = max(abs(a / b - 1) for a, b in zip(row["norms"][:5], reference["norms"][:5], strict=True))
            print(f"agreement of '{name}' with padded, 5 steps: loss {loss:.1e} (allowed 1e-3), gradient norm {norm:.2%} (allowed 1%)")


if not options.child:
    parent()
    sys.exit()

# ---------------------------------------------------------------- a child, from here on
if options.cpu:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from medqa_lib import fast_train, planning  # noqa: E402
from medqa_lib.config import ALL_LINEAR, QKV  # noqa: E402

DEVICE = "cpu" if options.cpu else "cuda"
DTYPE = torch.float32 if options.cpu else torch.bfloat16
ROWS = 4 if options.cpu else ROWS
if options.cpu:
    from test_fast_train import attend_backward_on_cpu, attend_on_cpu

    fast_train.DecoderLayer.attend, fast_train.DecoderLayer.attend_backward = attend_on_cpu, attend_backward_on_cpu


def record(**row) -> None:
    with open(WORK / f"{options.child}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print("RESULT", json.dumps(row), flush=True)


def synchronize() -> None:
    if not options.cpu:
        torch.cuda.synchronize()


def prepare() -> None:
    """Save the random model once and measure the two ceilings."""
    sizes = (64, 2, 4, 2, 96, 96) if options.cpu else (576, 30, 9, 3, 1536, 49152) if options.small else (2048, 22, 32, 4, 5632, 32000)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    config = LlamaConfig(**dict(zip(names, sizes, strict=True)), max_position_embeddings=2048, rms_norm_eps=1e-5,
                         tie_word_embeddings=options.small, use_cache=False)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(DTYPE)
    model.save_pretrained(MODEL_DIR)
    linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    linear += config.vocab_size * config.hidden_size * config.tie_word_embeddings
    import bitsandbytes
    import peft
    import transformers
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    ceilings = {"gpu": "cpu"}
    if not options.cpu:
        ceilings = {"gpu": torch.cuda.get_device_name(), "matmul_tflops": matmul_ceiling(), "copy_tb_s": copy_ceiling()}
    # a forward pass multiplies each linear weight once (2 operations), the backward pass once more: frozen weights need no gradient
    record(**ceilings, date=time.strftime("%Y-%m-%d"), versions=versions, flop_a_token=4 * linear, rows=ROWS)


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
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                      bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, quantization_config=quantization, dtype=dtype, device_map={"": DEVICE},
                                                attn_implementation="sdpa")
    return add_adapter(base, targets, dropout)


def add_adapter(base, targets=ALL_LINEAR, dropout: float = 0.05):
    torch.manual_seed(42)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"))


def make_examples(count: int, cap: int = 512, vocabulary: int = 32000) -> list[dict]:
    """Random ids; lengths by the real rows' quantiles, stretched from 512 to `cap`, in a fixed random order."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for _ in range(count):
        at = torch.rand(2, generator=generator).tolist()
        length = max(8, round(quantile(LENGTHS, at[0]) * cap / 512)) if not options.cpu else 6 + round(6 * at[0])
        prompt = min(round(quantile(PROMPTS, at[1])), length // 2)
        ids = torch.randint(4, 90 if options.cpu else vocabulary, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


def quantile(values: list[int], share: float) -> float:
    at = share * (len(values) - 1)
    low = min(int(at), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (at - low)


def pad(examples: list[dict]) -> dict:
    width = math.ceil(max(len(example["input_ids"]) for example in examples) / 8) * 8
    fill = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    return {key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows]) for key, value in fill.items()}


class Clock(TrainerCallback):
    """CUDA events around the steps after the warm-up, and the wall clock around all of them."""

    def __init__(self, warm: int, steps: int):
        self.warm, self.steps, self.events = warm, steps, []

    def on_train_begin(self, *_, **__):
        if not options.cpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **_):
        if state.global_step in (self.warm, self.steps):
            synchronize()
            self.wall = (getattr(self, "wall", (0, 0))[1], time.perf_counter())
        if not options.cpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()


class SequentialTrainer(Trainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


def train(model, plan, arm: str, steps: int, warm: int, cap: int = 512, checkpointing: bool = False, each_step: bool = False,
          **extra) -> dict:
    """Train `steps` steps and time those after `warm`; returns and records the arm's row."""
    rows = plan.micro_batch * plan.accumulation
    cycle = warm if plan.path == "fast" and not each_step else steps  # the fast path's graphs are recorded while it warms up
    data = make_examples(cycle * rows, cap, model.config.vocab_size)
    data = (data * -(-steps // cycle))[: steps * rows]
    arguments = dict(max_steps=steps, learning_rate=2e-4, lr_scheduler_type="constant", logging_steps=1 if each_step else 10,
                     logging_first_step=True, save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True,
                     use_cpu=options.cpu, seed=42, gradient_checkpointing=checkpointing, label_names=["labels"], **plan.trainer_arguments())
    if checkpointing:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if options.cpu:
        arguments |= {"dataloader_num_workers": 0, "dataloader_pin_memory": False, "accelerator_config": {"non_blocking": False}}
    arguments |= extra
    clock = Clock(warm, steps)
    trainer = SequentialTrainer(model, TrainingArguments(f"/tmp/bench_{options.child}", **arguments), train_dataset=data,
                                data_collator=plan.collator(pad), callbacks=[clock])
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [sum(len(example["input_ids"]) for example in data[i * rows:(i + 1) * rows]) for i in range(steps)]
    spans = [a.elapsed_time(b) for a, b in itertools.pairwise(clock.events[warm - 1:])] or [1e-3] * (steps - warm)  # a CPU has no events
    speeds = sorted(1e3 * n / span for n, span in zip(tokens[warm:], spans, strict=True))
    wall_s = clock.wall[1] - clock.wall[0]
    speed = sum(tokens[warm:]) / wall_s
    row = dict(arm=arm, tokens_s=round(speed), examples_s=round(rows * (steps - warm) / wall_s, 1),
               step_ms=round(statistics.median(spans), 2),
               tokens_s_10_90=[round(speeds[len(speeds) // 10]), round(speeds[-(len(speeds) // 10) - 1])],
               tokens_a_step=round(statistics.mean(tokens)), micro_batch=plan.micro_batch, losses=[round(e["loss"], 5) for e in log],
               norms=[round(float(e["grad_norm"]), 5) for e in log], peak_gib=0.0, reserved_gib=0.0)
    if not options.cpu:
        machine = json.loads((WORK / "prepare.jsonl").read_text())
        flop = machine["flop_a_token"] * (1.5 if checkpointing else 1)
        row |= dict(peak_memory(), floor_share=round(speed * flop / machine["matmul_tflops"] / 1e12, 3))
    record(**row)
    return row


def peak_memory() -> dict:
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)}


def flat_batch(examples: list[dict]) -> dict:
    return {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in planning.FlatCollator()(examples).items()}


def plan_for(path: str, micro_batch: int = ROWS, keep_weights: bool = True, rows: int = ROWS):
    return planning.TrainingPlan(path, DTYPE, micro_batch, rows // micro_batch, keep_weights, "as the benchmark says")


@contextlib.contextmanager
def guarded(what: str):
    """One arm's failure is recorded and does not stop the others."""
    try:
        yield
    except Exception as error:
        import traceback
        traceback.print_exc()
        record(failed=what, error=repr(error)[:400])
    gc.collect()
    if not options.cpu:
        torch.cuda.empty_cache()


def run_padded() -> None:
    model = load_model(dropout=0.0)
    steps = (1, 3) if options.cpu else (2, 6)
    with guarded("padded, dropout 0"):
        train(model, plan_for("padded", ROWS // 4), "padded, dropout 0", 6, 1, each_step=True)
    model = add_adapter(model.unload())
    with guarded("padded"):
        train(model, plan_for("padded", ROWS // 4), "padded", steps[1], steps[0], checkpointing=True)


def run_flattened() -> None:
    if options.cpu:
        planning._attend_varlen = varlen_on_cpu
    model = load_model(dropout=0.0)
    with guarded("flattened, dropout 0"):
        planning.prepare_model(model, "flattened")
        train(model, plan_for("flattened"), "flattened, dropout 0", 6, 1, each_step=True)
    model = add_adapter(remove(model))
    with guarded("flattened"):
        planning.prepare_model(model, "flattened")
        train(model, plan_for("flattened"), "flattened", *((3, 1) if options.cpu else (14, 4)))


def varlen_on_cpu(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_):
    heads = [states[0].transpose(0, 1) for states in (query, key, value)]
    out = [torch.nn.functional.scaled_dot_product_attention(*(s[a:b].transpose(0, 1)[None] for s in heads), is_causal=True, scale=scaling,
                                                            enable_gqa=True)[0].transpose(0, 1)
           for a, b in itertools.pairwise(cu_seq_lens_q.tolist())]
    return torch.cat(out)[None], None


def remove(model):
    """The base model without adapter and without a replaced forward pass."""
    fast_train.remove_fast_layers(model)
    return model.unload()


def run_fast() -> None:
    short = (3, 1) if options.cpu else (36, 12)
    long = (3, 1) if options.cpu else (80, 16)
    model = load_model(dropout=0.0)
    with guarded("checks"):
        check_numbers(model)
    model = add_adapter(remove(model), dropout=0.0)

    def arm(name, model, steps=short, keep_weights=True, dropout=0.05, targets=ALL_LINEAR, each_step=False, **extra):
        base = remove(model)
        model = add_adapter(base, targets, dropout)
        with guarded(name):
            fast_train.install_fast_layers(model, keep_weights)
            train(model, plan_for("fast", keep_weights=keep_weights), name, *steps, each_step=each_step, **extra)
        return model

    model = arm("fast, dropout 0", model, steps=(6, 1), dropout=0.0, each_step=True)
    model = arm("fast", model, steps=long)
    model = arm("fast, q k v only", model, targets=QKV)
    model = arm("fast, NF4 at every use", model, keep_weights=False)
    with guarded("profile"):
        profile(model)
    if options.quick:
        return
    model = arm("fast, dropout 0, timed", model, dropout=0.0)
    with patched(fast_train.LinearGroup, "forward", forward_with_separate_b):
        model = arm("fast less B inside the matmul", model)
    with patched(fast_train.FastStep, "answer_loss", torch_answer_loss):
        model = arm("fast less own cross-entropy", model)
    with patched(fast_train.FastStep, "replay", lambda self, batch: self.compute(batch, True)):
        model = arm("fast less graphs", model)
    with patched(fast_train, "BUCKET", 256):
        model = arm("fast, graphs for multiples of 256", model)
    model = arm("fast less plain fused AdamW", model, optim="adamw_torch")
    model = arm("fast less waiting-free Trainer", model, logging_nan_inf_filter=True, accelerator_config={"non_blocking": False},
                dataloader_num_workers=0)
    model = arm("fast less workers", model, dataloader_num_workers=0)
    arm("fast, again", model, steps=long)


@contextlib.contextmanager
def patched(owner, name: str, value):
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def forward_with_separate_b(self, mode, source, rstd, norm, training, seed, plain=fast_train.LinearGroup.forward):
    """Ablation: the frozen matmul first, B's product added to it afterwards."""
    slots, matmul = self.weight(), torch.Tensor.__matmul__
    if not self.slots:
        return plain(self, mode, source, rstd, norm, training, seed)
    kept = {}

    def split_matmul(x, w):
        kept["xa"] = x[:, self.width:].contiguous()
        return matmul(x[:, :self.width], w[:self.width]).addmm_(kept["xa"], slots[:, self.width:].t())
    with patched(torch.Tensor, "__matmul__", split_matmul):
        return plain(self, mode, source, rstd, norm, training, seed)


def torch_answer_loss(self, hidden, delta, batch, need_grad):
    """Ablation: final norm, logits and loss by torch, in one piece."""
    model = self.causal
    h = (hidden + delta).requires_grad_()
    with torch.enable_grad():
        x = h.float()
        x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)).to(h.dtype) * model.model.norm.weight
        loss = torch.nn.functional.cross_entropy((x @ model.lm_head.weight.t()).float(), batch.targets, reduction="sum") * batch.scale.sum()
    return loss.detach(), torch.autograd.grad(loss, h)[0] if need_grad else None


def check_numbers(model) -> None:
    """Kept weights bit for bit; dropout masks; gradients of both paths against float32, with a B that is not zero."""
    from bitsandbytes.functional import dequantize_4bit
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    fast_train.install_fast_layers(model)
    layers = model.get_base_model().forward.args[1].layers
    equal = all(torch.equal(group.kept[rows, :group.width], dequantize_4bit(base.weight.data, base.weight.quant_state))
                for layer in layers for group in layer.groups for rows, base in zip(group.rows, group.bases, strict=True))
    record(check="kept weights equal bitsandbytes' bit for bit", ok=equal)
    examples = make_examples(4, 512, model.config.vocab_size)
    batch = flat_batch(examples)
    fast = gradients(model, batch, DTYPE)
    fast_train.remove_fast_layers(model)
    batch = {key: value.to(DEVICE) for key, value in pad(examples).items()}
    plain = gradients(model, batch, DTYPE)
    exact = gradients(to_float32(model), batch, torch.float32)
    for name, (loss, grads) in (("fast", fast), ("transformers", plain)):
        total = sum(g.pow(2).sum().item() for g in exact[1].values())
        error = math.sqrt(sum((grads[n] - g).pow(2).sum().item() for n, g in exact[1].items()) / total)
        worst = max(((grads[n] - g).norm() / g.norm()).item() for n, g in exact[1].items())
        record(check=f"{name} against float32", loss=loss, loss_float32=exact[0], gradient_error=error, worst_parameter=worst)


def gradients(model, batch, dtype):
    model.train()
    model.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    found = {re.sub(r".*layers", "layers", n): p.grad.float().clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), found


def to_float32(model):
    """A float32 copy of the dequantised model with the same adapter."""
    from bitsandbytes.functional import dequantize_4bit
    config = model.get_base_model().config
    state = {}
    for name, module in model.get_base_model().named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and "lora_" not in name:
            quantised = getattr(weight, "quant_state", None)
            weight = weight.data if quantised is None else dequantize_4bit(weight.data, quantised)
            state[name.replace(".base_layer", "") + ".weight"] = weight.float()
    with torch.device(DEVICE):
        settings = {k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "dtype")}
        exact = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    exact.load_state_dict(state, strict=False)
    exact = add_adapter(exact.float(), dropout=0.0)
    exact.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    return exact


def profile(model) -> None:
    """Where the GPU's time goes in three steps of the fast path; the table is in the log and in training_profile.txt."""
    from torch.profiler import ProfilerActivity
    model = add_adapter(remove(model))
    fast_train.install_fast_layers(model)
    batch = flat_batch(make_examples(ROWS, 512, model.config.vocab_size))
    for _ in range(2):
        gradients(model, batch, DTYPE)
    activities = [ProfilerActivity.CPU] + ([] if options.cpu else [ProfilerActivity.CUDA])
    synchronize()
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            gradients(model, batch, DTYPE)
        synchronize()
    wall = (time.perf_counter() - start) / 3
    cpu = torch.autograd.DeviceType.CPU
    events = [e for e in profiler.key_averages() if getattr(e, "self_device_time_total", 0) > 0 and e.device_type != cpu]
    events.sort(key=lambda e: -e.self_device_time_total)
    lines = [f"{e.self_device_time_total / 3e3:9.3f} ms  {e.count / 3:6.0f} x  {e.key[:110]}" for e in events]
    (OUT / "training_profile.txt").write_text("\n".join(lines))
    record(profile=lines[:28], busy_ms=round(sum(e.self_device_time_total for e in events) / 3e3, 2), profiled_wall_ms=round(wall * 1e3, 1),
           tokens=batch["input_ids"].numel())


def run_scaling() -> None:
    model = load_model()
    fast_train.install_fast_layers(model)
    for cap in (512,) if options.cpu else (256, 512, 1024):
        for rows in (ROWS,) if options.cpu else (8, 16, 32, 64):
            with guarded(f"scaling {rows} {cap}"):
                steps = (3, 1) if options.cpu else (13, 4)
                train(model, plan_for("fast", rows, rows=rows), f"scaling: {rows} rows, {cap} tokens", *steps, cap=cap)


def run_memory() -> None:
    """Planned settings under allocators capped to smaller GPUs, every row at full length: the worst batch there is."""
    total = 1 if options.cpu else torch.cuda.get_device_properties(0).total_memory
    for gpu, gib, path in (("T4", 15, "padded"), ("L4", 22, "fast"), ("A100", 40, "fast"), ("this GPU", total / 2**30, "fast")):
        dtype = torch.float16 if gpu == "T4" and not options.cpu else DTYPE
        with guarded(f"load for {gpu}"):
            model = load_model(dtype=dtype)
        for tokens in (512, 1024):
            with guarded(f"memory {gpu} {tokens}"):
                planning.prepare_model(model, "padded")
                gc.collect()
                if not options.cpu:
                    torch.cuda.empty_cache()
                    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
                    free = int(min(gib * 2**30, total) - torch.cuda.memory_allocated())
                    plan = planning.plan_training(model, ROWS, tokens, path=path, dtype=dtype, free_bytes=free)
                else:
                    plan = planning.plan_training(model, ROWS, tokens)
                row = full_length_step(model, plan, tokens)
                record(memory=gpu, cap_gib=round(gib, 1), tokens=tokens, path=plan.path, micro_batch=plan.micro_batch, dtype=str(dtype),
                       why=plan.why, **row)
        del model


def full_length_step(model, plan, tokens: int) -> dict:
    """Two optimizer steps' worth of one micro-batch, all rows at full length."""
    ids = [5] * (12 if options.cpu else tokens)
    batch = plan.collator(pad)([{"input_ids": ids, "labels": [-100] * 4 + ids[4:]}] * plan.micro_batch)
    batch = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=not options.cpu)
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast(DEVICE, plan.dtype, enabled=not options.cpu):
            loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if options.cpu:
        return {}
    return peak_memory()


def run_compiled() -> None:
    """The other way: dequantised layers under torch.compile, flattened batches. Logged for comparison."""
    base = load_model().unload()
    model = add_adapter(base.dequantize())
    planning.prepare_model(model, "flattened")
    for layer in model.get_base_model().model.layers:
        layer.compile(dynamic=True)
    start = time.perf_counter()
    row = train(model, plan_for("flattened"), "flattened, layers compiled", 14, 4)
    record(compiled_total_s=round(time.perf_counter() - start, 1), tokens_s=row["tokens_s"], arm="compiled, with compile time", **{
        key: row[key] for key in ("step_ms", "peak_gib", "losses", "norms")})


while not (WORK / f"go_{options.child}").exists():
    time.sleep(0.05)
{"prepare": prepare, "padded": run_padded, "flattened": run_flattened, "fast": run_fast, "scaling": run_scaling, "memory": run_memory,
 "compiled": run_compiled}[options.child]()
os._exit(0)  # data-loader workers and CUDA need no tidy end
