"""Train one experiment with `transformers.Trainer`: audited, checkpointed, resumable; then evaluate it.

`accelerate launch -m medqa_lib.training.run exp_004` trains on several processes; alone, `python -m medqa_lib.training.run exp_004`.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import resource
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils import send_to_device

from medqa_lib import standin as weights
from medqa_lib.config import Experiment, Profile, current_profile, get_experiment, home_dir
from medqa_lib.data.prepare import prepare_splits
from medqa_lib.evaluation.results import RunResult, find_finished, load_run, run_folder, run_identity
from medqa_lib.evaluation.run import (
    RunContext,
    choose_test_questions,
    encode_validation,
    evaluate_run,
    result_identity,
    run_base,
)
from medqa_lib.labels import PaddingCollator, audit_policy, encode_split, pad_supervised, require_policy
from medqa_lib.model import add_lora, check_eos_token, load_base_model, load_tokenizer, trainable_share
from medqa_lib.training import plan as planning
from medqa_lib.training.checkpoints import checkpoint_folders, checkpoint_step, list_checkpoints
from medqa_lib.training.session import CheckpointSession
from medqa_lib.training.trainer import fit, loss_history

VALIDATION_PAIRS_WHILE_TRAINING = 400  # the curve needs fewer than the final figure, which uses all


def run_experiment(experiment: Experiment | str, splits=None, profile: Profile | None = None, home: Path | None = None) -> RunResult:
    """Train and evaluate one experiment; whatever an earlier, interrupted call has finished is used again.

    Args:
        experiment: an entry of EXPERIMENTS or its name, at full size: the profile scales it.
        splits: DatasetDict of `data.split_pairs`; by default prepared from the profile's sources.
        home: where checkpoints, adapter and results go, by default `config.home_dir()`.
    Raises:
        ValueError: unknown experiment, labels that are not what the experiment declares, or results of another run in the way.
        CheckpointError: checkpoints cannot be written, or belong to another run.
        RuntimeError: model or BERTScore encoder can be neither downloaded nor found in the cache.
    """
    profile, home = profile or current_profile(), Path(home or home_dir())
    experiment = profile.scale(get_experiment(experiment) if isinstance(experiment, str) else experiment)
    splits = splits or prepare_splits(by=experiment.split, home=home)
    identity = result_identity(experiment, profile, splits)
    folder = run_folder(experiment.name, profile, home)
    finished = find_finished(folder, identity)
    if finished:
        print(f"{experiment.name} is finished: read from {folder}")
        return finished
    if profile.bertscore_encoder:
        weights.fetch_encoder(profile.bertscore_encoder)  # what cannot be fetched is said before the training, not after it
    adapter_dir = home / "adapters" / profile.model_slug / experiment.name
    local, lasting = checkpoint_folders(home, profile.model_slug, experiment.name)
    with CheckpointSession(local, lasting, run_identity(experiment, profile, identity["data"])) as session:
        losses, training = train_adapter(experiment, splits, profile, session, adapter_dir)
        wait_for_all()  # the first process has written the adapter
        evaluate_run(RunContext(experiment.name, splits, profile, home, identity), adapter_dir, losses, training)
    wait_for_all()
    return load_run(folder)


def wait_for_all() -> None:
    """Under `accelerate launch`: go on when every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def train_adapter(experiment: Experiment, splits, profile: Profile, session: CheckpointSession,
                  adapter_dir: Path) -> tuple[pd.DataFrame, dict]:
    """Train, save the adapter; returns the loss history and numbers for metrics.json. The experiment is already scaled."""
    tokenizer = load_tokenizer(profile)
    train, counts = encode_split(tokenizer, splits["train"], experiment.max_length, experiment.label_policy, experiment.truncation)
    validation = encode_validation(tokenizer, splits["validation"], profile)
    validation = validation.select(range(min(VALIDATION_PAIRS_WHILE_TRAINING, len(validation))))
    model = load_base_model(profile)
    check_eos_token(model, tokenizer)
    collator = PaddingCollator(tokenizer, experiment.label_policy, experiment.max_length)
    report = audit_policy(model, tokenizer, train, collator)
    require_policy(report, experiment.label_policy)
    if model.device.type == "cpu":  # NF4 dequantised once, not at every use: the same numbers, a fifth less time a step
        model = model.dequantize(dtype=torch.float32)
    model = add_lora(model, experiment.lora, experiment.seed)
    plan = planning.plan_training(model, experiment.total_batch_size, experiment.max_length,
                                  processes=int(os.environ.get("WORLD_SIZE", "1")))
    if experiment.label_policy == "padding_supervised" and plan.path != "padded":
        train = pad_supervised(train, experiment.max_length, tokenizer.eos_token_id)
    session.check_space(12 * trainable_share(model)[0] + 5 * 2**20)  # float32 weights and two AdamW moments
    describe_run(experiment, profile, model, plan, train, plan.collator(collator), counts, report, splits, session)
    trainer = fit(model, experiment, train, validation, collator, session, plan)
    train_time_s = session.train_time_s
    session.require_lasting()
    if trainer.is_world_process_zero():
        model.save_pretrained(adapter_dir)
        tokenizer.save_pretrained(adapter_dir)
    trainable, share = trainable_share(model)
    numbers = {"train_time_s": train_time_s, "trained_steps": trainer.state.global_step,
               "trained_tokens": trainer.state.num_input_tokens_seen, "trainable_parameters": trainable,
               "trainable_share": share, "training_path": plan.path}
    if torch.cuda.is_available():
        numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    losses = loss_history(trainer.state.log_history)
    del trainer, model
    gc.collect()
    torch.cuda.empty_cache()
    return losses, numbers


def describe_run(experiment: Experiment, profile: Profile, model, plan, train, collator, counts: dict, report: dict, splits,
                 session: CheckpointSession) -> None:
    """Say before the start what will happen, how long it will take and how much memory."""
    if int(os.environ.get("RANK", "0")):
        return
    trainable, share = trainable_share(model)
    n = len(choose_test_questions(splits["test"], profile))
    try:
        step_s, memory_gib = measure_step(model, [train[row] for row in range(plan.per_device_train_batch_size)], collator, plan)
        left, rest = steps_left(experiment, session), ""
        if left < experiment.max_steps:
            rest = f" for the {left} steps that are left"
        estimate = f"Training will take about {left * step_s / 60:.1f} minutes{rest} and {memory_gib:.1f} GiB"
    except torch.OutOfMemoryError:
        estimate = f"{plan.per_device_train_batch_size} rows at a time do not fit into memory, so fewer will be taken"
    cut = ", ".join(f"{name} {number:,}" for name, number in counts.items())
    print(f"{experiment.name}: {experiment.max_steps} steps of {experiment.total_batch_size} rows, learning rate "
          f"{experiment.learning_rate:g}, labels {experiment.label_policy}. Training rows: {cut}")
    print(f"Labels: {report['verdict']}")
    print(f"Trainable: {trainable:,} parameters, {share:.3%}. Plan: {plan.why}")
    print(f"{estimate}; then {n} test questions are answered, which gives a share near one half to within {0.98 / math.sqrt(n):.3f} (95%).")


def steps_left(experiment: Experiment, session: CheckpointSession) -> int:
    """Steps after the newest checkpoint. Whether that one is whole is not looked at: a guess of the time needs no more."""
    checkpoints = [checkpoint for folder in (session.local_dir, session.lasting_dir) for checkpoint in list_checkpoints(folder)]
    return max(0, experiment.max_steps - max(map(checkpoint_step, checkpoints), default=0))


def measure_step(model, examples: list[dict], collator, plan) -> tuple[float, float]:
    """Seconds of one optimiser step, and peak memory in GiB (GPU, or the process without one), from passes over one micro-batch."""
    batch = send_to_device(collator(examples), model.device)
    on_gpu = model.device.type == "cuda"
    with torch.random.fork_rng(devices=[model.device] if on_gpu else []):
        model.train()
        for _ in range(2 if on_gpu else 1):  # on a GPU the first pass compiles and allocates
            start = time.perf_counter()
            with torch.autocast(model.device.type, plan.dtype, enabled=on_gpu):
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.synchronize()
            pass_s = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pass_s * plan.gradient_accumulation_steps, peak_bytes / 2**30


def main() -> None:
    """Train the experiments that the command line names."""
    parser = argparse.ArgumentParser(prog="medqa_lib.training.run", description=run_experiment.__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT",
                        help="for example exp_004; `base` and `base_random` evaluate the untuned model")
    for name in parser.parse_args().experiments:
        run = run_base(prepare_splits(by="random") if name == "base_random" else None, name=name) \
            if name in ("base", "base_random") else run_experiment(name)
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{name}: validation loss {run.metrics['validation_loss']:.4f}, results in {run.folder}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a process that ends inside the group is sometimes aborted by gloo's threads

