"""Your own question-answer pairs: from a file, the Hub or a DataFrame to what `split_pairs` takes."""

from pathlib import Path

import pandas as pd

from medqa_lib.data.cleaning import Row, clean_rows, parse_cell
from medqa_lib.data.sources import find_table
from medqa_lib.data.splits import make_pairs
from medqa_lib.data.texts import text_cell

USUAL_NAMES = (("question", "questions", "query", "prompt", "instruction", "input", "q"),
               ("answer", "answers", "response", "output", "completion", "target", "reply", "a"))
MIN_PAIRS = 10  # the smallest number of which a tenth is a row
# What is safe for any text; the other steps undo what the exports of MedQuAD and AfriMed-QA left.
SAFE_STEPS = {"placeholders", "oversized cells", "Unicode, HTML and white space", "no question or answer",
              "exact pairs"}


def pairs_from(source: str | Path | pd.DataFrame, question: str | None = None, answer: str | None = None,
               group: str | None = None) -> pd.DataFrame:
    """Cleaned pairs with leakage groups, from a file that `read_table` reads, the Hub or a DataFrame.

    Rows are in one group if they share the question, the answer (or nearly so, or one contains the other) or
    the value in column `group`. Columns that are not named are guessed, and the guess is printed.
    """
    frame = source if isinstance(source, pd.DataFrame) else find_table(source)
    name = frame.attrs.get("origin", "DataFrame")
    question, answer = find_columns(frame, question, answer, group)
    print(f"{name}: {len(frame)} rows, questions in column {question!r}, answers in {answer!r}")
    asked = texts_of(frame, question)
    if question == "instruction" and "input" in frame:  # Alpaca's form: the task, then what it is about
        asked = map("{} {}".format, asked, texts_of(frame, "input"))
    groups = frame[group].tolist() if group else [""] * len(frame)
    rows = zip(asked, texts_of(frame, answer), ["own"] * len(frame), groups, strict=True)
    rows, funnel = clean_rows([Row(*cells) for cells in rows], SAFE_STEPS)
    if removed := ", ".join(f"{step['removed']} ({step['step']})" for step in funnel if step["removed"]):
        print(f"{name}: {len(rows)} pairs; removed: {removed}")
    if len(rows) < MIN_PAIRS:
        raise ValueError(f"{name}: {len(rows)} of {len(frame)} are usable; expected {MIN_PAIRS} or more.")
    return make_pairs(rows, funnel)


def find_columns(frame: pd.DataFrame, question: str | None, answer: str | None, group: str | None) -> list:
    """The columns of questions and answers: as named, else by a usual name in any case, else the only two."""
    names = {str(name).strip().lower(): name for name in frame.columns}
    guesses = [next((names[name] for name in usual if name in names), None) for usual in USUAL_NAMES]
    if len(names) == 2:
        rest = [name for name in names.values() if name not in guesses]
        guesses = [rest.pop(0) if guess is None else guess for guess in guesses]
        if header := next((name for name in names.values() if len(str(name).split()) > 5), ""):
            raise ValueError(f"The first row, {header[:80]!r}, is no header: name the columns there.")
    found = [question or guesses[0] or "question", answer or guesses[1] or "answer"]
    if missing := [str(name) for name in (*found, group) if name and name not in frame]:
        raise ValueError(f"There is no column {' or '.join(missing)}; the columns are "
                         f"{', '.join(map(str, frame.columns[:20]))}. Name them: question=..., answer=...")
    return found


def texts_of(frame: pd.DataFrame, column: str) -> list[str]:
    """The column's cells as text, a list of one text as that text; a column of other lists is refused."""
    cells = [text_cell(cell) for cell in frame[column]]
    parsed = [parse_cell(cell) for cell in cells]
    alone = [isinstance(found, list) and list(map(type, found)) == [str] for found in parsed]
    if 2 * (len(parsed) - parsed.count(None) - sum(alone)) > len(frame):
        raise ValueError(f"Column {column!r} holds lists or dictionaries, such as {cells[0][:80]}; "
                         "expected text. Take the text out first and pass the DataFrame.")
    return [found[0] if one else cell for found, one, cell in zip(parsed, alone, cells, strict=True)]
