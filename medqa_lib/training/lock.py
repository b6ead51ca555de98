"""One process a run folder, on one machine and across machines that share a Drive."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from medqa_lib.training.checkpoints import CheckpointError, write_json_atomically

HEARTBEAT_S = 120
STALE_S = 600  # another machine's lock is dead when its heartbeat is older than this
RELEASE_S = 60  # so long a heartbeat in progress is waited for: a Drive that hangs must not keep the run from ending
DYING_S = 5  # so long a process that was just killed may need to give up its lock, while its memory is freed


class RunBusy(CheckpointError):
    """Another process works on this run folder."""


class RunLock:
    """One process a run folder, and no lock that a dead process holds for ever.

    On one machine a POSIX record lock on `local_dir/run.lock` decides: the kernel drops it when the process dies, however it dies.
    Drive has no locks that another machine sees, so there `lasting_dir/run.lock.json` tells host, pid and a heartbeat; after
    10 silent minutes that run counts as dead.
    """

    def __init__(self, local_dir: Path, lasting_dir: Path) -> None:
        self.path, self.shared = local_dir / "run.lock", lasting_dir / "run.lock.json"
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.released = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunBusy: another process holds it for more than DYING_S seconds; the message names it.
            CheckpointError: the file system has no locks.
            OSError: the lock file cannot be written.
        """
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
        start = time.monotonic()
        while not self._lock():
            if time.monotonic() - start > DYING_S:
                owner = os.read(self.descriptor, 1000).decode() or "its lock names no owner"
                os.close(self.descriptor)
                raise RunBusy(f"Another process works on {self.path.parent}: {owner}. Wait for it to end, or stop it.")
            time.sleep(0.1)
        self._refuse_other_machine()
        os.truncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps(self.owner).encode())
        self._beat()
        self.released.clear()
        self.beating = threading.Thread(target=self._beat_until_released, daemon=True)
        self.beating.start()

    def _lock(self) -> bool:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            os.close(self.descriptor)
            raise CheckpointError(f"{self.path} cannot be locked ({error}). Set MEDQA_SCRATCH to a folder on a local disk: checkpoints are "
                                  "saved there and then copied.") from error
        return True

    def _refuse_other_machine(self) -> None:
        try:
            other = json.loads(self.shared.read_text())
            silent_s = time.time() - other["beat"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if other.get("host") != self.owner["host"] and silent_s < STALE_S:
            os.close(self.descriptor)
            raise RunBusy(f"Process {other.get('pid')} on machine {other.get('host')} worked on {self.shared.parent} {silent_s:.0f} s ago. "
                          f"If that runtime is gone, wait {STALE_S - silent_s:.0f} s or delete {self.shared}.")

    def _beat(self) -> None:
        try:
            write_json_atomically(self.shared, {**self.owner, "beat": time.time()})
        except OSError:
            pass  # Drive is away: the copy of the next checkpoint says so

    def _beat_until_released(self) -> None:
        while not self.released.wait(HEARTBEAT_S):
            self._beat()

    def release(self) -> None:
        """Give the lock back. The lock file stays: deleting it would let two processes lock two files of one name."""
        self.released.set()
        self.beating.join(RELEASE_S)  # a beat in progress would write the file anew after it is gone
        try:
            self.shared.unlink(missing_ok=True)
        except OSError:
            pass
        os.close(self.descriptor)
