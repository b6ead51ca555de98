"""The reference lines: retrieval and cutting by hand, the runs on the smoke profile."""

import pytest

from medqa_lib.config import PROFILES
from medqa_lib.data import prepare_splits
from medqa_lib.evaluation import baselines
from medqa_lib.evaluation import run as evaluation


def test_find_nearest_answers_prefers_rare_words():
    questions = ["What is gout ?", "What is asthma ?", "What are the treatments for asthma ?"]
    answers = ["Gout is joint pain.", "Asthma is narrow airways.", "An inhaler."]
    asked = ["treatments for asthma", "what is gout in adults", "GOUT"] * 100  # more than one chunk
    assert (
        baselines.find_nearest_answers(questions, answers, asked)
        == ["An inhaler.", "Gout is joint pain.", "Gout is joint pain."] * 100
    )


@pytest.mark.parametrize(
    ("answer", "reference", "cut"),
    [("one two  three four", "a b", "one two"), ("one", "a b c", "one"), ("one two", "", ""), ("", "a", "")],
)
def test_cut_words(answer, reference, cut):
    assert baselines.cut_words(answer, reference) == cut


def test_run_reference_lines_answers_the_base_runs_questions(tmp_path, monkeypatch):
    profile = PROFILES["smoke"]
    splits = prepare_splits(home=tmp_path)
    lines = baselines.run_baselines(splits, profile, tmp_path)
    base = evaluation.run_base(splits, profile, tmp_path)
    assert {"baseline_untuned_cut", "baseline_nearest_answer"} <= set(lines) <= set(baselines.BASELINES)
    for run in lines.values():
        assert list(run.scores["question_id"]) == list(base.scores["question_id"])
        assert run.metrics["n_test"] == base.metrics["n_test"] == profile.test_questions
    cut = lines["baseline_untuned_cut"].scores
    assert (cut["words"] <= cut["reference_words"]).all()
    assert (cut["words"] == base.scores[["words", "reference_words"]].min(axis=1)).all()
    nearest = lines["baseline_nearest_answer"]
    assert nearest.samples.empty
    assert "eos_rate" not in nearest.metrics
    monkeypatch.setattr(baselines, "save_run", None)  # a second call only reads
    again = baselines.run_baselines(splits, profile, tmp_path)
    assert {name: run.metrics for name, run in again.items()} == {
        name: run.metrics for name, run in lines.items()
    }
