"""Checkpoint folders: made valid by a manifest, verified, copied to the lasting folder, pruned.

A folder `checkpoint-N` counts only with its `manifest.json`, which is written last and atomically: size and
SHA-256 of each file, the run's identity and its training time. SHA-256 after a flush shows that Drive's
client took the bytes, not that they are uploaded.
"""

from __future__ import annotations

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
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path.name != MANIFEST and not path.name.startswith("."))


def write_manifest(folder: Path, identity: dict, train_time_s: float = 0.0) -> None:
    """Make `folder` a checkpoint: flush and hash every file, then write the manifest."""
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    files = {}
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest = {"identity": identity, "files": files, "train_time_s": train_time_s}
    write_json_atomically(folder / MANIFEST, manifest)


def read_manifest(checkpoint: Path) -> dict:
    """What `write_manifest` has written."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint; an empty list means that it is whole."""
    try:
        problems = []
        for name, expected in read_manifest(checkpoint)["files"].items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()):  # a copy could overwrite any file
                problems.append(f"{name} is outside of the checkpoint")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != expected["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}")
            elif hash_file(path) != expected["sha256"]:
                problems.append(f"{name} does not match its SHA-256")
        return problems
    except FileNotFoundError:
        return [f"no {MANIFEST}: the checkpoint is not complete"]
    except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError) as error:  # damaged JSON
        return [f"{MANIFEST} or a file cannot be read ({error})"]


def copy_checkpoint(source: Path, lasting_dir: Path) -> Path:
    """Copy a checkpoint file by file, flush and compare SHA-256 with the manifest, which goes last.

    Raises:
        OSError: the lasting folder is gone, full or read-only, or it gives other bytes back.
    """
    manifest, target = read_manifest(source), lasting_dir / source.name
    target.mkdir(exist_ok=True)  # no parents: a Drive that vanished must not come back as a local folder
    (target / MANIFEST).unlink(missing_ok=True)
    for name, expected in manifest["files"].items():
        (target / name).parent.mkdir(exist_ok=True)
        with open(source / name, "rb") as reader, open(target / name, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fsync(writer.fileno())
        if hash_file(target / name) != expected["sha256"]:
            raise OSError(f"{target / name} reads back differently from what was written")
    write_json_atomically(target / MANIFEST, manifest)
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
        if problems := verify(checkpoint):
            skipped.append(f"{checkpoint.name}: {'; '.join(problems)}")
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
