"""One process per run on one machine. Between machines on one Drive the newest wins: `training.session`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from medqa_lib.config import Profile, scratch_dir

DYING_S = 2  # a process that was just killed may hold its lock so long


class RunBusy(RuntimeError):
    """Another process works on this run."""


@contextmanager
def lock_run(name: str, profile: Profile, home: Path) -> Iterator[None]:
    """Work on a run alone. The operating system frees the lock when its process ends, however it ends.

    Raises:
        RunBusy: another process of this machine works on it.
    """
    path = scratch_dir(home) / "locks" / profile.model_slug / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"  # of several processes the first holds it for all
    try:
        lock = FileLock(path).acquire(timeout=DYING_S) if first else nullcontext()
    except Timeout:
        raise RunBusy(f"Another process works on {name} in {home}. Wait for it to end, or stop it.") from None
    with lock:
        yield
