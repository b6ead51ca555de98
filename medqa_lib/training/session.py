"""What a run does with its checkpoints while it trains: lock, resume, save, copy, prune, stop on SIGTERM, and clear disk errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Self

import torch
from transformers import TrainerCallback

from medqa_lib.training.checkpoints import (
    MANIFEST,
    CheckpointError,
    checkpoint_step,
    checkpoint_train_time,
    copy_checkpoint,
    latest_valid,
    list_checkpoints,
    prune_checkpoints,
    verify,
    write_manifest,
)
from medqa_lib.training.lock import RunLock

DISK_ERRORS = ("No space left", "PytorchStreamWriter", "inline_container", "File too large", "Read-only file system", "Permission denied",
               "I/O error", "quota")


class CheckpointSession(TrainerCallback):
    """Everything between one `Trainer` and its checkpoints; also the Trainer's callback.

    Example:
        >>> with CheckpointSession(local_dir, lasting_dir, identity) as session:              # doctest: +SKIP
        ...     trainer = Trainer(args=TrainingArguments(session.local_dir, ...), callbacks=[session], ...)
        ...     trainer.train(resume_from_checkpoint=session.resume_from())

    Args:
        local_dir: where the Trainer saves; `lasting_dir` itself when there is no faster disk, and then nothing is copied.
        identity: what must be equal for a resume (experiment, data hash, label policy, model), as JSON.
        keep: checkpoints kept in each folder.
    """

    def __init__(self, local_dir: Path, lasting_dir: Path, identity: dict, keep: int = 2) -> None:
        self.local_dir, self.lasting_dir = Path(local_dir), Path(lasting_dir)
        self.identity, self.keep = identity, keep
        self.is_main = int(os.environ.get("RANK", "0")) == 0  # under `accelerate launch` only the first process writes
        self.missing: str | None = None  # name of a checkpoint that the lasting folder lacks
        self.saving = self.training = self.stop_asked = False
        self.train_start = time.perf_counter()  # `resume_from` sets it anew

    def __enter__(self) -> Self:
        """Create the folders and take the lock.

        Raises:
            RunBusy: another process works on this run.
            CheckpointError: the folders cannot be written or locked.
        """
        if not self.is_main:
            return self
        try:
            self.local_dir.mkdir(parents=True, exist_ok=True)
            self.lasting_dir.mkdir(parents=True, exist_ok=True)
            self.lock = RunLock(self.local_dir, self.lasting_dir)
            self.lock.acquire()
        except OSError as error:
            raise CheckpointError(f"Cannot write checkpoints to {self.lasting_dir} ({error}). Is Drive mounted and not full?") from error
        if threading.current_thread() is threading.main_thread() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            self.old_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self.is_main:
            return
        if hasattr(self, "old_handler"):
            signal.signal(signal.SIGTERM, self.old_handler)
        if self.missing and kind is None:
            self._copy_to_lasting(self.local_dir / self.missing)
        if self.missing:
            print(f"NOT SAFE YET: {self.lasting_dir} lacks {self.missing}. "
                  f"It is in {self.local_dir}: copy it before this machine goes away.")
        self.lock.release()
        if self.missing and isinstance(error, OSError):
            raise CheckpointError(f"{self.lasting_dir} cannot be written ({error}). {self.missing} is whole in {self.local_dir}: "
                                  "make Drive writable again and start again; only what came after it is repeated.") from error
        if self.saving and error is not None and any(text in str(error) for text in DISK_ERRORS):
            raise CheckpointError(f"Saving a checkpoint to {self.local_dir} failed ({error}). Earlier checkpoints are whole: "
                                  "make room there and start again to resume from the newest one.") from error

    def check_space(self, checkpoint_bytes: int) -> None:
        """Refuse to start a run whose checkpoints will not fit. At the next save `keep` + 1 lie there: those of an earlier start count.

        Raises:
            CheckpointError: a folder has less room than the checkpoints still to come need, and the last one is not saved yet.
            ResumeRefused: the same, and the newest checkpoint belongs to another configuration.
        """
        for folder in {self.local_dir, self.lasting_dir} if self.is_main else ():
            there = sum((checkpoint / MANIFEST).exists() for checkpoint in list_checkpoints(folder))
            needed = max(1, self.keep + 1 - there) * checkpoint_bytes
            free = shutil.disk_usage(folder).free
            if free < needed and not self._is_trained():
                raise CheckpointError(f"Too little disk: {folder} has {free / 2**20:,.0f} MiB free, the checkpoints still to come need "
                                      f"{needed / 2**20:,.0f} MiB. Make room or set MEDQA_HOME to a folder on a larger disk.")

    def _is_trained(self) -> bool:
        """Whether the last step is saved, so that no more checkpoints come."""
        for folder in (self.local_dir, self.lasting_dir):
            newest, _ = latest_valid(folder, self.identity)
            state = json.loads((newest / "trainer_state.json").read_text()) if newest else {}
            if newest and checkpoint_step(newest) >= state.get("max_steps", float("inf")):
                return True
        return False

    def require_lasting(self) -> None:
        """Refuse to write results where Drive was: that would make a local folder that looks like it.

        Raises:
            CheckpointError: the lasting folder is gone.
        """
        if self.is_main and not self.lasting_dir.is_dir():
            raise CheckpointError(f"{self.lasting_dir} is gone. Training is finished, its last checkpoint is in {self.local_dir}: mount "
                                  "Drive again and start again; only the evaluation is left to do.")

    def resume_from(self) -> str | None:
        """The newest valid checkpoint of both folders, for `Trainer.train(resume_from_checkpoint=...)`; None: start afresh.

        `train_time_s` counts from here.

        Raises:
            ResumeRefused: it belongs to another configuration.
        """
        found = []
        for folder in dict.fromkeys((self.local_dir, self.lasting_dir)):
            checkpoint, skipped = latest_valid(folder, self.identity)
            found += [checkpoint] if checkpoint else []
            for reason in skipped if self.is_main else ():
                print(f"Skipped {folder / reason}")
        best = max(found, key=checkpoint_step, default=None)
        if best and self.is_main:
            print(f"Resuming from {best}")
            if best.parent != self.lasting_dir and verify(self.lasting_dir / best.name):
                self._copy_to_lasting(best)
        self.train_start = time.perf_counter() - (checkpoint_train_time(best) if best else 0)
        return str(best) if best else None

    @property
    def train_time_s(self) -> float:
        """Seconds of training behind the run's present state, those of earlier processes up to the checkpoint that was resumed included.

        What came after a checkpoint and was lost, to a kill or to GPU memory that ran out, is not counted.
        """
        return time.perf_counter() - self.train_start

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.training = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """The last checkpoint is saved: from here on SIGTERM stops at once, and so does one that came after that save."""
        self.training = False
        if self.stop_asked:
            print("Stopped by SIGTERM after the last step was saved; start again: only the evaluation is left to do.")
            raise SystemExit(128 + signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop_asked:
            control.should_save = True
        self.saving = control.should_save
        return control

    def on_save(self, args, state, control, **kwargs) -> None:
        """The Trainer has saved checkpoint-N: make it valid, copy it, prune older ones; then stop if SIGTERM came."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process saves its own random state
        if not self.is_main:
            return
        checkpoint = self.local_dir / f"checkpoint-{state.global_step}"
        write_manifest(checkpoint, self.identity, self.train_time_s)
        if self.lasting_dir != self.local_dir:
            self._copy_to_lasting(checkpoint)
        prune_checkpoints(self.local_dir, self.keep)
        self.saving = False
        if self.stop_asked:
            print(f"Stopped by SIGTERM after saving {checkpoint}; start again to resume.")
            raise SystemExit(128 + signal.SIGTERM)

    def _copy_to_lasting(self, checkpoint: Path) -> None:
        try:
            copy_checkpoint(checkpoint, self.lasting_dir)
        except OSError as error:
            self.missing = checkpoint.name
            print(f"WARNING: {checkpoint.name} is not on {self.lasting_dir} ({error}). Training goes on; the next save tries again.")
            return
        self.missing = None
        try:
            prune_checkpoints(self.lasting_dir, self.keep)
        except OSError as error:
            print(f"WARNING: older checkpoints on {self.lasting_dir} cannot be deleted ({error}). {checkpoint.name} is there; "
                  "the next save tries again.")

    def _on_sigterm(self, signum, frame) -> None:
        if not self.training:
            raise SystemExit(128 + signum)
        self.stop_asked = True  # on_step_end saves and on_save stops; after the last save on_train_end does
