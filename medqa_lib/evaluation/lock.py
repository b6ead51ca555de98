"""One process at a time works on a run; its name is locked in the scratch folder of this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from medqa_lib.config import Profile, scratch_dir


@contextmanager
def lock_run(name: str, profile: Profile, home: Path) -> Iterator[None]:
    """Work on a run alone: wait while another process of this machine does, which may leave it finished.

    The operating system frees the lock when its process ends, however it ends.
    """
    path = scratch_dir(home) / "locks" / profile.model_slug / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first holds it for all
        try:
            lock.acquire(timeout=2)  # seconds: a process that was just killed may hold it so long
        except Timeout:
            print(f"Another process works on {name} in {home}. Waiting for it to end ...", flush=True)
            lock.acquire()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
        yield
    finally:
        lock.release()
