"""Your own question-answer pairs: from a file, the Hub or a DataFrame to what `split_pairs` takes."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from medqa_lib.data.cleaning import Row, clean_rows
from medqa_lib.data.prepare import make_pairs
from medqa_lib.data.sources import load_hub, read_csv
from medqa_lib.reasons import hub_reason

QUESTION_NAMES = ("question", "query", "prompt", "instruction", "input", "q")
ANSWER_NAMES = ("answer", "response", "output", "completion", "target", "a")
MIN_PAIRS = 10  # the smallest number of which a tenth is a row
# What is safe for any text; the other steps undo what the exports of MedQuAD and AfriMed-QA left.
SAFE_STEPS = {"placeholders", "oversized cells", "Unicode, HTML and white space", "no question or answer",
              "exact pairs"}


def pairs_from(source: str | Path | pd.DataFrame, question: str | None = None, answer: str | None = None,
               group: str | None = None) -> pd.DataFrame:
    """Cleaned pairs with leakage groups, from a file (READERS), a data set of the Hub or a DataFrame.

    Rows are in one group if they share question, answer (or nearly so) or the value in column `group`.
    Columns for question and answer that are not named are guessed, and the guess is printed.

    Raises:
        FileNotFoundError, ValueError: no such file; it cannot be read, lacks a column or has under ten pairs.
    """
    frame, name = read_table(source)
    question = find_column(frame, question, QUESTION_NAMES)
    answer = find_column(frame, answer, ANSWER_NAMES)
    print(f"{name}: {len(frame)} rows, questions in column {question!r}, answers in {answer!r}")
    groups = frame[find_column(frame, group, ())] if group else [""] * len(frame)
    cells = zip(frame[question], frame[answer], groups, strict=True)
    rows = [Row(asked, answered, "own", area) for asked, answered, area in cells]
    rows, funnel = clean_rows(rows, SAFE_STEPS)
    if len(rows) < MIN_PAIRS:
        raise ValueError(f"{name}: {len(rows)} of {len(frame)} are usable; expected {MIN_PAIRS} or more.")
    return make_pairs(rows, funnel)


def read_table(source: str | Path | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The table and its name."""
    if isinstance(source, pd.DataFrame):
        return source, "DataFrame"
    path = Path(source).expanduser()
    read = READERS.get(path.suffix.lower())
    if not path.exists():
        if read or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise FileNotFoundError(f"There is no file {path}.")
        path, read = str(source), load_hub
    if not read:
        raise ValueError(f"{path.name}: expected a file with the ending {', '.join(READERS)}.")
    try:
        return read(path), str(source)
    except Exception as error:  # pandas, pyarrow and the Hub's clients each raise their own
        raise ValueError(f"{source} cannot be read: {hub_reason(error)}") from error


def read_delimited(path: Path) -> pd.DataFrame:
    """A CSV file; its separator is the most frequent of comma, semicolon, tab and bar in the header."""
    header = path.read_bytes().partition(b"\n")[0].decode("utf-8", "replace")
    return read_csv(path, max(",;\t|", key=header.count))


READERS = {".csv": read_delimited, ".tsv": read_delimited, ".json": pd.read_json, ".parquet": pd.read_parquet,
           ".jsonl": lambda path: pd.read_json(path, lines=True)}


def find_column(frame: pd.DataFrame, wanted: str | None, guesses: tuple[str, ...]) -> str:
    """The column that is wanted, else the first guess that the frame has, in any case."""
    if wanted is None:
        names = {str(name).strip().lower(): name for name in frame.columns}
        wanted = next((names[guess] for guess in guesses if guess in names), None)
    if wanted not in frame.columns:
        raise ValueError(f"There is no column {wanted or ' or '.join(guesses)}; the columns are "
                         f"{', '.join(map(str, frame.columns[:20]))}. Name them: question=..., answer=...")
    return wanted
