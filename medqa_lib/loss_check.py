"""What the loss compares with what, and a cross-entropy by hand to hold the trainer's loss against."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from medqa_lib.labels import IGNORE_INDEX

# What a batch may hold beside the model's inputs: labels, and which logits to compute for them.
NOT_FOR_FORWARD = ("labels", "shift_labels", "logits_to_keep", "num_items_in_batch")


def loss_targets(batch: dict, shifts_labels: bool = True) -> torch.Tensor:
    """(B, T) id that the loss compares each position's prediction with, IGNORE_INDEX where there is none.

    `labels` are shifted by the model, `shift_labels` are taken as they are; with `logits_to_keep` both belong to the kept
    positions. As in `transformers`, `loss_utils.ForCausalLMLoss` and `slice_logits_to_keep`.

    Raises:
        ValueError: no labels, or not one for each kept position.
    """
    shape, keep = batch["input_ids"].shape, batch.get("logits_to_keep", 0)
    positions = torch.arange(shape.numel(), device=batch["input_ids"].device).view(shape)
    if not torch.is_tensor(keep):
        positions = positions[:, -keep:]
    elif keep.ndim == 1:
        positions = positions[:, keep]
    else:
        positions = positions[keep] if keep.dtype == torch.bool else positions.take_along_dim(keep, 1)
    labels, targets = batch.get("labels"), batch.get("shift_labels")
    if labels is None:
        raise ValueError("The batch has no `labels`, so the model returns no loss. Pass `labels` beside `shift_labels` too.")
    if targets is None:
        targets = pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shifts_labels else labels
    if targets.numel() != positions.numel():
        raise ValueError(f"{targets.numel()} targets for {positions.numel()} predictions; with `logits_to_keep`, "
                         "`shift_labels` must hold the targets of just the kept positions.")
    grid = torch.full((shape.numel(),), IGNORE_INDEX, device=positions.device)
    grid[positions.reshape(-1)] = targets.reshape(-1)
    return grid.view(shape)


def to_device(batch: dict, device) -> dict:
    """The batch with its tensors on `device`."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def forward_logits(model, batch: dict) -> torch.Tensor:
    """(B, T, V) logits at every position, whatever the batch asks to keep."""
    inputs = {name: value for name, value in to_device(batch, model.device).items() if name not in NOT_FOR_FORWARD}
    return model(**inputs, use_cache=False).logits


def loss_tolerance(dtype: torch.dtype) -> float:
    """How far apart two computations of one loss may be: 1e-4 in float32, 1e-2 in 16 bits."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 1e-2


@torch.no_grad()
def check_loss(model, batches: list[dict], loss: float) -> float:
    """Hold the loss of one optimiser step against the cross-entropy computed by hand from the logits.

    By hand: token t + 1 of the unshifted `labels` against the log-softmax at position t, the mean over all supervised
    tokens of the step. Only `labels` are looked at, so a mistake in `shift_labels` or in the choice of logits shows.

    Args:
        model: in the state that `loss` was computed in, without dropout.
        batches: the micro-batches of the step, padded or flattened; `labels` are (B, T).
        loss: what the trainer or the model says.
    Returns:
        The difference.
    Raises:
        ValueError: it is above `loss_tolerance`; the message gives both losses.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        logits = forward_logits(model, batch)
        next_tokens = batch["labels"][:, 1:].to(logits.device)
        supervised = next_tokens != IGNORE_INDEX
        log_probabilities = logits[:, :-1][supervised].float().log_softmax(-1)  # (N, V)
        total -= float(log_probabilities.gather(-1, next_tokens[supervised][:, None]).sum())
        tokens += int(supervised.sum())
    by_hand = total / max(1, tokens)
    if not abs(loss - by_hand) <= loss_tolerance(logits.dtype):  # not: NaN must fail
        raise ValueError(f"The loss of a step is {loss:.5f}, but the cross-entropy over its {tokens} supervised tokens is {by_hand:.5f}. "
                         "Labels are shifted twice or not at all, or micro-batches are not weighted by their tokens.")
    return abs(loss - by_hand)


@torch.no_grad()
def check_trainer_loss(trainer) -> float:
    """`check_loss` of a Trainer's first step's worth of rows, through its own collator, token count and loss.

    Call it before `train()`. It takes the first rows of the training set and leaves the random state alone, so the data order stays.

    Returns:
        The difference between the trainer's loss and the one by hand.
    Raises:
        ValueError: it is too large.
    """
    args, model = trainer.args, trainer.model
    size = args.per_device_train_batch_size
    examples = [trainer.train_dataset[row] for row in range(min(size * args.gradient_accumulation_steps, len(trainer.train_dataset)))]
    batches = [to_device(trainer.data_collator(examples[i:i + size]), args.device) for i in range(0, len(examples), size)]
    training = model.training
    model.eval()
    batches, items = trainer.get_batch_samples(iter(batches), len(batches), args.device)
    with torch.random.fork_rng(devices=[]), trainer.compute_loss_context_manager():
        loss = sum(float(trainer.compute_loss(model, dict(batch), num_items_in_batch=items)) for batch in batches)
        difference = check_loss(model, batches, loss)
    model.train(training)
    return difference
