"""Verified checkpoints: saved on fast local disk, copied to the lasting folder (Drive in Colab), and only what verifies is resumed.

A folder `checkpoint-N` is a checkpoint only with a valid `manifest.json`: sizes and SHA-256 of its files, the run's identity and its
training time so far, written last and atomically. SHA-256 after a flush shows that Drive's client took the bytes, not that they were
uploaded yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from medqa_lib.evaluation.results import identity_differences, write_json_atomically

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what to do."""


class ResumeRefused(CheckpointError):
    """The checkpoint belongs to another configuration, data set or label policy."""


def checkpoint_folders(home: Path, *parts: str) -> tuple[Path, Path]:
    """(local, lasting) folder of a run, absolute. They differ only where MEDQA_SCRATCH names another one: in Colab, a fast local disk."""
    lasting = Path(home).expanduser().resolve()  # one folder must have one spelling: where the two differ, files are copied
    local = Path(os.environ.get("MEDQA_SCRATCH") or lasting).expanduser().resolve()
    return local.joinpath("checkpoints", *parts), lasting.joinpath("checkpoints", *parts)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST)


def write_manifest(folder: Path, identity: dict, train_time_s: float = 0.0) -> None:
    """Make `folder` a checkpoint: flush and hash every file, then write the manifest."""
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    files = {}
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest = {"identity": json.loads(json.dumps(identity)), "files": files, "train_time_s": train_time_s}
    write_json_atomically(folder / MANIFEST, {**manifest, "seal": _seal(manifest)})


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; an empty list means that it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.get("seal") != _seal(manifest):
            return [f"{MANIFEST} was altered"]
        problems = []
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):  # whoever wrote the manifest could have the copy overwrite any file
                problems.append(f"{name} is outside of the checkpoint")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != expected["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}")
            elif hash_file(path) != expected["sha256"]:
                problems.append(f"{name} does not match its SHA-256")
        return problems
    except FileNotFoundError:
        return [f"no {MANIFEST}: it was not written to its end"]
    except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError) as error:  # RuntimeError: links in a circle
        return [f"{MANIFEST} or a file cannot be read ({error})"]


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named checkpoint-N, newest (largest N) first, valid or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_train_time(checkpoint: Path) -> float:
    """Seconds of training behind a valid checkpoint; 0 for one of an earlier version of this project, which did not write them."""
    return json.loads((checkpoint / MANIFEST).read_text()).get("train_time_s", 0.0)


def latest_valid(folder: Path, identity: dict | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was skipped.

    Raises:
        ResumeRefused: that checkpoint belongs to another identity; the message lists the differences.
    """
    skipped = []
    for checkpoint in list_checkpoints(folder):
        problems = verify(checkpoint)
        if problems:
            skipped.append(f"{checkpoint.name}: {'; '.join(problems)}")
            continue
        saved = json.loads((checkpoint / MANIFEST).read_text())["identity"]
        differences = identity_differences(saved, identity) if identity is not None else []
        if differences:
            raise ResumeRefused(f"{checkpoint} belongs to another run:\n  " + "\n  ".join(differences) +
                                f"\nDelete or rename {folder} to start afresh, or restore the configuration to resume.")
        return checkpoint, skipped
    return None, skipped


def copy_checkpoint(source: Path, lasting_dir: Path) -> Path:
    """Copy a checkpoint file by file, flush, compare SHA-256 with the source's manifest; the manifest goes last.

    Nothing happens where `lasting_dir` is the source's own folder, by whatever name.

    Raises:
        OSError: the lasting folder is gone, full, read-only or gives other bytes back.
    """
    manifest = json.loads((source / MANIFEST).read_text())
    target = lasting_dir / source.name
    target.mkdir(exist_ok=True)  # no parents: a Drive that vanished must not come back as a local folder
    if target.samefile(source):
        return target
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


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Keep the newest `keep` valid checkpoints; delete older ones and older fragments, but none while no newer one verifies."""
    valid = [path for path in list_checkpoints(folder) if not verify(path)][:keep]
    for old in list_checkpoints(folder):
        if valid and old not in valid and checkpoint_step(old) < checkpoint_step(valid[0]):
            for path in [old / MANIFEST, *_files(old)]:
                if path.exists():
                    if not path.is_symlink():  # which could name any file
                        os.truncate(path, 0)  # Drive's trash keeps deleted files for 30 days and counts their size
                    path.unlink()
            shutil.rmtree(old)
