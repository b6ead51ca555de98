"""Raw rows of MedQuAD and AfriMed-QA: from Kaggle and the Hub, from a folder, or from the bundled sample.

Licences: MedQuAD CC BY 4.0, AfriMed-QA CC BY-NC-SA 4.0 (treat it as non-commercial). The sample is our own.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import datasets
import pandas as pd

from medqa_lib import config
from medqa_lib.reasons import hub_reason, try_again

MEDQUAD_KAGGLE = "pythonafroz/medquad-medical-question-answer-for-ai-research"
AFRIMEDQA_HUB = "intronhealth/afrimedqa_v2"  # gated
AFRIMEDQA_MIRROR = "afrimedqa/afrimedqa_v2"
HOW_TO_ACCEPT = (f"Accept the conditions on https://huggingface.co/datasets/{AFRIMEDQA_HUB} and log in with "
                 "a token of that account (notebook 01).")
SAMPLE_DIR = Path(__file__).parents[1] / "sample"
FILES = {"medquad": "medquad.csv", "afrimedqa": "afrimedqa_v2*.csv"}
# Source -> a needed column of the publisher -> the field of cleaning.Row that it fills.
REQUIRED = {"medquad": {name: name for name in ("question", "answer", "focus_area")},
            "afrimedqa": {"question_type": "kind", "question": "question", "answer_options": "options",
                          "correct_answer": "correct", "answer_rationale": "answer"}}


def load_sources(data_dir: str | Path | None = None) -> dict[str, pd.DataFrame]:
    """Raw rows per source with the publisher's columns; `frame.attrs["origin"]` says where from.

    From `data_dir` or `config.data_dir()` (one of the two files is enough), else in the profile `gpu` from
    Kaggle and the Hub, else from the bundled sample.

    Raises:
        FileNotFoundError: the folder holds neither file, or two of one source.
        ValueError: a file is empty, not UTF-8, no CSV, or lacks a needed column.
        RuntimeError: a download failed; the message says why and what to do.
    """
    folder = data_dir or config.data_dir()
    if not folder and config.current_profile().name == "gpu":
        return {"medquad": download_medquad(), "afrimedqa": download_afrimedqa()}
    folder, frames = Path(folder or SAMPLE_DIR).expanduser(), {}
    for name, pattern in FILES.items():
        found = [*folder.glob(pattern), *folder.glob(pattern + ".gz")]
        if len(found) > 1:
            raise FileNotFoundError(f"{folder} holds {len(found)} files {pattern}[.gz]; leave one of them.")
        if found:
            frames[name] = read_source(found[0], name)
    if not frames:
        raise FileNotFoundError(f"{folder} holds neither {' nor '.join(FILES.values())} (or .gz). Set "
                                "MEDQA_DATA_DIR to a folder with one or both, or unset it.")
    if len(frames) < len(FILES):
        print(f"{folder} holds one source, {', '.join(frames)}: it is used alone.")
    return frames


def read_csv(path: Path, separator: str = ",") -> pd.DataFrame:
    """A CSV file with every cell as text; a ValueError names the file and what is wrong with it."""
    try:
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, EOFError, OSError, zlib.error) as error:  # empty, not UTF-8, no CSV, cut
        raise ValueError(f"{path} cannot be read as CSV in UTF-8 ({str(error).strip()}).") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes surplus cells for row names
        raise ValueError(f"{path} cannot be read as CSV in UTF-8 (a row has more cells than the header).")
    return frame


def read_source(path: Path, name: str) -> pd.DataFrame:
    """A source's CSV file, checked."""
    frame = read_csv(path)
    frame.attrs["origin"] = "bundled sample" if path.parent == SAMPLE_DIR else path.name
    return check_source(frame, name)


def check_source(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame itself, if it has the needed columns and a row; else a ValueError says what it lacks."""
    origin = frame.attrs.get("origin", name)
    if missing := [column for column in REQUIRED[name] if column not in frame.columns]:
        raise ValueError(f"{origin}: no column {', '.join(missing)}; expected {', '.join(REQUIRED[name])}. "
                         f"It has {', '.join(map(str, frame.columns[:20])) or 'none'}.")
    if frame.empty:
        raise ValueError(f"{origin}: no row below the header.")
    return frame


def download_medquad() -> pd.DataFrame:
    """MedQuAD from Kaggle (CC BY 4.0; no account needed)."""
    import kagglehub

    try:
        folder = try_again(lambda: kagglehub.dataset_download(MEDQUAD_KAGGLE), "MedQuAD", "Kaggle")
    except Exception as error:  # kagglehub raises what its HTTP client raises
        raise RuntimeError(f"MedQuAD could not be fetched from kaggle.com/datasets/{MEDQUAD_KAGGLE}: "
                           f"{hub_reason(error, 'Kaggle')}. Run again later, or download it by hand and set "
                           "MEDQA_DATA_DIR to its folder.") from error
    frame = read_source(Path(folder) / FILES["medquad"], "medquad")
    frame.attrs["origin"] = f"kaggle.com/datasets/{MEDQUAD_KAGGLE}"
    return frame


def load_hub(repository: str) -> pd.DataFrame:
    """All rows of a data set of the Hub."""
    datasets.disable_progress_bars()
    parts = try_again(lambda: datasets.load_dataset(repository), repository)
    frame = pd.concat([part.to_pandas() for part in parts.values()], ignore_index=True)
    frame.attrs["origin"] = f"huggingface.co/datasets/{repository}"
    return frame


def download_afrimedqa() -> pd.DataFrame:
    """AfriMed-QA v2 from the Hub (CC BY-NC-SA 4.0): the gated original, else its open mirror, saying so."""
    reasons = []
    for repository in (AFRIMEDQA_HUB, AFRIMEDQA_MIRROR):
        try:
            return check_source(load_hub(repository), "afrimedqa")
        except Exception as error:  # datasets, huggingface_hub and httpx each raise their own
            reasons.append(f"{repository}: {hub_reason(error)}")
        if repository == AFRIMEDQA_HUB:
            print(f"Cannot read {reasons[0]}. {HOW_TO_ACCEPT} Trying the open mirror {AFRIMEDQA_MIRROR}.")
    raise RuntimeError(f"AfriMed-QA could not be fetched ({'; '.join(reasons)}). Run again later, or set "
                       f"MEDQA_DATA_DIR to a folder with the CSV files. {HOW_TO_ACCEPT}")
