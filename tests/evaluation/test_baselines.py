"""The reference lines: retrieval and cutting by hand, the runs on the smoke profile."""

import json

import pytest
from datasets import Dataset
from smoke_adapters import SMOKE, make_adapter

from medqa_lib.config import PROFILES
from medqa_lib.data import prepare_splits
from medqa_lib.evaluation import baselines
from medqa_lib.evaluation import run as evaluation
from medqa_lib.evaluation.answers import Answer


def test_find_nearest_prefers_rare_words():
    questions = ["What is gout ?", "What is asthma ?", "What are the treatments for asthma ?"]
    asked = ["treatments for asthma", "what is gout in adults", "GOUT"] * 100  # more than one chunk
    assert baselines.find_nearest(questions, asked) == [2, 0, 0] * 100


def make_rows(*rows, **more):
    names = ("question", "answer", "group", "focus_area", "choices", "source")
    cells = [(*row, *("", "medquad")[len(row) - 6 :])[:6] for row in rows]
    return Dataset.from_dict(dict(zip(names, map(list, zip(*cells, strict=True)), strict=True)))


def test_shuffle_references_takes_another_disease_asked_in_the_same_words():
    rows = [("What is gout?", "Gout.", "a", "gout"), ("What causes gout?", "Urate.", "a", "gout"),
            ("What causes flu?", "A virus.", "b", "flu"), ("What is flu?", "Flu.", "b", "flu"),
            ("Is mumps inherited?", "No.", "c", "mumps"), ("What is gout in adults?", "Same group.", "a", "gout")]
    expected = ["Flu.", "A virus.", "Urate.", "Gout.", "Same group.", "A virus."]
    assert baselines.shuffle_references(make_rows(*rows)) == expected


def test_choose_shots_takes_the_first_free_questions_of_medium_length():
    words = [19, 20, 81, 50, 80, 30]
    rows = [(f"Q{n}", "w " * n, "g", "", '{"options": []}' if n == 50 else "") for n in words]
    assert baselines.choose_shots(make_rows(*rows)) == [1, 4, 5]


def test_encode_shots_puts_examples_before_the_prompt_and_ends_long_ones_with_a_sentence(llama_like):
    long = "One two. " + "three " * 197 + "end. Beyond."  # the 200th word ends a sentence; the next is cut
    train = make_rows(("What is gout?", "A </s> disease.", "a", "gout"), ("Flu?", long, "b", "flu"))
    ids = baselines.encode_shots(llama_like, train, [0, 1], "Mumps?")
    kept = long.removesuffix(" Beyond.")
    text = (f"### Instruction:\nWhat is gout?\n\n### Response:\nA < /s> disease.\n\n### Instruction:\nFlu?\n\n"
            f"### Response:\n{kept}\n\n### Instruction:\nMumps?\n\n### Response:\n")
    assert ids == llama_like([text])["input_ids"][0] and llama_like.eos_token_id not in ids


@pytest.mark.parametrize(("text", "end", "stopped"), [("Rest. ### Instruction: next", "Rest.", True), ("## Rest", "## Rest", False)])
def test_end_at_marker(text, end, stopped):
    assert baselines.end_at_marker(Answer(text, False, 9)) == Answer(end, stopped, 9)


def test_score_random_option_is_the_mean_over_options(tmp_path):
    test = make_rows(("Which?\nA. iron salts\nB. iron\nC. zinc", "iron salts", "a", "", '{"options": ["iron salts", "iron", "zinc"], "correct": 0}'),
                     ("What is gout?", "A disease.", "b", "gout"))
    splits = {"train": test, "validation": test, "test": test}
    context = evaluation.RunContext("x", splits, PROFILES["smoke"], tmp_path, {})
    [row] = baselines.score_random_option(context, test).to_dict("records")
    assert row["rouge1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert row["words"] == pytest.approx(4 / 3) and row["kind"] == "mcq"
    assert row["mcq_correct"] == row["mcq_chance"] == pytest.approx(1 / 3)


def test_run_reference_lines_answers_the_base_runs_questions(tmp_path, monkeypatch):
    profile = PROFILES["smoke"]
    splits = prepare_splits(home=tmp_path)
    lines = baselines.run_baselines(splits, profile, tmp_path)
    base = evaluation.run_base(splits, profile, tmp_path)
    assert {"baseline_untuned_cut", "baseline_nearest_answer"} <= set(lines) <= set(baselines.BASELINES)
    random_option = lines.pop("baseline_random_option", None)
    assert (random_option is None) == (base.metrics["mcq_questions"] == 0)
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


def test_run_one_shot_asks_the_tuned_model_after_the_nearest_training_pair(tmp_path, monkeypatch):
    splits = prepare_splits(home=tmp_path)
    make_adapter(tmp_path / "adapters" / SMOKE.model_slug / "exp_005")
    prompts = []
    ask = baselines.generate_records
    monkeypatch.setattr(baselines, "generate_records", lambda *a, **k: prompts.extend(a[2]) or ask(*a, **k))
    run = baselines.run_one_shot("exp_005", splits, SMOKE, tmp_path)
    assert run.name == "exp_005_one_shot" and run.metrics["n_test"] == SMOKE.test_questions
    assert run.config["identity"]["experiment"]["name"] == "exp_005" and len(run.samples) == 10
    assert json.loads((run.folder / "metrics.json").read_text())["red_lines_crossed"] in range(11)
    text = baselines.load_tokenizer(SMOKE).decode(prompts[0])
    assert text.count("### Instruction:") == 2 and text.endswith("### Response:\n")
