"""A run's checkpoints while it trains: resume, make them valid, copy them to Drive, stop on SIGTERM."""

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from accelerate import PartialState
from transformers import TrainerCallback

from medqa_lib.evaluation.results import write_json_atomically
from medqa_lib.training.checkpoints import (
    CheckpointError,
    checkpoint_step,
    copy_checkpoint,
    latest_valid,
    prune_checkpoints,
    read_manifest,
    verify,
    write_manifest,
)

OWNER = "owner.json"
KEEP = 2  # checkpoints in each folder


class RunBusy(RuntimeError):
    """Another process works on this run."""


@contextmanager
def explain_save_errors(folder: Path) -> Iterator[None]:
    """A full disk comes as OSError from Python, RuntimeError from torch and SafetensorError from safetensors.

    Raises:
        CheckpointError: instead of them; the message says what to do.
    """
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be written ({error}). Is Drive mounted and not full? Earlier "
                              "checkpoints are whole: start again to resume from the newest one.") from error


class CheckpointSession(TrainerCallback):
    """What a run does with its checkpoints, as the Trainer's callback; and the run's log.

    Two runtimes can share one Drive, and Drive has no locks. So the newest start owns the run: it writes its
    id into `owner.json`, and an older process stops at its next save, or before it writes results.

    Args:
        local_dir: where the Trainer saves. If it is `lasting_dir` itself, nothing is copied.
        identity: what must be equal for a resume; see `results.run_identity`.
    """

    def __init__(self, local_dir: Path, lasting_dir: Path, identity: dict) -> None:
        self.local_dir, self.lasting_dir, self.identity = local_dir, lasting_dir, identity
        self.is_main = int(os.environ.get("RANK", "0")) == 0  # of several processes only the first writes
        self.owner = uuid.uuid4().hex
        self.lines: list[str] = []  # the log
        self.missing: str | None = None  # name of a checkpoint that the lasting folder lacks
        self.old_handler, self.stop_asked = None, False
        self.train_start = time.perf_counter()  # `resume_from` sets it anew

    def say(self, line: str) -> None:
        """Print a line and keep it for log.txt."""
        if self.is_main:
            print(line)
            self.lines.append(line)

    def __enter__(self) -> Self:
        """Make the folders and take the run over."""
        if self.is_main:
            with explain_save_errors(self.lasting_dir):
                self.local_dir.mkdir(parents=True, exist_ok=True)
                self.lasting_dir.mkdir(parents=True, exist_ok=True)
                owner = {"owner": self.owner, "since": time.strftime("%F %T")}
                write_json_atomically(self.lasting_dir / OWNER, owner)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._forget_sigterm()
        if self.missing and kind is None:
            self._copy_to_lasting(self.local_dir / self.missing)
        if self.missing and not isinstance(error, RunBusy):
            print(f"NOT SAFE YET: {self.lasting_dir} lacks {self.missing}. It is in {self.local_dir}: "
                  "copy it before this machine goes away.")

    def require_owner(self) -> None:
        """Stop if a newer start has taken over. A Drive that is away says nothing, so training goes on.

        Raises:
            RunBusy: another process owns the run.
        """
        try:
            current = json.loads((self.lasting_dir / OWNER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if self.is_main and current["owner"] != self.owner:
            raise RunBusy(f"A newer start ({current['since']}) owns {self.lasting_dir} now; this one stops.")

    def require_lasting(self) -> None:
        """Before an adapter or results are written: this run still owns the folder, and the folder is there.

        Raises:
            CheckpointError: the lasting folder is gone; writing would make a local one that looks like it.
            RunBusy: another process owns the run.
        """
        if self.is_main and not self.lasting_dir.is_dir():
            raise CheckpointError(f"{self.lasting_dir} is gone. The last checkpoint is in {self.local_dir}: "
                                  "mount Drive and start again; only the evaluation is left to do.")
        self.require_owner()

    def resume_from(self) -> str | None:
        """The newest whole checkpoint of both folders, for `Trainer.train`; None: start afresh.

        Raises:
            ResumeRefused: it belongs to another configuration.
        """
        found = []
        for folder in dict.fromkeys((self.local_dir, self.lasting_dir)):
            checkpoint, skipped = latest_valid(folder, self.identity)
            found += [checkpoint] if checkpoint else []
            for reason in skipped:
                self.say(f"Skipped {folder / reason}")
        best = max(found, key=checkpoint_step, default=None)
        if best:
            self.say(f"Resuming from {best}")
            if self.is_main and verify(self.lasting_dir / best.name):
                self._copy_to_lasting(best)
        trained_s = read_manifest(best)["train_time_s"] if best else 0.0
        self.train_start = time.perf_counter() - trained_s
        return str(best) if best else None

    @property
    def train_time_s(self) -> float:
        """Seconds of training behind the present state, earlier processes included, lost steps left out."""
        return time.perf_counter() - self.train_start

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.world_size == 1 and self.old_handler is None:  # several would save at different steps
            self.old_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum, frame) -> None:
        self.stop_asked = True

    def _forget_sigterm(self) -> None:
        if self.old_handler is not None:
            signal.signal(signal.SIGTERM, self.old_handler)
        self.old_handler = None

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.stop_asked
        return control

    def on_save(self, args, state, control, **kwargs) -> None:
        """The Trainer has saved checkpoint-N: make it valid, copy it, prune; then stop if SIGTERM came."""
        PartialState().wait_for_everyone()  # each process saves its own random state
        if not self.is_main:
            return
        checkpoint = self.local_dir / f"checkpoint-{state.global_step}"
        with explain_save_errors(self.local_dir):
            write_manifest(checkpoint, self.identity, self.train_time_s)
        self._copy_to_lasting(checkpoint)
        prune_checkpoints(self.local_dir, KEEP)
        self._stop_if_asked(checkpoint.name)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """From here on SIGTERM ends the process at once; one that came after the last save does so now."""
        self._forget_sigterm()
        self._stop_if_asked("the last checkpoint")

    def _stop_if_asked(self, saved: str) -> None:
        if self.stop_asked:
            print(f"Stopped by SIGTERM; {saved} is saved. Start again to go on from it.")
            raise SystemExit(128 + signal.SIGTERM)

    def _copy_to_lasting(self, checkpoint: Path) -> None:
        if self.lasting_dir == self.local_dir:
            return
        self.missing = checkpoint.name
        try:
            copy_checkpoint(checkpoint, self.lasting_dir)
            self.missing = None
            prune_checkpoints(self.lasting_dir, KEEP)
        except OSError as error:
            what = f"{self.missing} is not on" if self.missing else "old checkpoints cannot be deleted from"
            self.say(f"WARNING: {what} {self.lasting_dir} ({error}). The next save tries again.")
