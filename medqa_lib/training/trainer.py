"""`transformers.Trainer` as this project uses it: loss on answers, tokens, going on when memory runs out."""

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from transformers import DataCollatorWithFlattening, Trainer, TrainerState, TrainingArguments

from medqa_lib.config import Experiment
from medqa_lib.evaluation import likelihood
from medqa_lib.training import plan as planning
from medqa_lib.training.checkpoints import checkpoint_step
from medqa_lib.training.session import CheckpointSession, explain_save_errors


class TrainingDiverged(RuntimeError):
    """The loss or a weight is not a finite number."""


class StepSampler(Sampler):
    """accelerate's order of N examples, but within each step's `rows` the longest first: less padding.

    Args:
        lengths: (N,) tokens.
    """

    def __init__(self, lengths: list[int], rows: int, seed: int) -> None:
        self.lengths, self.rows, self.seed, self.epoch = lengths, rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(order), self.rows):
            yield from sorted(order[start:start + self.rows], key=lambda row: -self.lengths[row])


def gather_bytes(policy):
    """FSDP2's policy without any cast, so that 4-bit weights keep their bits and losses are not rounded.

    FSDP copies a layer that is all bfloat16 as numbers, and then a GPU rewrites what reads as NaN; packed
    weights are bfloat16 in name only (github.com/bitsandbytes-foundation/bitsandbytes/issues/1945). It copies
    a layer of two dtypes as bytes: so adapters stay in float32. Each layer must have one.
    """
    return dataclasses.replace(policy, param_dtype=None, output_dtype=None, reduce_dtype=torch.float32)


class AnswerTrainer(Trainer):
    """Trainer that is evaluated by the token-weighted loss on answers and counts the tokens it trains on.

    Unlike the Trainer's own, this evaluation draws no random number, so it changes no dropout mask after it.
    """

    def __init__(self, *args, session: CheckpointSession, **kwargs):
        super().__init__(*args, callbacks=[session], **kwargs)
        self.session, self.new_tokens = session, 0
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if policy := plugin and plugin.mixed_precision_policy:
            plugin.mixed_precision_policy = gather_bytes(policy)

    def _get_train_sampler(self, *args, **kwargs):
        micro_batches = self.args.gradient_accumulation_steps
        if micro_batches == 1 or isinstance(self.data_collator, DataCollatorWithFlattening):
            return super()._get_train_sampler(*args, **kwargs)
        rows = self.args.train_batch_size * micro_batches * self.args.world_size
        return StepSampler(list(map(len, self.train_dataset["input_ids"])), rows, self.args.seed)

    def train(self, resume_from_checkpoint: str | None = None):
        """Train to the last step. A checkpoint of it is only loaded: the Trainer would train a step more."""
        if resume_from_checkpoint and checkpoint_step(Path(resume_from_checkpoint)) >= self.args.max_steps:
            self._load_from_checkpoint(resume_from_checkpoint)
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        logs = {"eval_loss": likelihood.completion_loss(self.model, self.eval_dataset)}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the Trainer would count the parameters of all modules anew at every step."""
        return 0

    def get_batch_samples(self, *args, **kwargs):
        """Counts tokens on the CPU; `include_num_input_tokens_seen` would wait for the GPU at each step."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.new_tokens += sum(int(batch["attention_mask"].sum()) if "attention_mask" in batch
                               else batch["input_ids"].numel() for batch in batches)
        return batches, items

    def _add_new_tokens(self) -> None:
        """Add those of all processes to the state: only before it is read, since this waits for the GPU."""
        self.state.num_input_tokens_seen += sum(gather_object([self.new_tokens]))
        self.new_tokens = 0

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Logs the number of tokens, too.

        Raises:
            TrainingDiverged: a loss is not finite. A checkpoint of this step is not saved.
        """
        self._add_new_tokens()
        super().log({**logs, "tokens": self.state.num_input_tokens_seen}, *args, **kwargs)
        loss = logs.get("loss", 0.0) + logs.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"The loss is {loss} at step {self.state.global_step}: it has diverged. "
                                   f"Lower the learning rate ({self.args.learning_rate:g}) and delete "
                                   f"{self.args.output_dir}.")

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self.session.require_owner()
        self._add_new_tokens()
        with explain_save_errors(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)


def fit(build_trainer: Callable[..., AnswerTrainer], plan, session: CheckpointSession) -> AnswerTrainer:
    """Train to the last step, from the newest whole checkpoint if there is one.

    Out of GPU memory halves the micro-batch and goes on from the newest checkpoint; the total batch stays.

    Args:
        build_trainer: gives the Trainer of a plan.
    Raises:
        RuntimeError: out of GPU memory with several processes, which cannot all halve at the same step.
        TrainingDiverged: the loss is not finite.
    """
    start = None
    while True:
        trainer = build_trainer(plan)
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        start = start or [weight.detach().clone() for weight in weights]
        try:
            trainer.train(session.resume_from())
            return trainer
        except torch.OutOfMemoryError as error:
            if trainer.args.world_size > 1:  # the others would wait for this process for ever
                raise RuntimeError(f"Out of GPU memory on process {trainer.args.process_index} of "
                                   f"{trainer.args.world_size}: {plan.why}. See with nvidia-smi what else is "
                                   "on that GPU, and start again.") from error
        # Here and not in the handler: there the traceback still holds what did not fit.
        model, plan = trainer.model, plan.halved()
        session.say(f"Out of GPU memory. {plan.why}")
        del trainer
        for weight, value in zip(weights, start, strict=True):
            weight.data.copy_(value)
            weight.grad = None
        planning.prepare_model(model, plan.path)  # frees the graphs of the larger micro-batch
        gc.collect()
        torch.cuda.empty_cache()


def training_arguments(experiment: Experiment, output_dir: Path, plan,
                       report_to: str = "none") -> TrainingArguments:
    """The experiment in the Trainer's words. The rest is its defaults (AdamW, gradient norm clipped to 1)."""
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        str(output_dir), seed=experiment.seed, max_steps=experiment.max_steps,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        bf16=plan.dtype == torch.bfloat16, fp16=plan.dtype == torch.float16, optim="adamw_torch_fused",
        learning_rate=experiment.learning_rate, lr_scheduler_type=experiment.lr_scheduler_type,
        warmup_steps=math.ceil(experiment.warmup_ratio * experiment.max_steps),
        weight_decay=experiment.weight_decay, save_steps=experiment.save_steps,
        logging_steps=experiment.logging_steps, logging_first_step=True, eval_strategy="steps",
        eval_steps=experiment.save_steps, report_to=report_to, label_names=["labels"],
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite, and wait for the GPU
        remove_unused_columns=False,  # they are told by the signature of `forward`, which fast paths replace
        use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, accelerator_config={"non_blocking": on_gpu},
        disable_tqdm=False,  # else transformers' verbosity decides, and notebooks lose the loss table
        # All gradients in one bucket, once the backward pass has ended: it may be a graph.
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False, ddp_bucket_cap_mb=512)
    # A process trains on one GPU, but the Trainer would count a batch and a loss for each that it sees.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def loss_history(log: list[dict]) -> pd.DataFrame:
    """The Trainer's log as rows of step, split, loss, learning_rate, tokens (trained on so far)."""
    splits = {"loss": "train", "eval_loss": "validation"}
    rows = [{"split": split, "loss": entry[key], **entry}
            for entry in log for key, split in splits.items() if key in entry]
    return pd.DataFrame(rows, columns=["step", "split", "loss", "learning_rate", "tokens"])


def loss_table(losses: pd.DataFrame) -> str:
    """`loss_history` as text, one line per step."""
    table = losses.pivot_table(index="step", columns="split", values="loss").rename_axis(columns=None)
    return table.reset_index().to_string(index=False, float_format="{:.4f}".format, na_rep="")
