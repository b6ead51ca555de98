"""Both sources merged into pairs, and the splits that are kept with a manifest."""

import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from datasets import DatasetDict, disable_progress_bars, load_from_disk

from medqa_lib.config import home_dir
from medqa_lib.data.cleaning import Row, clean_rows
from medqa_lib.data.own import pairs_from
from medqa_lib.data.sources import REQUIRED, check_source, load_sources
from medqa_lib.data.splits import hash_splits, make_pairs, split_pairs
from medqa_lib.data.texts import text_cell

# Raise it with every change that alters pairs, groups or splits: kept ones of another version are made anew.
CLEANING_VERSION = 5


def merge_sources(sources: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Cleaned question-answer pairs of the sources, in the order of their rows.

    Returns:
        columns question, answer, source ("medquad" or "afrimedqa"), group (id of the leakage group), choices
        (JSON of a multiple-choice question's options and correct one, or ""), focus_area (MedQuAD's disease).
        `.attrs["funnel"]`: per cleaning step a dict of step, rows, removed, changed; kept + removed = raw.
    """
    if list(sources) == ["own"]:
        return pairs_from(sources["own"])
    if unknown := sources.keys() - REQUIRED.keys():
        raise ValueError(f"There is no source {', '.join(unknown)}; expected {' and '.join(REQUIRED)}. "
                         "For your own data use pairs_from.")
    rows = []
    for name, frame in sources.items():
        raw = check_source(frame, name)[list(REQUIRED[name])].rename(columns=REQUIRED[name])
        rows += [Row(source=name, **cells) for cells in raw.to_dict("records")]
    choices = sum(row.kind == "mcq" for row in rows)
    rows, funnel = clean_rows(rows)
    unread = next(step["removed"] for step in funnel if step["step"] == "options and key")
    if unread > max(4, choices / 2):
        raise ValueError(f"{unread} of {choices} multiple-choice rows cannot be read; expected answer_options"
                         ' such as {"option1": "Liver", "option2": "Spleen"} and as correct_answer option2.')
    if not rows:
        raise ValueError(f"No pair is left of {funnel[0]['rows']} raw rows; the funnel is {funnel}.")
    return make_pairs(rows, funnel)


def save_splits(splits: DatasetDict, folder: str | Path, about: dict | None = None) -> Path:
    """Write the splits as Arrow with a manifest: rows and SHA-256 of each split, versions, `about`.

    Written beside under a name of this machine and process, then moved into place: an interrupted run leaves
    the old folder or none, and two runtimes on one Drive do not meet.
    """
    disable_progress_bars()
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial-{platform.node()}-{os.getpid()}")
    splits.save_to_disk(partial)
    versions = {name: version(name) for name in ("pandas", "datasets", "pyarrow")}
    manifest = {"rows": splits.num_rows, "sha256": hash_splits(splits),
                "versions": {"python": platform.python_version(), **versions}, **(about or {})}
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (partial / "manifest.json").write_text(text, encoding="utf-8")
    try:
        return partial.rename(folder)
    except OSError:  # something is there: other or damaged splits, or these, from a faster process
        try:
            is_same = hash_splits(load_splits(folder)) == manifest["sha256"]
        except ValueError:
            is_same = False
        shutil.rmtree(partial if is_same else folder)
        return folder if is_same else partial.rename(folder)


def load_splits(folder: str | Path) -> DatasetDict:
    """Saved splits; a ValueError if the folder is incomplete or no longer has the hashes of its manifest."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There are no saved splits in {folder}; make them with prepare_splits().")
    try:
        expected = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        splits = load_from_disk(str(folder))
        if (found := hash_splits(splits)) != expected:
            raise ValueError(f"SHA-256 {found}, expected {expected}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The splits in {folder} are damaged ({type(error).__name__}: {error}).") from error
    return splits


def hash_sources(sources: dict[str, pd.DataFrame]) -> str:
    """Hex digest of the raw rows and of CLEANING_VERSION: the name of the folder in which splits are kept."""
    digest = hashlib.sha256(f"cleaning {CLEANING_VERSION}".encode())
    for name, frame in sources.items():
        for row in frame[list(REQUIRED.get(name, frame))].itertuples(index=False):
            digest.update(json.dumps([name, *map(text_cell, row)]).encode())
    return digest.hexdigest()


def prepare_splits(by: str = "group", home: str | Path | None = None) -> DatasetDict:
    """The splits of this profile's data, from `home`/data if they are there undamaged, else made and kept."""
    sources = load_sources()
    digest = hash_sources(sources)
    folder = Path(home or home_dir()) / "data" / digest[:16] / by
    if folder.is_dir():
        try:
            return load_splits(folder)
        except ValueError as error:
            print(f"{error} Making them again.")
    if others := sorted({str(path.parents[1]) for path in folder.parents[1].glob(f"*/{by}/manifest.json")}):
        print(f"Making splits anew in {folder}, for other data or cleaning rules. Earlier ones stay in "
              f"{', '.join(others)}.")
    pairs = merge_sources(sources)
    origins = {name: {"origin": frame.attrs["origin"], "rows": len(frame)} for name, frame in sources.items()}
    about = {"by": by, "seed": 42, "sources": origins, "source_sha256": digest, **pairs.attrs}
    return load_splits(save_splits(split_pairs(pairs, by=by), folder, about))
