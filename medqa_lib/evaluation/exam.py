"""Two multiple-choice exams that published models took: AfriMed-QA's official test and MedQA.

    python -m medqa_lib.evaluation.exam base exp_004     writes exam.csv into each run's results folder

Two protocols, as in the lm-evaluation-harness: `letter`, is the correct option's letter the likeliest next
token; `option`, is the text of the correct option the likeliest answer, per character (`acc_norm`).
"""

import ast
import io
import json
import sys
from pathlib import Path
from urllib.request import urlopen

import pandas as pd

from medqa_lib.config import current_profile, data_dir, home_dir
from medqa_lib.data.cleaning import LETTERS, Row, read_options
from medqa_lib.data.sources import load_sources
from medqa_lib.evaluation import retrieval
from medqa_lib.evaluation.likelihood import score_options
from medqa_lib.evaluation.results import has_nf4, run_folder
from medqa_lib.model import load_base_model, load_merged, load_tokenizer
from medqa_lib.reasons import user_errors

# Results of the benchmark's authors (Olatunji et al., ACL 2025), a row per question; MedQA's hold its text.
PUBLISHED = "https://github.com/intron-innovation/AfriMed-QA/raw/main/"
MEDQA = "results/BioMistral-7B/medqa_BioMistral-7B_mcq_base-prompt__no_exp_0-shot_score_0.4564_1273.csv"
MEDQA_FILE = "medqa_usmle_4_options_test.csv.gz"  # in the data folder of your settings, or below it


def read_public(path: str, local: str | None = None) -> pd.DataFrame:
    """A public CSV of the benchmark's repository, or the file `local` of your data folder if it is there."""
    folder = data_dir()
    found = next(Path(folder).glob(f"**/{local}"), None) if folder and local and folder.is_dir() else None
    if found:
        return pd.read_csv(found, dtype=str)
    try:
        content = urlopen(PUBLISHED + path, timeout=60).read()
    except OSError as error:
        raise ConnectionError(f"{PUBLISHED}{path} cannot be fetched ({error}). Run again with a network, or "
                              f"put {local or 'it'} into the data folder of your settings.") from None
    return pd.read_csv(io.BytesIO(content), dtype=str)


def load_exams(sources: dict[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """The questions of both exams: sample_id, exam, question, options (a list), correct (its place).

    AfriMed-QA: 3,907 expert questions, the Hub's split `test` (3,910) without three that have no key or no
    options; of several keys the first one counts, as with its authors. MedQA: the 1,273 test questions with
    four options (Jin et al. 2021).

    Raises:
        ValueError: there is no AfriMed-QA.
        ConnectionError: MedQA cannot be fetched.
    """
    frame = (sources or load_sources()).get("afrimedqa")
    if frame is None:
        raise ValueError("The data folder of your settings has no AfriMed-QA, whose test is the first exam; "
                         "expected afrimedqa_v2.csv there.")
    rows = []
    for row in frame[(frame["official"] == "test") & (frame["question_type"] == "mcq")].to_dict("records"):
        asked = read_options(Row(row["question"], "", "afrimedqa", kind="mcq", options=row["answer_options"],
                                 correct=row["correct_answer"]))
        if asked:
            rows.append((row["sample_id"], "afrimedqa", asked.question, [*asked.options], asked.correct[0]))
    for row in read_public(MEDQA, MEDQA_FILE).to_dict("records"):
        options = ast.literal_eval(row["options"]) if "options" in row else {key: row[key] for key in "ABCD"}
        correct = [*options].index(row.get("correct_answer") or row["answer"])
        rows.append((row["sample_id"], "medqa", row["question"], [*options.values()], correct))
    return pd.DataFrame(rows, columns=["sample_id", "exam", "question", "options", "correct"])


def take_exam(model, tokenizer, exams: pd.DataFrame, index=None) -> pd.DataFrame:
    """Which questions the model gets right: sample_id (16 digits), exam, chance, letter, option (1 or 0).

    Args:
        index: a `retrieval.Index`; its nearest passages come before each question.
    """
    stems = [" ".join(text.split()) for text in exams["question"]]
    questions = ["\n".join([stem, *map("{}. {}".format, LETTERS, options)])
                 for stem, options in zip(stems, exams["options"], strict=True)]
    if index:
        questions = list(map(retrieval.ask, questions, index.find(stems)))
    table = exams[["sample_id", "exam"]].assign(chance=1 / exams["options"].map(len))
    table["sample_id"] = table["sample_id"].str[:16]
    for protocol in ("letter", "option"):
        choices = [json.dumps({"options": list(LETTERS[:len(options)]) if protocol == "letter" else options,
                               "correct": correct})
                   for options, correct in zip(exams["options"], exams["correct"], strict=True)]
        table[protocol] = score_options(model, tokenizer, questions, choices)["mcq_correct"].to_numpy(int)
    return table


def examine(name: str) -> pd.DataFrame:
    """`take_exam` of a finished run ("base...": the untuned model), kept as exam.csv in its folder."""
    profile = current_profile()
    path = run_folder(name, profile) / "exam.csv"
    if not path.exists():
        adapter = None if name[:4] == "base" else home_dir() / "adapters" / profile.model_slug / name
        model = load_merged(adapter, profile, load_base_model(profile, has_nf4(name)))
        table = take_exam(model, load_tokenizer(profile), load_exams())
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.6g")
    return pd.read_csv(path)


if __name__ == "__main__":
    with user_errors():
        for each in sys.argv[1:] or ["base"]:
            found = examine(each).groupby("exam")[["letter", "option", "chance"]].mean()
            print(f"{each}:\n{found.round(3)}")
