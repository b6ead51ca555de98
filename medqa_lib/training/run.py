"""Train one experiment with `transformers.Trainer`: audited, checkpointed, resumable; then evaluate it."""

import argparse
import gc
import os
import sys
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState

from medqa_lib import standin
from medqa_lib.config import Experiment, Profile, current_profile, get_experiment, home_dir, make_home
from medqa_lib.data.prepare import prepare_splits
from medqa_lib.evaluation import retrieval
from medqa_lib.evaluation.lock import lock_run
from medqa_lib.evaluation.results import RunResult, find_finished, has_nf4, load_run, run_identity
from medqa_lib.evaluation.run import (
    RunContext,
    encode_validation,
    evaluate_run,
    result_identity,
    run_base,
)
from medqa_lib.labels import audit_policy, encode_split, make_collator, require_policy
from medqa_lib.model import (
    add_lora,
    check_model,
    context_length,
    is_sharded,
    load_base_model,
    load_tokenizer,
    trainable_share,
    whole,
)
from medqa_lib.training import plan as planning
from medqa_lib.training import trainer as training
from medqa_lib.training.checkpoints import checkpoint_folders
from medqa_lib.training.session import CheckpointSession

# Name of the untuned model's run -> its split.
UNTUNED = {"base": "group", "base_without_nf4": "group", "base_random": "random",
           "base_official": "official"}
VALIDATION_PAIRS_WHILE_TRAINING = 200  # the curve needs fewer than the final figure, which uses all


def run_experiment(experiment: Experiment | str, splits=None, profile: Profile | None = None,
                   home: Path | None = None, path: str | None = None) -> RunResult | None:
    """Train and evaluate one experiment; whatever an earlier, interrupted call has finished is used again.

    A model sharded over several GPUs is only trained, and None returned: evaluation needs it whole.

    Args:
        experiment: an entry of EXPERIMENTS or its name, at full size: the profile scales it.
        splits: DatasetDict of `data.split_pairs`; by default prepared from the profile's sources.
        home: where checkpoints, adapter and results go, by default `config.home_dir()`.
        path: how a step is computed, one of `plan.PATHS`; by default the fastest that this machine allows.
    Raises:
        ValueError: unknown experiment, labels other than it declares, or results of another run in the way.
        RunBusy: another process has taken this run over.
        CheckpointError: checkpoints cannot be written, or belong to another run.
        TrainingDiverged: the loss or a weight is not finite.
    """
    profile, home = profile or current_profile(), Path(home or home_dir())
    experiment = profile.scale(get_experiment(experiment) if isinstance(experiment, str) else experiment)
    splits = splits or prepare_splits(by=experiment.split, home=home)
    identity = result_identity(experiment, profile, splits)
    context = RunContext(experiment.name, splits, profile, home, identity, experiment.passages)
    with lock_run(experiment.name, profile, home):
        if finished := find_finished(context.folder, identity):
            print(f"{experiment.name} is finished; its log:\n{finished.log or '(none kept)'}")
            return finished
        return _train_and_evaluate(experiment, context, path)


def _train_and_evaluate(experiment: Experiment, context: RunContext, path: str | None) -> RunResult | None:
    profile, home, splits = context.profile, context.home, context.splits
    if profile.bertscore_encoder:
        standin.fetch_encoder(profile.bertscore_encoder)  # if that fails, it is said before the training
    adapter_dir = home / "adapters" / profile.model_slug / experiment.name
    local, lasting = checkpoint_folders(home, profile.model_slug, experiment.name)
    identity = run_identity(experiment, profile, context.identity["data"])
    with CheckpointSession(local, lasting, identity) as session:
        losses, numbers = train_adapter(experiment, splits, profile, session, adapter_dir, path)
        gc.collect()  # the model and its graphs
        torch.cuda.empty_cache()
        if session.is_main:
            context.folder.mkdir(parents=True, exist_ok=True)
            (context.folder / "log.txt").write_text("\n".join(session.lines) + "\n", encoding="utf-8")
        PartialState().wait_for_everyone()  # the first process has written the adapter
        if is_sharded():
            return None
        evaluate_run(context, adapter_dir, losses, numbers, before_save=session.require_lasting)
        PartialState().wait_for_everyone()
        return load_run(context.folder)


def train_adapter(experiment: Experiment, splits, profile: Profile, session: CheckpointSession,
                  adapter_dir: Path, path: str | None = None) -> tuple[pd.DataFrame, dict]:
    """Train and save the adapter. The experiment is already scaled.

    Returns:
        (loss history, numbers for metrics.json)
    """
    tokenizer, nf4 = load_tokenizer(profile), has_nf4(experiment.name)
    model = load_base_model(profile, nf4)
    if not torch.cuda.is_available():  # once, not at every use: the same numbers, a fifth less time per step
        model = model.dequantize(dtype=torch.float32) if nf4 else model.float()
    check_model(model, tokenizer)
    context = context_length(model)
    if experiment.passages:
        splits = retrieval.prepare_training(splits, experiment.passages)
    train, counts = encode_split(tokenizer, splits["train"], min(experiment.row_length, context),
                                 experiment.label_policy, experiment.truncation)
    validation = encode_validation(tokenizer, splits["validation"], profile, context, experiment.passages)
    validation = validation.select(range(min(VALIDATION_PAIRS_WHILE_TRAINING, len(validation))))
    collator = make_collator(tokenizer, experiment.label_policy, experiment.row_length)
    report = audit_policy(model, tokenizer, train, collator)
    require_policy(report, experiment.label_policy)
    model = add_lora(model, experiment.lora, experiment.seed)
    if is_sharded():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if experiment.label_policy == "padding_supervised":
        path = "padded"  # the other paths have no padding
    plan = planning.plan_training(model, experiment.total_batch_size, experiment.row_length, path=path,
                                  examples=train,
                                  processes=int(os.environ.get("WORLD_SIZE", "1")))
    for line in describe_run(experiment, model, counts, report["verdict"], plan):
        session.say(line)

    def build_trainer(plan):
        arguments = training.training_arguments(experiment, session.local_dir, plan, profile.report_to)
        return training.AnswerTrainer(model, arguments, session=session, eval_dataset=validation,
                                      train_dataset=train.select_columns(["input_ids", "labels"]),
                                      data_collator=plan.collator(collator))

    trainer = training.fit(build_trainer, plan, session)
    numbers = describe_training(trainer, session) | {"training_path": plan.path}
    losses = training.loss_history(trainer.state.log_history)
    session.say(training.loss_table(losses))
    session.require_lasting()
    save_adapter(model, tokenizer, adapter_dir, session.is_main)
    return losses, numbers


def save_adapter(model, tokenizer, folder: Path, is_main: bool) -> None:
    """Every process calls this, since sharded weights are gathered; the first one writes."""
    weights = {name: whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    if is_main:
        model.save_pretrained(folder, state_dict=weights if is_sharded() else None)
        tokenizer.save_pretrained(folder)


def describe_run(experiment: Experiment, model, counts: dict, verdict: str, plan) -> list[str]:
    """What will be trained, in lines for the log."""
    rows = min(experiment.total_batch_size, counts["kept"])
    return [f"{experiment.name}: {experiment.max_steps} steps of {rows} rows, "
            f"learning rate {experiment.learning_rate:g} ({experiment.lr_scheduler_type}), "
            f"labels {experiment.label_policy}",
            "Training rows: " + ", ".join(f"{name} {number:,}" for name, number in counts.items()),
            f"Labels: {verdict}",
            "Trainable: {:,} parameters, {:.3%}".format(*trainable_share(model)),
            f"Plan: {plan.why}"]


def describe_training(trainer, session: CheckpointSession) -> dict:
    """Say what the training took. The numbers are for metrics.json.

    Raises:
        TrainingDiverged: a trained weight is not finite.
    """
    model, state, seconds = trainer.model, trainer.state, session.train_time_s
    if not all(bool(whole(value).isfinite().all()) for value in model.parameters() if value.requires_grad):
        raise training.TrainingDiverged(f"A weight is not finite after step {state.global_step}. Lower the "
                                        f"learning rate and delete {session.lasting_dir}.")
    trainable, share = trainable_share(model)
    tokens = state.num_input_tokens_seen
    numbers = {"train_time_s": seconds, "trained_steps": state.global_step, "trained_tokens": tokens,
               "trainable_parameters": trainable, "trainable_share": share}
    line = (f"Trained {state.global_step} steps, {tokens:,} tokens in {seconds:,.0f} s with validation and "
            f"checkpoints: {tokens / max(seconds, 1e-9):,.0f} tokens/s")
    if torch.cuda.is_available():
        numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        line += f", peak memory {numbers['peak_memory_gib']:.1f} GiB"
    elif sys.platform == "linux":  # macOS counts it in other units, Windows not at all
        from resource import RUSAGE_SELF, getrusage

        line += f", peak memory of the process {getrusage(RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    session.say(line)
    return numbers


def main() -> None:
    """Train the experiments that the command line names."""
    parser = argparse.ArgumentParser(prog="medqa_lib.training", description=__doc__)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT",
                        help="for example exp_004; or of the untuned model: " + ", ".join(UNTUNED))
    names = parser.parse_args().experiments
    make_home()
    for name in names:  # all of them before the first one takes an hour
        if name not in UNTUNED:
            get_experiment(name)
    for name in names:
        untuned = name in UNTUNED
        run = run_base(prepare_splits(by=UNTUNED[name]), name=name) if untuned else run_experiment(name)
        if run and int(os.environ.get("RANK", "0")) == 0:
            print(f"{name}: validation loss {run.metrics['validation_loss']:.4f}, results in {run.folder}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads sometimes abort a process that ends inside
