"""README.md's numbers and links against the files that they come from."""

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from medqa_lib.metrics import summarize_scores

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "assets" / "results" / "smollm2-135m"
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS = {"validation loss": ("validation_loss", 3), "ROUGE-2": ("rouge2", 3), "BLEU": ("bleu", 2),
           "answers that end": ("eos_rate", None), "multiple choice": ("mcq_accuracy", 3)}
ROWS = ("base", "exp_003", "exp_004", "exp_005", "baseline_nearest_answer")


def read_metrics(run):
    """The run's metrics, those of answers on the free questions alone."""
    metrics = json.loads((PUBLISHED / run / "metrics.json").read_text(encoding="utf-8"))
    scores, untuned = (pd.read_csv(PUBLISHED / name / "scores.csv") for name in (run, "base"))
    choice = untuned.loc[untuned["mcq_asked"] > 0, "question_id"]
    free = summarize_scores(scores[~scores["question_id"].isin(choice)])
    return metrics | {name: free[name] for name in ("n", "rouge2", "bleu", "eos_rate") if name in free}


def read_table(mark):
    """The rows of the table below <!-- table: MARK -->, each a dict from column to text."""
    lines = README[README.index(f"<!-- table: {mark} -->") :].splitlines()[1:]
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_readme_is_a_first_minute():
    assert README.count("\n") <= 150


def test_headline_table_holds_the_published_scores():
    table = read_table("headline")
    assert len(table) == len(ROWS)
    assert f"the {read_metrics('base')['n']:,} free test questions" in README
    for row, run in zip(table, ROWS, strict=True):
        metrics = read_metrics(run)
        for column, (name, decimals) in COLUMNS.items():
            if name not in metrics:
                assert row[column] == "-"
            elif decimals is None:
                assert row[column] == f"{metrics[name]:.0%}"
            else:
                assert float(row[column]) == pytest.approx(metrics[name], abs=0.5001 * 10**-decimals), (run, column)


def test_answers_shown_are_the_runs_own():
    for run in ("base", "exp_003", "exp_004"):
        samples = json.loads((PUBLISHED / run / "samples.json").read_text(encoding="utf-8"))
        answer = next(sample["answer"] for sample in samples if sample["question"] == "What is high blood pressure?")
        assert " ".join(answer.split())[:60] in README, run


def test_gains_in_the_text_are_the_published_ones():
    base, bug, fix = (read_metrics(run)["rouge2"] for run in ("base", "exp_003", "exp_004"))
    lost, gained = re.search(r"loses (\d+)% of its\s+ROUGE-2.*?gains (\d+)%", README, re.S).groups()
    assert int(lost) == round(100 * (1 - bug / base))
    assert int(gained) == round(100 * (fix / base - 1))


def test_agreement_with_people_is_the_published_one():
    table = pd.read_csv(PUBLISHED.parent / "human_judgement.csv", index_col="metric")["auc"]
    stated = re.search(r"BERTScore prefers .*? in (\d+)% .*?ROUGE-2 in (\d+)%, BLEU in (\d+)%", README, re.S).groups()
    assert [int(number) for number in stated] == [round(100 * table[name]) for name in ("bertscore_f1", "rouge2", "bleu")]


def test_links_lead_somewhere():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_notebook_has_a_badge():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"/blob/main/notebooks/{path.name})" in README, path.name
