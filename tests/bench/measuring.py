"""What the arms of the training benchmark share: the model, the examples, the clock and a row of the results.

A child imports it with `SCRIPT NAME WORK [--cpu] [--small]` as its command line. Random weights and token ids stand in for real ones:
speed does not depend on them. Lengths follow the quantiles of the real rows. Every arm reads the same batches in the same order.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

NAME, WORK = sys.argv[1], Path(sys.argv[2])
CPU, SMALL = "--cpu" in sys.argv, "--small" in sys.argv
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

MODEL_DIR = WORK / "model"
DEVICE = "cpu" if CPU else "cuda"
DTYPE = torch.float32 if CPU else torch.bfloat16
ROWS, CYCLE = (4, 3) if CPU else (32, 8)  # examples a step; different batches, then the first comes again
SAME_STEPS = 5  # steps whose loss must agree between the arms
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = [
    15,
    24,
    28,
    41,
    52,
    62,
    73,
    82,
    96,
    109,
    127,
    150,
    171,
    199,
    228,
    271,
    318,
    367,
    458,
    512,
    512,
]  # 0%, 5%, ... 100%
PROMPTS = [12, 18, 20, 21, 22, 23, 24, 26, 28, 35, 60]


def record(**row) -> None:
    with open(WORK / f"{NAME}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print("RESULT", json.dumps(row), flush=True)


def wait_for_turn() -> None:
    """All children import and open the GPU at the start; each measures when the parent says so."""
    if not CPU:
        torch.zeros(1, device="cuda")
    (WORK / f"ready_{NAME}").touch()
    wait_for(f"go_{NAME}")


def wait_for(file: str) -> None:
    while not (WORK / file).exists():
        time.sleep(0.05)


@contextlib.contextmanager
def guarded(what: str):
    """One arm's failure is recorded and does not stop the others."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        record(failed=what, error=repr(error)[:400])
    free_memory()


def free_memory() -> None:
    gc.collect()
    if not CPU:
        torch.cuda.empty_cache()


def synchronize() -> None:
    if not CPU:
        torch.cuda.synchronize()


def peak_memory() -> dict:
    if CPU:
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def make_examples(count: int, cap: int = 512) -> list[dict]:
    """Random ids; lengths by the real rows' quantiles, stretched from 512 to `cap`, in a fixed random order."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for _ in range(count):
        at = torch.rand(2, generator=generator).tolist()
        length = 6 + round(6 * at[0]) if CPU else max(8, round(quantile(LENGTHS, at[0]) * cap / 512))
        prompt = min(round(quantile(PROMPTS, at[1])), length // 2)
        ids = torch.randint(4, 90 if CPU else 32_000, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


def quantile(values: list[int], share: float) -> float:
    at = share * (len(values) - 1)
    low = min(int(at), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (at - low)


def training_examples(steps: int, rows: int = ROWS, cap: int = 512, cycle: int = CYCLE) -> list[dict]:
    return (make_examples(cycle * rows, cap) * -(-steps // cycle))[: steps * rows]


def set_adapter(model) -> None:
    """LoRA's usual start, A uniform and B zero, the same numbers in every arm and library."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(
            (n[n.index("layers.") :], p) for n, p in model.named_parameters() if "lora_A" in n
        ):
            draw = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(draw / math.sqrt(parameter.shape[1]))


class Clock(TrainerCallback):
    """CUDA events around the steps after the warm-up, the wall clock around all of them, and the first losses for the comparison."""

    def __init__(self, steps: int, warm: int):
        self.steps, self.warm, self.events, self.walls = steps, warm, [], []

    def on_train_begin(self, *_, **__):
        synchronize()
        if not CPU:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **_):
        control.should_log |= state.global_step <= SAME_STEPS
        if state.global_step in (self.warm, self.steps):
            synchronize()
            self.walls.append(time.perf_counter())
        if not CPU:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()

    def row(
        self,
        arm: str,
        trainer,
        examples: list[dict],
        rows: int,
        per_device_train_batch_size: int,
        checkpointing: bool = False,
    ) -> dict:
        """What has been measured: real tokens, without padding, by the wall clock; `tokens_s_10_50_90` are single steps."""
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        tokens = [
            sum(len(example["input_ids"]) for example in examples[i * rows : (i + 1) * rows])
            for i in range(self.steps)
        ]
        timed, wall_s = tokens[self.warm :], self.walls[1] - self.walls[0]
        spans = [a.elapsed_time(b) for a, b in itertools.pairwise(self.events[self.warm - 1 :])] or [
            1e3 * wall_s / len(timed)
        ] * len(timed)
        rates = sorted(1e3 * n / span for n, span in zip(timed, spans, strict=True))
        at = [len(rates) // 10, len(rates) // 2, -(len(rates) // 10) - 1]
        row = dict(
            arm=arm,
            job=NAME,
            tokens_s=round(sum(timed) / wall_s),
            tokens_s_10_50_90=[round(rates[i]) for i in at],
            examples_s=round(rows * len(timed) / wall_s, 1),
            step_ms=round(1e3 * wall_s / len(timed), 2),
            tokens_a_step=round(statistics.mean(timed)),
            timed_steps=len(timed),
            per_device_train_batch_size=per_device_train_batch_size,
            losses=[round(float(e["loss"]), 5) for e in log][:SAME_STEPS],
            norms=[round(float(e["grad_norm"]), 5) for e in log][:SAME_STEPS],
            **peak_memory(),
        )
        prepared = WORK / "prepare.jsonl"  # bench_training.py's; bench_t4.py has none
        machine = json.loads(prepared.read_text().splitlines()[0]) if prepared.exists() else {}
        if "matmul_tflops" in machine:
            flop = machine["flop_a_token"] * (1.5 if checkpointing else 1)
            row["floor_share"] = round(sum(timed) / wall_s * flop / machine["matmul_tflops"] / 1e12, 3)
        return row
