"""Faults that a training process does to itself, so that they hit one exact moment. Each function runs before training starts."""

import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import torch
from fault_harness import before


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(n, action):
    """A function that calls `action` at its n-th call only."""
    calls = []

    def count(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            action()

    return count


def at_step(step, action):
    from medqa_lib.training.run import CheckpointSession

    before(
        CheckpointSession,
        "on_step_end",
        lambda session, args, state, *rest, **kw: action() if state.global_step == step else None,
    )


def kill_in_a_step():
    from medqa_lib.training.trainer import AnswerTrainer

    before(AnswerTrainer, "training_step", nth_call(7, die))


def kill_in_a_save():
    from medqa_lib.training.trainer import AnswerTrainer

    before(
        AnswerTrainer, "_save_optimizer_and_scheduler", nth_call(3, die)
    )  # the adapter is written, the rest is not


def kill_before_a_manifest():
    from medqa_lib.training import session as checkpoint_session

    before(checkpoint_session, "write_manifest", nth_call(3, die))


def kill_in_the_copy():
    def half_a_file(reader, writer, *rest):
        content = reader.read()
        writer.write(content[: len(content) // 2])
        writer.flush()
        die()

    def replace():
        shutil.copyfileobj = half_a_file

    at_step(5, replace)


def kill_in_the_pruning():
    before(os, "truncate", nth_call(3, die))


def kill_in_validation():
    from medqa_lib.training.trainer import AnswerTrainer

    before(
        AnswerTrainer, "log", nth_call(5, die)
    )  # the validation loss of step 4 is known, its checkpoint is not saved


def kill_in_the_answers():
    from medqa_lib.evaluation import run

    before(run, "generate_records", nth_call(1, die))


def kill_in_the_adapter_save():
    import peft

    def after_training(*args, **kwargs):
        if "adapters" in str(args[1]):
            Path(args[1]).mkdir(parents=True, exist_ok=True)
            (Path(args[1]) / "adapter_model.safetensors").write_bytes(b"half")
            die()

    before(peft.PeftModel, "save_pretrained", after_training)


SELF_KILLS = [
    kill_in_a_step,
    kill_in_a_save,
    kill_before_a_manifest,
    kill_in_the_copy,
    kill_in_the_pruning,
    kill_in_validation,
    kill_in_the_adapter_save,
    kill_in_the_answers,
]


def fill_disk(folder):
    """Leave no free byte on the file system of `folder`."""
    with open(Path(folder) / "filler", "wb", buffering=0) as filler:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    filler.write(b"\0" * size)
            except OSError:
                continue


def fill_disk_at_step_3(folder):
    at_step(3, lambda: fill_disk(folder))


def limit_file_size_at_step_3():
    """Writing past 30 kB fails from here on: less than the optimizer's state."""
    at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))


def run_at_steps(commands):
    """commands: step -> command line."""
    for step, command in commands.items():
        at_step(step, lambda command=command: subprocess.run(command, check=True))


def rename_at_steps(moves):
    """moves: step -> (from, to)."""
    for step, (source, target) in moves.items():
        at_step(step, lambda source=source, target=target: os.rename(source, target))


def wait_at_step(step, path):
    """Go on when `path` exists; after half an hour in any case, so that no test leaves a process behind."""

    def wait():
        end = time.monotonic() + 1800
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.05)

    at_step(step, wait)


def wait_before_the_answers(here, path):
    """Touch `here` before the first question is answered, and go on when `path` exists."""
    from medqa_lib.evaluation import run

    def wait(*_, **__):
        here.touch()
        while not path.exists():
            time.sleep(0.05)

    before(run, "generate_records", wait)


def run_out_of_memory():
    """In training, a forward pass of more than two rows fails, as on a GPU that is too small."""
    from transformers import LlamaForCausalLM

    def check(model, *args, **inputs):
        if model.training and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    before(LlamaForCausalLM, "forward", check)
