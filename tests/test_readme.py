"""README.md against the files that it speaks of."""

import itertools
import json
import statistics
from pathlib import Path

import pytest

from medqa_lib.evaluation import results
from medqa_lib.evaluation.significance import compare_runs

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "assets" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = {
    "validation loss": ("validation_loss", 3),
    "ROUGE-1": ("rouge1", 3),
    "ROUGE-2": ("rouge2", 4),
    "ROUGE-L": ("rougeL", 3),
    "BLEU": ("bleu", 2),
    "BERTScore": ("bertscore_f1", 3),
}  # column -> name in metrics.json, decimals
FOLDERS = {
    "exp_004, full sequence supervised": "ablation_full_sequence",
    "exp_004, padding supervised": "ablation_padding_supervised",
    "exp_004, end token not supervised": "ablation_no_eos",
    "exp_004, long answers cut mid-sentence / dropped": "truncation_cut / truncation_drop",
    "base, asked in its own chat template": "baseline_chat_template",
    "base, cut to the reference's length (which no real system knows)": "baseline_untuned_cut",
    "no model: the most similar training question's answer (TF-IDF)": "baseline_nearest_answer",
}  # the other rows bear the folder's name
ARMS = {
    "Trainer, padded to 512, 4 x 8, checkpointing": "padded to 512",
    "Trainer, padded dynamic, 8 x 4, checkpointing": "padded",
    "Trainer, flattened (16,754 and 23,015)": "flattened",
    "fast, q, k and v only": "fast, q k v only",
    "the same, 16 x 2": "fast, NF4 at every use, 16 x 2",
}  # the others bear the arm's


@pytest.fixture(scope="module")
def runs():
    return results.load_runs(PUBLISHED / "smollm2-135m")


def read_table(start):
    """The rows of the table whose heading starts so, each a dict from column to text without emphasis."""
    lines = itertools.takewhile(
        lambda line: line.startswith("|"), README[README.index(f"\n| {start}") + 1 :].splitlines()
    )
    names, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def rounded(value, decimals):
    text = f"{value:.{decimals}f}"
    return text.removeprefix("0") if 3 <= decimals <= 4 else text


def test_readme_gives_the_gpu_time_of_the_published_runs(runs):
    said = results.describe_gpu_time(runs)
    assert said in " ".join(README.split()), f"README.md must say: {said}"


def test_readme_tree_names_every_module():
    tree = README.partition("## The tree")[2].partition("notebooks/")[0].replace(",", " ").split()
    assert [
        path.stem for path in sorted((ROOT / "medqa_lib").glob("[!_]*.py")) if path.stem not in tree
    ] == []


def test_readme_gives_the_scores_of_the_published_runs(runs):
    table = read_table("run | validation loss")
    assert len(table) == 15
    for row in table:
        folders = FOLDERS.get(row["run"], row["run"]).split(" / ")
        for column, (name, decimals) in METRICS.items():
            values = [runs[folder].metrics[name] for folder in folders if name in runs[folder].metrics]
            expected = " / ".join(dict.fromkeys(rounded(value, decimals) for value in values))
            assert row[column] == expected, (row["run"], column)


def test_readme_gives_the_intervals_of_the_published_runs(runs):
    said = {
        row["change against the untuned model"]: row for row in read_table("change against the untuned model")
    }
    for name in ("exp_001", "exp_002", "exp_003", "exp_004", "exp_005"):
        for label, row in zip(("ROUGE-2", "BLEU"), compare(runs, name), strict=True):
            if f"{name}, {label}" in said:
                assert said.pop(f"{name}, {label}")["ours (95% interval)"] == row
    assert not said


def test_readme_gives_the_intervals_of_the_aligned_controls(runs):
    said = {
        row["change against the untuned model"]: row["aligned control: same steps and rate"]
        for row in read_table("change against the untuned model")
    }
    assert [said["exp_001, ROUGE-2"], said["exp_001, BLEU"]] == compare(runs, "exp_001_aligned")
    assert said["exp_002, ROUGE-2"] == compare(runs, "exp_002_aligned")[0]


def compare(runs, name):
    table = compare_runs(runs["base"].scores, runs[name].scores, ["rouge2", "bleu"])
    return [
        f"{row.percent_change:+.1f}% ({row.percent_low:+.1f} to {row.percent_high:+.1f})"
        for row in table.itertuples()
    ]


def test_readme_gives_mean_and_deviation_over_the_published_seeds(runs):
    for row in read_table("recipe | validation loss"):
        seeds = [runs[row["recipe"] + suffix].metrics for suffix in ("", "_seed43", "_seed44")]
        for column in ("ROUGE-2", "BLEU", "BERTScore"):
            name, decimals = METRICS[column]
            mean, deviation = (
                rounded(of([seed[name] for seed in seeds]), decimals)
                for of in (statistics.mean, statistics.stdev)
            )
            assert row[column] == f"{mean} ({deviation})", (row["recipe"], column)
        losses = [seed["validation_loss"] for seed in seeds]
        assert row["validation loss"] == f"{statistics.mean(losses):.4f} ({statistics.stdev(losses):.4f})"


def test_readme_gives_the_speeds_of_the_published_benchmark():
    measured = json.loads(
        (PUBLISHED / "benchmarks" / "training_nvidia_h100_80gb_hbm3.json").read_text(encoding="utf-8")
    )
    table = read_table("path | real tokens/s")
    assert len(table) == 9
    for row in table:
        arms = [arm for arm in measured if arm.get("arm") == ARMS.get(row["path"], row["path"])]
        mean = {
            name: statistics.mean(arm[name] for arm in arms) for name in ("tokens_s", "step_ms", "peak_gib")
        }
        assert float(row["real tokens/s"].replace(",", "")) == pytest.approx(mean["tokens_s"], abs=1), row
        assert float(row["ms a step"].replace(",", "")) == pytest.approx(mean["step_ms"], abs=0.5), row
        assert row["peak GiB"] == f"{mean['peak_gib']:.2f}"
        assert float(row["of the floor"].rstrip("%")) == pytest.approx(
            statistics.mean(100 * arm["floor_share"] for arm in arms), abs=0.06
        )
        assert row["timed steps"] == f"{len(arms)} x {arms[0]['timed_steps']}".removeprefix("1 x ")
