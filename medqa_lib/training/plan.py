"""How a training step is computed: which path, which precision, how many rows at a time. The recipe stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medqa_lib.model import compute_dtype, is_sharded

try:
    from medqa_lib.fast import paths as fast
except ModuleNotFoundError:  # the folder was deleted: everything takes the padded path
    fast = None

PATHS = ("padded", "padding_free", "fast")  # slowest first
PROBE_TOKENS = 1024


@dataclass(frozen=True)
class TrainingPlan:
    """What `plan_training` chose. Batch size * accumulation steps * processes is the experiment's."""

    path: str  # "padded": transformers as it is; "padding_free": its layers, rows end to end; "fast"
    dtype: torch.dtype
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    why: str  # the choice and its reason in one line

    def halved(self) -> TrainingPlan:
        """The plan after running out of memory: at most half as many rows at a time, as many in a step."""
        tried = self.per_device_train_batch_size
        if tried == 1:
            raise ValueError("Out of memory with one row at a time: shorten max_length or take a larger GPU.")
        rows = tried * self.gradient_accumulation_steps
        size = largest_divisor(rows, tried // 2)
        why = f"{self.path}, {size} rows x {rows // size}: {tried} did not fit"
        return TrainingPlan(self.path, self.dtype, size, rows // size, why)

    def collator(self, padding_collator):
        """The collator of this path; the padded one is the caller's."""
        if self.path == "padded":
            return padding_collator
        from transformers import DataCollatorWithFlattening

        return DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def plan_training(model, total_batch_size: int = 32, max_length: int = 512, *, path: str | None = None,
                  processes: int = 1, examples=None) -> TrainingPlan:
    """Choose from the GPU and the model, and leave the PEFT `model` ready for the chosen path.

    `examples`: the encoded rows; there are never more at a time, and on the first four of them a fast path
    must show that it computes what transformers does. Each of the `processes` that train together calls this;
    the one with the least memory decides for all.
    """
    if total_batch_size % processes:
        divisors = [n for n in range(1, total_batch_size + 1) if total_batch_size % n == 0]
        raise ValueError(f"{total_batch_size} rows cannot be shared by {processes} processes: use {divisors}")
    rows, device = total_batch_size // processes, next(model.parameters()).device
    first = [examples[row] for row in range(min(4, len(examples)))] if examples else None
    path, reason = _choose_path(model, path, processes, first)
    prepare_model(model, path)
    fits, why = (4, f"sharded over {processes} GPUs") if is_sharded() else (8, "no GPU")
    if device.type == "cuda":
        token_bytes = measure_bytes_per_token(model, path)
        torch.cuda.empty_cache()
        free_bytes = torch.cuda.mem_get_info(device)[0]
        fits = max(1, int(0.8 * free_bytes / (token_bytes * max_length)))
        why = (f"{torch.cuda.get_device_name(device)}, {free_bytes / 2**30:.1f} GiB free, "
               f"{token_bytes / 2**20:.2f} MiB per token, so {fits} rows of {max_length} tokens fit")
    size = _smallest_of_all(largest_divisor(rows, min(fits, len(examples or range(fits)))), processes)
    why = f"{path}, {size} rows x {rows // size}: {why}" + (f"; {reason}" if reason else "")
    return TrainingPlan(path, compute_dtype(), size, rows // size, why)


def _choose_path(model, wanted: str | None, processes: int, examples) -> tuple[str, str]:
    path, reason = "padded", "" if fast else "medqa_lib/fast is missing"
    if fast and wanted != "padded" and next(model.parameters()).device.type == "cuda":
        path, reason = fast.choose_path(model, wanted, examples)
    if wanted not in (None, path):
        raise ValueError(f"Path {wanted!r} is not available here: {reason or 'no GPU'}. Use 'padded'.")
    return PATHS[_smallest_of_all(PATHS.index(path), processes)], reason


def prepare_model(model, path: str) -> None:
    """Let `model` take the batches of the path's collator; other calls (generation, padded batches) stay."""
    if fast:
        fast.prepare(model, path)


def largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _smallest_of_all(number: int, processes: int) -> int:
    """The smallest of the processes' numbers: unequal micro-batches would be unequal shares of a step."""
    if processes == 1:
        return number
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())  # joins the process group; the Trainer takes it over
    return min(gather_object([number]))


def measure_bytes_per_token(model, path: str) -> float:
    """Peak memory of one forward and backward pass per token. Draws no random number that training would."""
    ids = torch.ones(PROBE_TOKENS // 256, 256, dtype=torch.long)  # few models read no 256 tokens at once
    plan = TrainingPlan(path, compute_dtype(), len(ids), 1, "to measure")
    examples = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    batch = plan.collator(lambda rows: {"input_ids": ids, "labels": ids})(examples)
    device, training = next(model.parameters()).device, model.training
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    with torch.random.fork_rng(devices=[device]):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast("cuda", plan.dtype):
            loss = model.train()(**batch).loss
        loss.backward()
    model.zero_grad(set_to_none=True)
    model.train(training)
    return (torch.cuda.max_memory_allocated(device) - before) / PROBE_TOKENS
