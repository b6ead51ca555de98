"""Checkpoint folders: made valid by a manifest, verified, copied to the lasting folder, pruned.

A folder `checkpoint-N` counts only with its `manifest.json`, which is written last and atomically: SHA-256 of
each file, the run's identity and its training time. SHA-256 after a flush shows that Drive's client took the
bytes, not that they are uploaded.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from medqa_lib.config import scratch_dir
from medqa_lib.evaluation.results import identity_differences, write_json_atomically

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what to do."""


class ResumeRefused(CheckpointError):
    """The checkpoint belongs to another configuration, data set or label policy."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST and path.suffix != ".tmp"]


def write_manifest(folder: Path, identity: dict, train_time_s: float = 0.0) -> None:
    """Make `folder` a checkpoint: flush and hash every file, then write the manifest."""
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    files = {}
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = hash_file(path)
    manifest = {"identity": identity, "files": files, "train_time_s": train_time_s}
    write_json_atomically(folder / MANIFEST, manifest)


def read_manifest(checkpoint: Path) -> dict:
    """What `write_manifest` has written."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def verify(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; "" means that it is whole."""
    try:
        for name, sha256 in read_manifest(checkpoint)["files"].items():
            if hash_file(checkpoint / name) != sha256:
                return f"{name} does not match its SHA-256"
        return ""
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"not complete, or damaged ({error})"


def copy_checkpoint(source: Path, lasting_dir: Path) -> Path:
    """Copy a checkpoint file by file and flush, the manifest last; then read it back.

    Raises:
        OSError: the lasting folder is gone, full or read-only, or it gives other bytes back.
    """
    manifest, target = read_manifest(source), lasting_dir / source.name
    target.mkdir(exist_ok=True)  # no parents: a Drive that vanished must not come back as a local folder
    (target / MANIFEST).unlink(missing_ok=True)
    for path in _files(source):  # not what the manifest names: that could be a file anywhere
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        with open(path, "rb") as reader, open(copy, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fsync(writer.fileno())
    write_json_atomically(target / MANIFEST, manifest)
    if problem := verify(target):
        raise OSError(f"{target} reads back differently: {problem}")
    return target


def checkpoint_folders(home: Path, *parts: str) -> tuple[Path, Path]:
    """(local, lasting) folder of a run, absolute. They differ in Colab with Drive: `config.scratch_dir`."""
    home = Path(home).expanduser().resolve()
    return scratch_dir(home).joinpath("checkpoints", *parts), home.joinpath("checkpoints", *parts)


def checkpoint_step(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named checkpoint-N, newest (largest N) first, valid or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def latest_valid(folder: Path, identity: dict) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and why each newer one was skipped.

    Raises:
        ResumeRefused: that checkpoint belongs to another identity; the message lists the differences.
    """
    skipped = []
    for checkpoint in list_checkpoints(folder):
        if problem := verify(checkpoint):
            skipped.append(f"{checkpoint.name}: {problem}")
            continue
        if differences := identity_differences(read_manifest(checkpoint)["identity"], identity):
            raise ResumeRefused(f"{checkpoint} belongs to another run:\n  " + "\n  ".join(differences) +
                                f"\nTo start afresh, delete or rename {folder}.")
        return checkpoint, skipped
    return None, skipped


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all that is older than the newest whole checkpoint, but keep the newest `keep` whole ones."""
    whole = [path for path in list_checkpoints(folder) if not verify(path)][:keep]
    for old in list_checkpoints(folder):
        if whole and old not in whole and checkpoint_step(old) < checkpoint_step(whole[0]):
            for path in (old / MANIFEST, *_files(old)):
                if path.is_file() and not path.is_symlink():
                    os.truncate(path, 0)  # Drive's trash keeps files for 30 days and counts their size
            shutil.rmtree(old)
