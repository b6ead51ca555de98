"""Both sources merged into pairs, and the splits that are kept with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from medqa_lib.config import home_dir
from medqa_lib.data.cleaning import Row, clean_rows
from medqa_lib.data.sources import REQUIRED, check_source, load_sources
from medqa_lib.data.splits import COLUMNS, hash_splits, link_groups, split_pairs
from medqa_lib.data.texts import text_cell

if TYPE_CHECKING:
    from datasets import DatasetDict

# Raise it with every change that alters pairs, groups or splits: kept splits of another version are left alone and made anew.
CLEANING_VERSION = 1

# --- merge -----------------------------------------------------------------------------------------------------------


def merge_sources(sources: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Cleaned question-answer pairs of both sources, in the order of their rows.

    Returns:
        columns question, answer, source ("medquad" or "afrimedqa"), group (id of the leakage group), choices (JSON of a
        multiple-choice question's options and right one, else ""), focus_area (MedQuAD's disease, else "").
        `.attrs["funnel"]`: one dict a cleaning step with step, rows, removed, changed; kept + removed = raw.
    Raises:
        ValueError: a needed column is missing, or no pair is left.
    """
    rows = []
    for name, frame in sources.items():
        if name not in REQUIRED:
            raise ValueError(f"There is no source {name!r}; expected {' and '.join(REQUIRED)}.")
        cells = zip(*(check_source(frame, name)[column].tolist() for column in REQUIRED[name]), strict=True)
        if name == "medquad":
            rows += [Row(question, answer, name, focus_area) for question, answer, focus_area in cells]
        else:
            rows += [Row(question, answer, name, "", kind, options, correct) for kind, question, options, correct, answer in cells]
    rows, funnel = clean_rows(rows)
    if not rows:
        raise ValueError(f"No pair is left of {funnel[0]['rows']} raw rows; the funnel is {funnel}.")
    pairs = pd.DataFrame({column: [getattr(row, column) for row in rows] for column in COLUMNS if column != "group"})
    pairs["group"] = link_groups(pairs)
    pairs = pairs[list(COLUMNS)]
    pairs.attrs["funnel"] = funnel
    return pairs


# --- keep ------------------------------------------------------------------------------------------------------------


def save_splits(splits: DatasetDict, folder: str | Path, about: dict | None = None) -> Path:
    """Write the splits as Arrow with a manifest: rows, SHA-256 of each split's content, versions, and `about`.

    Written beside and moved into place, so an interrupted run leaves the old folder or none.

    Raises:
        OSError: too little disk; the message gives both numbers.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * sum(split.data.nbytes for split in splits.values()), shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free / 1e6:.0f} MB left; the splits need {needed / 1e6:.0f} MB. Free some, or set MEDQA_HOME.")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    with hide_progress():
        splits.save_to_disk(partial)
    manifest = {"rows": {name: len(split) for name, split in splits.items()}, "sha256": hash_splits(splits),
                "versions": {"python": platform.python_version(), **{name: version(name) for name in ("pandas", "datasets", "pyarrow")}},
                **(about or {})}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    try:
        return partial.rename(folder)
    except OSError:  # something is there
        if _holds(folder, manifest["sha256"]):  # another process of the same run was faster, and may be reading it
            shutil.rmtree(partial)
            return folder
        shutil.rmtree(folder)
        return partial.rename(folder)


def _holds(folder: Path, hashes: dict[str, str]) -> bool:
    try:
        return hash_splits(load_splits(folder)) == hashes
    except (FileNotFoundError, ValueError):
        return False


@contextmanager
def hide_progress() -> Iterator[None]:
    """Keep the three bars of `datasets`, a second in all, out of a notebook's output."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            enable_progress_bars()


def load_splits(folder: str | Path) -> DatasetDict:
    """Saved splits, if their content still has the hashes of their manifest.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is incomplete or damaged.
    """
    from datasets import load_from_disk

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There are no saved splits in {folder}; make them with prepare_splits().")
    try:
        expected = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        splits = load_from_disk(str(folder))
        found = hash_splits(splits)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The splits in {folder} are damaged ({type(error).__name__}: {error}).") from error
    if found != expected:
        raise ValueError(f"The splits in {folder} are damaged: SHA-256 {found}, expected {expected}.")
    return splits


def hash_sources(sources: dict[str, pd.DataFrame]) -> str:
    """Hex digest of the raw rows and of CLEANING_VERSION: it names the folder in which the splits are kept."""
    digest = hashlib.sha256(f"cleaning {CLEANING_VERSION}".encode())
    for name, frame in sources.items():
        for row in zip(*(frame[column].tolist() for column in REQUIRED[name]), strict=True):
            digest.update(json.dumps([name, *map(text_cell, row)]).encode())
    return digest.hexdigest()


def prepare_splits(by: str = "group", home: str | Path | None = None) -> DatasetDict:
    """The splits of this profile's data, from `home`/data if they are kept there unharmed, else made and kept."""
    sources = load_sources()
    digest = hash_sources(sources)
    folder = Path(home or home_dir()) / "data" / digest[:16] / by
    try:
        return load_splits(folder)
    except FileNotFoundError:
        pass
    except ValueError as error:
        print(f"{error} Making them again.")
    pairs = merge_sources(sources)
    origins = {name: {"origin": frame.attrs.get("origin", ""), "rows": len(frame)} for name, frame in sources.items()}
    about = {"by": by, "seed": 42, "sources": origins, "source_sha256": digest, "funnel": pairs.attrs["funnel"]}
    return load_splits(save_splits(split_pairs(pairs, by=by), folder, about))
