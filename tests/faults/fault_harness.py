"""Starts training in processes that may be killed. A fork server imports torch and transformers once, so a run takes seconds."""

import contextlib
import dataclasses
import faulthandler
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

EXPERIMENT = "exp_004"
SAVE_EVERY = 2
STEPS = 16  # of the smoke profile with this divisor: long enough to be interrupted anywhere
STEP_DIVISOR = 25

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["fault_preload"])


class Training:
    """One process that runs `python -m medqa_lib.training exp_004` (smoke profile, 16 steps, saved every 2).

    Args:
        home: MEDQA_HOME. With scratch the Trainer saves there and copies to home, as in Colab with Drive.
        fault: a function of no arguments, run in the process before training starts.
    """

    def __init__(self, home, scratch=None, fault=None, environment=None):
        self.home, self.scratch = Path(home), Path(scratch) if scratch else None
        self.log = self.home.parent / f"{self.home.name}-{time.monotonic_ns()}.log"
        variables = {
            "MEDQA_PROFILE": "smoke",
            "MEDQA_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self.process = _context.Process(target=_train, args=(variables, self.scratch, str(self.log), fault))
        self.process.start()

    @property
    def output(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, timeout_s=300):
        """Exit code; -9 after SIGKILL. A process that takes longer writes where it is."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(1)
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output[-3000:]}")
        return self.process.exitcode

    def wait_for(self, text, timeout_s=300):
        """Return when the process has printed `text`; False if it ended without."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if text in self.output:
                return True
            if self.process.exitcode is not None:
                return text in self.output
            time.sleep(0.005)
        raise AssertionError(f"{text!r} did not come within {timeout_s} s:\n{self.output[-3000:]}")

    def kill(self, signal_number=signal.SIGKILL):
        """Send the signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.is_alive():
                os.kill(self.process.pid, signal_number)

    @property
    def adapter_hash(self):
        adapter = self.home / "adapters" / "smoke-llama" / EXPERIMENT / "adapter_model.safetensors"
        return hashlib.sha256(adapter.read_bytes()).hexdigest()

    @property
    def steps(self):
        """Numbers of the steps that this process finished."""
        return [int(step) for step in re.findall(r"^STEP (\d+)$", self.output, re.MULTILINE)]

    @property
    def resumed_from(self):
        """Step of the checkpoint that this process resumed from; 0 if it started afresh."""
        found = re.findall(r"Resuming from .*checkpoint-(\d+)", self.output)
        return int(found[-1]) if found else 0


def checkpoint_dir(root):
    return Path(root) / "checkpoints" / "smoke-llama" / EXPERIMENT


def run_to_end(home, **options):
    run = Training(home, **options)
    assert run.wait() == 0, run.output[-3000:]
    return run


def _train(variables, scratch, log, fault):
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    from medqa_lib import config
    from medqa_lib.evaluation import lock
    from medqa_lib.training import checkpoints
    from medqa_lib.training import run as training

    if scratch:
        checkpoints.scratch_dir = lock.scratch_dir = lambda home: scratch

    config.PROFILES["smoke"] = dataclasses.replace(config.PROFILES["smoke"], step_divisor=STEP_DIVISOR)
    if fault:
        fault()
    before(
        training.CheckpointSession,
        "on_step_end",
        lambda session, args, state, *_, **__: print(f"\nSTEP {state.global_step}"),
    )
    sys.argv = ["medqa_lib.training", EXPERIMENT]
    from medqa_lib.reasons import user_errors

    with user_errors():
        training.main()


def before(owner, name, action):
    """Make `owner.name` call `action` with its own arguments first."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)
