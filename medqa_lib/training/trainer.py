"""`transformers.Trainer` as this project uses it: answer loss, token count, LoRA+, and going on when GPU memory runs out."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import (
    DataCollatorWithFlattening,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from medqa_lib.config import Experiment
from medqa_lib.evaluation import likelihood
from medqa_lib.labels import IGNORE_INDEX
from medqa_lib.training import plan as planning
from medqa_lib.training.checkpoints import checkpoint_step
from medqa_lib.training.session import CheckpointSession


class ProgressBar(TrainerCallback):
    """One plain-text tqdm line; the notebook's own bar is a widget, which GitHub does not render."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", mininterval=5, desc="train")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and hasattr(self, "bar"):
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in (logs or {})}
            self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.bar.close()


class AnswerTrainer(Trainer):
    """Trainer whose evaluation is the token-weighted loss on answers, and which counts the tokens that it has trained on."""

    loraplus_lr_ratio: float | None = None

    def train(self, resume_from_checkpoint: str | None = None):
        """Train to the last step. A checkpoint of the last step is only loaded: the Trainer would train one step more."""
        if resume_from_checkpoint and checkpoint_step(Path(resume_from_checkpoint)) >= self.args.max_steps:
            self._load_from_checkpoint(resume_from_checkpoint)
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        flat = isinstance(self.data_collator, DataCollatorWithFlattening)
        loss = self._flat_answer_loss() if flat else likelihood.completion_loss(self.model, self.eval_dataset)
        logs = {"eval_loss": loss}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    @torch.no_grad()
    def _flat_answer_loss(self) -> float:
        """`likelihood.completion_loss` through the fast forward pass, which takes flattened batches."""
        self.model.eval()
        total, tokens, rows = 0.0, 0, self.args.per_device_train_batch_size
        for start in range(0, len(self.eval_dataset), rows):
            examples = [self.eval_dataset[row] for row in range(start, min(start + rows, len(self.eval_dataset)))]
            batch = self.data_collator(examples)
            answer_tokens = int((batch["labels"] != IGNORE_INDEX).sum())
            with self.compute_loss_context_manager():
                total += float(self.model(**self._prepare_inputs(batch)).loss) * answer_tokens
            tokens += answer_tokens
        return total / tokens

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the Trainer would walk through all modules at every step to count the parameters anew."""
        return 0

    def create_optimizer(self, *args, **kwargs):
        """AdamW; with `loraplus_lr_ratio` LoRA's B learns that many times faster than A (LoRA+, Hayou et al. 2024)."""
        if self.optimizer is None and self.loraplus_lr_ratio:
            from peft.optimizers import create_loraplus_optimizer

            self.optimizer = create_loraplus_optimizer(self.model, torch.optim.AdamW, lr=self.args.learning_rate,
                                                       loraplus_lr_ratio=self.loraplus_lr_ratio, weight_decay=self.args.weight_decay)
        return super().create_optimizer(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        tokens = sum(int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel() for batch in batches)
        if self.args.world_size > 1:
            tokens = int(self.accelerator.gather(torch.tensor(tokens, device=self.args.device)).sum())
        self.state.num_input_tokens_seen += tokens
        return batches, items

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log({**logs, "tokens": self.state.num_input_tokens_seen}, *args, **kwargs)


def fit(model, experiment: Experiment, train, validation, collator, session: CheckpointSession, plan) -> Trainer:
    """Run the Trainer to the last step, from the newest valid checkpoint if there is one.

    Out of GPU memory halves the micro-batch and goes on from the newest checkpoint; the effective batch stays.

    Raises:
        RuntimeError: out of GPU memory with several processes, which cannot all halve at the same step.
    """
    start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    while True:
        trainer = AnswerTrainer(model, training_arguments(experiment, session.local_dir, plan), train_dataset=train,
                                eval_dataset=validation, data_collator=plan.collator(collator), callbacks=[session, ProgressBar()])
        trainer.remove_callback(PrinterCallback)
        trainer.loraplus_lr_ratio = experiment.loraplus_lr_ratio
        try:
            trainer.state.num_input_tokens_seen = 0
            trainer.train(resume_from_checkpoint=session.resume_from())
            return trainer
        except torch.OutOfMemoryError as error:
            if trainer.args.world_size > 1:  # the others have not run out: they would wait for this process for ever
                raise RuntimeError(f"Out of GPU memory on process {trainer.args.process_index} of {trainer.args.world_size} with "
                                   f"{plan.per_device_train_batch_size} rows at a time. See with nvidia-smi what else is on that GPU, and start again: the "
                                   "run goes on from its newest checkpoint and plans the rows anew from the free memory.") from error
        # dealt with here, since up there the traceback still holds what did not fit
        plan = plan.halved()
        print(f"Out of GPU memory. {plan.why}; a step still has {experiment.total_batch_size} rows.")
        del trainer
        for name, value in model.named_parameters():
            if name in start:
                value.data.copy_(start[name])
                value.grad = None
        planning.prepare_model(model, plan.path)  # frees the graphs of the larger micro-batch
        gc.collect()
        torch.cuda.empty_cache()


def training_arguments(experiment: Experiment, output_dir: Path, plan) -> TrainingArguments:
    """The experiment in the Trainer's words. What is not named here is the Trainer's default (AdamW, gradient norm clipped to 1)."""
    on_gpu = torch.cuda.is_available()
    options = {"dataloader_pin_memory": on_gpu, **plan.trainer_arguments()}
    return TrainingArguments(
        str(output_dir), max_steps=experiment.max_steps, learning_rate=experiment.learning_rate, seed=experiment.seed,
        lr_scheduler_type=experiment.lr_scheduler_type, warmup_steps=math.ceil(experiment.warmup_ratio * experiment.max_steps),
        weight_decay=experiment.weight_decay, logging_steps=experiment.logging_steps, logging_first_step=True, save_steps=experiment.save_steps, save_total_limit=None,
        eval_strategy="steps", eval_steps=experiment.save_steps, report_to=[], disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
        use_cpu=not on_gpu, ddp_find_unused_parameters=False, **options)


def loss_history(log: list[dict]) -> pd.DataFrame:
    """The Trainer's log as rows of step, split, loss, learning_rate, tokens (trained on so far)."""
    rows = []
    for entry in log:
        for key, split in (("loss", "train"), ("eval_loss", "validation")):
            if key in entry:
                rows.append({"step": entry["step"], "split": split, "loss": entry[key], "learning_rate": entry.get("learning_rate"),
                             "tokens": entry.get("tokens")})
    return pd.DataFrame(rows, columns=["step", "split", "loss", "learning_rate", "tokens"])
