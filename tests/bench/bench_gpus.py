"""A GPU, or several against one, started as a user starts them. One job per launch; results are appended to OUT/gpus.jsonl.

    python bench_gpus.py own OUT   your profile's model on this GPU, fast and padded: OUT/training_NAME_OF_THE_GPU.json; notebook 40 shows it
    accelerate launch --num_processes N bench_gpus.py speed OUT [--cpu]   tokens/s at 32 rows a step and at 32 a GPU
    accelerate launch --config_file medqa_lib/training/fsdp.yaml bench_gpus.py big OUT [--cap GIB] [--cpu]
    python bench_gpus.py big OUT [--cap GIB]                              the same steps on one card
    python bench_gpus.py models OUT                                       first: random models with SmolLM2's tokenizer

`speed`: SmolLM2, and TinyLlama's layers with random weights and SmolLM2's vocabulary, on real rows (MEDQA_DATA_DIR).
`big`: a Llama of 8.3 billion random weights, 5 steps, without dropout. --cap limits what torch may take of each card.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM

from medqa_lib.config import PROFILES, LoraSettings, current_profile, get_experiment
from medqa_lib.data.prepare import prepare_splits
from medqa_lib.model import load_tokenizer
from medqa_lib.training import run as training
from medqa_lib.training.session import CheckpointSession

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("job", choices=["models", "speed", "big", "own"])
parser.add_argument("out", type=Path)
parser.add_argument("--cap", type=float)
parser.add_argument("--cpu", action="store_true", help="try it out: a tiny model, few steps")
options = parser.parse_args()
RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
SIZES = {
    "tinyllama-layers": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
}
STEPS = (1, 2, 3) if options.cpu else (40, 80, 120, 160)
OWN_STEPS = {"fast": (20, 40, 60, 80), "padded": (4, 8, 12)}


def profile_of(model: str):
    if model == "smollm2-135m":
        profile = PROFILES["smoke"] if options.cpu else dataclasses.replace(PROFILES["gpu"], model=model)
        return dataclasses.replace(profile, step_divisor=1)
    return dataclasses.replace(PROFILES["gpu"], model=str(options.out / "models" / model))


def save_models() -> None:
    tokenizer = load_tokenizer(
        PROFILES["smoke"] if options.cpu else dataclasses.replace(PROFILES["gpu"], model="smollm2-135m")
    )
    for name, size in SIZES.items():
        config = LlamaConfig(
            **(TINY if options.cpu else size),
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32 if options.cpu else torch.bfloat16)
        with torch.device("cpu" if options.cpu else "cuda"):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(options.out / "models" / name)
        tokenizer.save_pretrained(options.out / "models" / name)
        print(name, f"{model.num_parameters():,} parameters", flush=True)


class Clock(CheckpointSession):
    """Notes the time when each step ends, once the GPU has done it, if it is one of `steps`."""

    steps, marks = STEPS, ()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks = (*self.marks, time.perf_counter())
        return super().on_step_end(args, state, control, **kwargs)


def train(profile, name: str, path: str | None = None, **changes):
    """Train as `run_experiment` does; returns (losses, numbers, the session)."""
    experiment = dataclasses.replace(get_experiment("exp_004"), **changes)
    if options.cpu:
        experiment = dataclasses.replace(experiment, max_length=96)
    folder = options.out / f"{name}_{PROCESSES}"
    with Clock(folder / "checkpoints", folder / "checkpoints", {}) as session:
        losses, numbers = training.train_adapter(
            experiment, splits, profile, session, folder / "adapter", path
        )
    PartialState().wait_for_everyone()
    if RANK == 0:
        shutil.rmtree(folder)  # else the next call would resume
    return losses, numbers, session


def timed(profile, name: str, rows: int, steps: tuple[int, ...], path: str | None = None) -> dict:
    """Train and time the steps between `steps`, which are equally far apart; no save or validation is among them."""
    Clock.steps = steps
    losses, numbers, session = train(
        profile,
        name,
        path,
        total_batch_size=rows,
        max_steps=steps[-1] + 2,
        save_steps=steps[-1] + 2,
        logging_steps=steps[0],
        learning_rate=2e-4,
    )
    tokens = losses[losses["split"] == "train"].set_index("step")["tokens"]
    marks = dict(zip(steps, session.marks, strict=True))
    parts = list(itertools.pairwise(steps))
    rates = [(tokens[b] - tokens[a]) / (marks[b] - marks[a]) for a, b in parts]
    seconds = marks[steps[-1]] - marks[steps[0]]
    return {
        "model": Path(profile.model).name,
        "rows": rows,
        "path": numbers["training_path"],
        "seconds": seconds,
        "tokens_s": (tokens[steps[-1]] - tokens[steps[0]]) / seconds,
        "tokens_s_range": [min(rates), max(rates)],
        "whole_s": numbers["train_time_s"],
        "peak_gib": numbers.get("peak_memory_gib"),
        "losses": losses[["step", "split", "loss"]].values.tolist(),
    }


def write(**row) -> None:
    if RANK == 0:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        with open(options.out / "gpus.jsonl", "a") as file:
            file.write(json.dumps({"gpu": gpu, "processes": PROCESSES, **row}) + "\n")


def run_speed() -> None:
    for model in ("smollm2-135m", "tinyllama-layers"):
        for rows in (4, 8) if options.cpu else sorted({32, 32 * PROCESSES}):
            write(job="speed", **timed(profile_of(model), f"{model}_{rows}", rows, STEPS))
            torch.cuda.empty_cache()


def run_own() -> None:
    gpu, arms = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", []
    for path, steps in OWN_STEPS.items():
        arms.append(
            timed(
                current_profile(),
                f"own_{path}",
                4 if options.cpu else 32,
                STEPS if options.cpu else steps,
                "padded" if options.cpu or path == "padded" else None,
            )
        )
    file = options.out / f"training_{gpu.lower().replace(' ', '_')}.json"
    about = {"gpu": gpu, "date": time.strftime("%F"), "torch": torch.__version__, "arms": arms}
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{file}: " + ", ".join(f"{arm['path']} {arm['tokens_s']:,.0f} tokens/s" for arm in arms))


def compute_as_sharded() -> None:
    """One card, with the activations that two sharded ones keep: checkpointing, four rows at a time."""
    add_lora, plan_training = training.add_lora, training.planning.plan_training

    def add_checkpointing(*args):
        model = add_lora(*args)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def plan(model, rows, *args, **kwargs):
        plan = plan_training(model, rows, *args, **kwargs)
        return dataclasses.replace(plan, per_device_train_batch_size=4, gradient_accumulation_steps=rows // 4)

    training.add_lora, training.planning.plan_training = add_checkpointing, plan


def run_big() -> None:
    if options.cap:
        card = int(os.environ.get("LOCAL_RANK", "0"))
        total = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap * 2**30 / total, card)
    if PROCESSES == 1:
        compute_as_sharded()
    # Both would compute with the whole model, which is on the CPU before it is sharded: minutes.
    training.check_model = lambda *_: None
    training.audit_policy = lambda *_: {"policy": "aligned", "verdict": "not audited"}
    start = time.perf_counter()
    losses, numbers, _ = train(
        profile_of("llama-8b"),
        "big",
        "padded",
        max_steps=5,
        save_steps=5,
        logging_steps=1,
        learning_rate=2e-4,
        lora=LoraSettings(lora_dropout=0.0),
    )
    write(
        job="big",
        cap=options.cap,
        seconds=time.perf_counter() - start,
        train_s=numbers["train_time_s"],
        path=numbers["training_path"],
        peak_gib=numbers.get("peak_memory_gib"),
        losses=losses[["step", "split", "loss"]].values.tolist(),
    )


options.out.mkdir(parents=True, exist_ok=True)
if options.job == "models":
    save_models()
else:
    splits = prepare_splits()
    if options.job == "speed":  # validation is not timed here
        splits["validation"] = splits["validation"].select(range(min(64, len(splits["validation"]))))
    {"speed": run_speed, "big": run_big, "own": run_own}[options.job]()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
