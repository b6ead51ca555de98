"""README.md's numbers and links against the files that they come from."""

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from medqa_lib.evaluation.results import load_run
from medqa_lib.evaluation.significance import compare_runs
from medqa_lib.metrics import summarize_scores

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "assets" / "results" / "smollm2-135m"
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS = {
    "validation loss": ("validation_loss", 3),
    "ROUGE-2": ("rouge2", 3),
    "BERTScore": ("bertscore_f1", 3),
    "BLEU": ("bleu", 2),
    "facts right": ("fact_accuracy", 3),
    "exam": ("exam", 3),
}
CHAT = "baseline_chat_template_without_nf4"
COPY, OTHER = "baseline_nearest_answer", "baseline_shuffled_reference"
ROWS = ("base", CHAT, "exp_003", "exp_004", "exp_005", "exp_005_without_nf4", COPY, OTHER)
EXAMINED = {"base": "base", "exp_004": "exp_004_official", "exp_005": "exp_005_official"}


def read_exam(run, protocol):
    """Accuracy on AfriMed-QA's official test, the mean of the run's seeds."""
    names = [
        name for name in (run, f"{run}_seed43", f"{run}_seed44") if (PUBLISHED / name / "exam.csv").exists()
    ]
    tables = [pd.read_csv(PUBLISHED / name / "exam.csv") for name in names]
    return sum(table.loc[table["exam"] == "afrimedqa", protocol].mean() for table in tables) / len(tables)


def read_metrics(run):
    """Means over the run's seeds, computed again from the scores of the free questions."""
    seeds = []
    for name in (run, f"{run}_seed43", f"{run}_seed44"):
        if (PUBLISHED / name / "metrics.json").exists():
            metrics = json.loads((PUBLISHED / name / "metrics.json").read_text(encoding="utf-8"))
            scores = pd.read_csv(PUBLISHED / name / "scores.csv")
            free = summarize_scores(scores[scores["kind"] == "free"].drop(columns="kind"))
            seeds.append({"validation_loss": metrics.get("validation_loss"), **free})
    means = {
        name: sum(seed[name] for seed in seeds) / len(seeds)
        for name in seeds[0]
        if seeds[0][name] is not None
    }
    return means | ({"exam": read_exam(EXAMINED[run], "option")} if run in EXAMINED else {})


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
    assert f"the {read_metrics('base')['n']:,.0f} free test questions" in README
    for row, run in zip(table, ROWS, strict=True):
        metrics = read_metrics(run)
        for column, (name, decimals) in COLUMNS.items():
            if name not in metrics:
                assert row[column] == "-"
            else:
                assert float(row[column]) == pytest.approx(metrics[name], abs=0.5001 * 10**-decimals), (
                    run,
                    column,
                )


def test_answers_shown_are_the_runs_own():
    for run in ("base", "exp_003", "exp_004"):
        samples = json.loads((PUBLISHED / run / "samples.json").read_text(encoding="utf-8"))
        answer = next(
            sample["answer"] for sample in samples if sample["question"] == "What is high blood pressure?"
        )
        assert " ".join(answer.split())[:60] in README, run


def test_gains_in_the_text_are_the_published_ones():
    base, bug, fix, best, copy = (read_metrics(run) for run in (ROWS[0], *ROWS[2:5], COPY))
    lost, gained = re.search(r"loses (\d+)% of the untuned one's ROUGE-2.*?gains\s+(\d+)%\.", README, re.S).groups()
    assert int(lost) == round(100 * (1 - bug["rouge2"] / base["rouge2"]))
    assert int(gained) == round(100 * (fix["rouge2"] / base["rouge2"] - 1))
    rouge, bleu = re.search(r"in ROUGE-2 \((\S+)%; [^)]*\) and loses in BLEU \((\S+)%\)", README).groups()
    assert int(rouge) == round(100 * (best["rouge2"] / copy["rouge2"] - 1))
    assert int(bleu) == round(100 * (best["bleu"] / copy["bleu"] - 1))


def free_scores(run):
    """Rows of the free questions, one frame a seed."""
    found = [PUBLISHED / f"{run}{seed}" for seed in ("", "_seed43", "_seed44")]
    return [scores[scores["kind"] == "free"] for scores in (load_run(path).scores for path in found if path.exists())]


@pytest.mark.parametrize(
    ("first", "second", "sign", "said"),
    [
        ("base_without_nf4", "base", -1, r"it takes (\d+)% \[(\d+), (\d+)\] of the untuned"),
        (CHAT, "exp_005_without_nf4", 1, r"both sides exp_005 has (\d+)% \[(\d+), (\d+)\]"),
        (CHAT, "exp_004", 1, r"3% less, and (\d+)%\s+\[(\d+), (\d+)\] more ROUGE-2"),
        (CHAT, "exp_005", 1, r"exp_005 has\s+(\d+)% \[(\d+), (\d+)\] more, on AfriMed"),
    ],
)
def test_intervals_in_the_text_are_the_published_ones(first, second, sign, said):
    row = compare_runs(free_scores(first), free_scores(second), ["rouge2"]).iloc[0]
    ends = sorted([sign * row.percent_low, sign * row.percent_high])
    assert list(map(int, re.search(said, README).groups())) == [round(sign * row.percent_change), *map(round, ends)]


def test_no_recipe_has_more_bertscore_than_the_untuned_model_as_released():
    assert "no recipe of ours has more BERTScore" in README
    seeds = {}
    for path in PUBLISHED.glob("*/metrics.json"):
        score = json.loads(path.read_text(encoding="utf-8"))["bertscore_f1"]
        seeds.setdefault(re.sub(r"_seed\d+", "", path.parent.name), []).append(score)
    means = {name: sum(scores) / len(scores) for name, scores in seeds.items()}
    tuned = [mean for name, mean in means.items() if re.match("(exp|ablation|truncation)_(?!.*_validation)", name)]
    assert len(tuned) > 30 and max(tuned) < means[CHAT]


def test_passages_add_nothing_that_can_be_shown():
    assert "(exp_006) adds nothing we can show" in " ".join(README.split())
    exp_005, exp_006 = (
        [load_run(PUBLISHED / f"{run}{seed}").scores for seed in ("", "_seed43", "_seed44")]
        for run in ("exp_005", "exp_006")
    )
    metrics = ["rouge2", "rougeL", "bleu", "bertscore_f1", "fact_accuracy"]
    table = compare_runs(exp_005, exp_006, metrics, n_resamples=5_000)
    assert set(table["verdict"]) == {"no difference"} and (table["n"] == 1327).all()


def test_what_was_seen_is_remembered():
    start, seen, unseen = re.search(
        r"rises from (\.\d+) to (\.\d+).*?stays at (\.\d+)", README, re.S
    ).groups()
    for text, run in ((start, "base"), (seen, "exp_005"), (unseen, "exp_005_official")):
        assert float(text) == pytest.approx(read_exam(run, "option"), abs=0.0005)


def test_agreement_with_people_is_the_published_one():
    table = pd.read_csv(PUBLISHED.parent / "human_judgement.csv", index_col="metric")["auc"]
    stated = re.search(
        r"BERTScore prefers .*? in (\d+)% .*?ROUGE-2 in (\d+)%, BLEU in (\d+)%", README, re.S
    ).groups()
    assert [int(number) for number in stated] == [
        round(100 * table[name]) for name in ("bertscore_f1", "rouge2", "bleu")
    ]


def test_links_lead_somewhere():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_notebook_has_a_badge():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"/blob/main/notebooks/{path.name})" in README, path.name
