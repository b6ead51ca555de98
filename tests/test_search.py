"""The search for exp_005: what each round tries, what is combined, and that an interrupted search runs no trial twice."""

import dataclasses
import json
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict

from medqa_lib import search, search_plan
from medqa_lib.config import ALL_LINEAR, QKV, LoraSettings, get_experiment
from medqa_lib.model import load_merged

BASE = "cosine_2e-3"
ROUND_1 = {"exp_004_recipe": 2.20, "linear_2e-4": 2.19, "cosine_5e-4": 2.18, "cosine_1e-3": 2.15, BASE: 2.10, "cosine_4e-3": 2.12,
           "linear_1e-3": 2.16, "qkv_cosine_1e-3": 2.17}


def recipe_of(trial):
    """Every field that makes a recipe."""
    about = ("name", "question", "partner", "differs_in")
    return {field: value for field, value in dataclasses.asdict(trial).items() if field not in about}


def with_changes(changes):
    """exp_004's recipe with other values; those of `lora` one by one."""
    recipe = recipe_of(get_experiment("exp_004"))
    return recipe | {field: recipe["lora"] | value if field == "lora" else value for field, value in changes.items()}


def test_plan_round_1_tries_rates_and_schedules():
    rows = [("exp_004_recipe", 2e-4, "linear", QKV), ("qkv_cosine_1e-3", 1e-3, "cosine", QKV), ("linear_2e-4", 2e-4, "linear", ALL_LINEAR),
            ("cosine_5e-4", 5e-4, "cosine", ALL_LINEAR), ("cosine_1e-3", 1e-3, "cosine", ALL_LINEAR), (BASE, 2e-3, "cosine", ALL_LINEAR),
            ("cosine_4e-3", 4e-3, "cosine", ALL_LINEAR), ("linear_1e-3", 1e-3, "linear", ALL_LINEAR)]
    assert {trial.name: recipe_of(trial) for trial in search_plan.plan_round(1, {})} == {
        name: with_changes({"learning_rate": rate, "lr_scheduler": schedule, "lora": {"target_modules": targets}})
        for name, rate, schedule, targets in rows}


def test_plan_round_2_changes_one_thing_on_the_best_of_round_1():
    changes = {
        "rslora": {"lora": {"use_rslora": True}}, "dora_r7": {"lora": {"use_dora": True, "r": 7, "alpha": 14}},
        "qkvo_r16": {"lora": {"r": 16, "alpha": 32, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}},
        "lora_plus_4": {"lora_plus_ratio": 4}, "lora_plus_16": {"lora_plus_ratio": 16}, "dropout_0": {"lora": {"dropout": 0}},
        "warmup_0.1": {"warmup_share": 0.1}, "weight_decay_0.01": {"weight_decay": 0.01}, "length_1024": {"max_length_tokens": 1024},
        "truncation_cut": {"truncation": "cut"}, "truncation_drop": {"truncation": "drop"}}
    losses = {**ROUND_1, "somewhere_else": 1.0}  # a trial of no round
    assert {trial.name: recipe_of(trial) for trial in search_plan.plan_round(2, losses)} == {
        f"{BASE}+{name}": with_changes({"learning_rate": 2e-3, "lr_scheduler": "cosine", **change,
                                        "lora": {"target_modules": ALL_LINEAR, **change.get("lora", {})}})
        for name, change in changes.items()}


def test_plan_round_2_goes_by_the_trials_that_have_a_loss():
    losses = {name: loss for name, loss in ROUND_1.items() if name not in (BASE, "cosine_4e-3")}
    assert search_plan.plan_round(2, losses)[0].name == "cosine_1e-3+rslora"
    with pytest.raises(ValueError, match="No trial of round 1"):
        search_plan.plan_round(2, {})


def test_plan_round_3_combines_the_better_of_like_changes_above_the_margin():
    gains = {"rslora": 0.010, "dora_r7": 0.015,  # alike: DoRA is better
             "qkvo_r16": 0.012,  # sets r, as dora_r7 does
             "lora_plus_4": 0.0015, "lora_plus_16": 0.0025,  # only one is above 0.002
             "truncation_cut": 0.004, "truncation_drop": 0.005, "dropout_0": -0.01, "length_1024": 0.0}  # the others have failed
    trials = search_plan.plan_round(3, {**ROUND_1, **{f"{BASE}+{name}": 2.10 - gain for name, gain in gains.items()}})
    together = f"{BASE}+dora_r7+truncation_drop+lora_plus_16"
    assert {trial.name: recipe_of(trial) for trial in trials} == {
        together + suffix: with_changes({
            "learning_rate": rate, "lr_scheduler": "cosine", "truncation": "drop", "lora_plus_ratio": 16,
            "lora": {"target_modules": ALL_LINEAR, "use_dora": True, "r": 7, "alpha": 14}})
        for suffix, rate in (("", 2e-3), ("@0.67x", 1.34e-3), ("@1.5x", 3e-3))}


def test_plan_round_3_without_a_helpful_change_only_moves_the_rate():
    trials = search_plan.plan_round(3, {**ROUND_1, f"{BASE}+rslora": 2.099, f"{BASE}+dropout_0": 2.3})
    assert [(trial.name, trial.learning_rate) for trial in trials] == [(BASE, 2e-3), (f"{BASE}@0.67x", 1.34e-3), (f"{BASE}@1.5x", 3e-3)]


def test_planned_trials_train_at_most_the_share_that_is_allowed():
    trials = search_plan.plan_round(1, {}) + search_plan.plan_round(2, ROUND_1)
    shares = {trial.name: search_plan.measure_tinyllama_share(trial.lora) for trial in trials}
    assert max(shares.values()) <= 0.006
    # 22 layers of q and o (2048 x 2048), k and v (2048 x 256), gate, up and down (2048 x 5632); beside TinyLlama's own parameters
    qkvo, mlp, weights = 22 * (2 * 4096 + 2 * 2304), 22 * 3 * 7680, 1_100_048_384
    magnitudes = 22 * (2 * 2048 + 2 * 256 + 2 * 5632 + 2048)
    for name, trained in ((BASE, 8 * (qkvo + mlp)), (f"{BASE}+qkvo_r16", 16 * qkvo), (f"{BASE}+dora_r7", 7 * (qkvo + mlp) + magnitudes)):
        assert shares[name] == pytest.approx(trained / (weights + trained), rel=1e-12)


@pytest.fixture(scope="module")
def splits():
    """Made-up pairs, too few to take long."""
    def pairs(first, n):
        numbers = range(first, first + n)
        return Dataset.from_dict({"question": [f"What is disease {i}?" for i in numbers], "source": ["medquad"] * n,
                                  "answer": [f"Disease {i} is an illness." + " It passes." * (i % 5) for i in numbers],
                                  "group": [str(i) for i in numbers], "choices": [""] * n, "focus_area": [""] * n})

    return DatasetDict(train=pairs(0, 14), validation=pairs(100, 4), test=pairs(200, 4))


@pytest.fixture
def home(splits, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_HOME", str(tmp_path))
    monkeypatch.setattr(search, "prepare_splits", lambda home: splits)
    return tmp_path


@pytest.fixture
def folder(home):
    path = home / "results" / "smoke-llama" / "search"
    path.mkdir(parents=True)
    return path


def write_trial(folder, name, number, loss, **fields):
    trial = {"name": name, "round": number, "changes": {}, "validation_loss": loss, "identity": {}, **fields}
    (folder / f"{name}.json").write_text(json.dumps(trial))


@pytest.fixture
def small_grid(monkeypatch):
    """Two trials in round 1, two changes in round 2."""
    monkeypatch.setattr(search_plan, "ROUND_1", {name: search_plan.ROUND_1[name] for name in ("exp_004_recipe", "cosine_4e-3")})
    monkeypatch.setattr(search_plan, "CHANGES", {name: search_plan.CHANGES[name] for name in ("lora_plus_16", "dora_r7")})


def test_search_interrupted_and_resumed_runs_no_trial_twice(home, splits, small_grid, monkeypatch, capsys):
    trained, original = [], search.train_adapter

    def train_adapter(experiment, *args):
        if len(trained) == 3 and "interrupted" not in trained:
            trained.append("interrupted")
            raise KeyboardInterrupt
        trained.append(experiment.name)
        return original(experiment, *args)

    monkeypatch.setattr(search, "train_adapter", train_adapter)
    monkeypatch.setattr(sys, "argv", ["search"])
    with pytest.raises(KeyboardInterrupt):
        search.main()
    search.main()
    search.main()
    base = "cosine_4e-3"  # four steps on random weights: the higher rate is ahead, and so is LoRA+ with its faster B
    assert trained == ["exp_004_recipe", base, f"{base}+lora_plus_16", "interrupted", f"{base}+dora_r7", f"{base}+lora_plus_16@0.67x",
                       f"{base}+lora_plus_16@1.5x"]
    results = {path.stem: json.loads(path.read_text()) for path in (home / "results" / "smoke-llama" / "search").iterdir()}
    assert set(results) == set(trained) - {"interrupted"}
    result = results[f"{base}+lora_plus_16"]
    assert result["changes"] == {"learning_rate": 4e-3, "lr_scheduler": "cosine", "lora_plus_ratio": 16,
                                 "lora.target_modules": list(ALL_LINEAR)}
    assert result["round"] == 2 and result["tinyllama_share"] == pytest.approx(0.0057, abs=1e-5)
    adapter = home / "adapters" / "smoke-llama" / f"search_{base}+lora_plus_16"
    assert result["validation_loss"] == pytest.approx(measure_loss(adapter, splits), abs=1e-5)
    best = min(results, key=lambda name: results[name]["validation_loss"])
    assert f"Best: {best}, validation loss {results[best]['validation_loss']:.4f}" in capsys.readouterr().out.splitlines()[-1]
    assert not (home / "answers").exists(), "no test question is answered"
    assert not list((home / "checkpoints").rglob("checkpoint-*"))


def measure_loss(adapter, splits):
    """Mean loss of the answers' bytes (a token each) and the end mark, from the model's own loss, one row at a time."""
    model, total, tokens = load_merged(adapter, search.current_profile()), 0.0, 0
    for row in splits["validation"]:
        prompt, answer = f"### Instruction:\n{row['question']}\n\n### Response:\n".encode(), row["answer"].encode()
        tokenizer = search.load_tokenizer(search.current_profile())
        ids = torch.tensor([tokenizer((prompt + answer).decode())["input_ids"] + [tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, :-len(answer) - 1] = -100
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * (len(answer) + 1)
        tokens += len(answer) + 1
    return total / tokens


def test_run_trial_refuses_more_than_the_share_that_is_allowed(home, monkeypatch):
    monkeypatch.setattr(search, "train_adapter", lambda *_: pytest.fail("trained"))
    trial = dataclasses.replace(get_experiment("exp_004"), name="dora_r8", lora=LoraSettings(target_modules=ALL_LINEAR, use_dora=True))
    with pytest.raises(ValueError, match=r"dora_r8 would train 0\.606% of TinyLlama; expected at most 0\.6%"):
        search.Search().run_trial(2, trial)


def fake_trial(monkeypatch, losses):
    """Trials that take no time: each writes its loss, 3.0 where none is given; an exception is raised. Returns the names that ran."""
    ran = []

    def run_trial(self, number, trial):
        ran.append(trial.name)
        loss = losses.get(trial.name, 3.0)
        if isinstance(loss, Exception):
            raise loss
        self.save({**self.describe(number, trial), "validation_loss": loss})

    monkeypatch.setattr(search.Search, "run_trial", run_trial)
    return ran


def test_search_goes_on_after_a_trial_that_fails_and_tries_it_again(home, folder, monkeypatch):
    losses = {**ROUND_1, BASE: RuntimeError("boom"), "cosine_4e-3": None}  # the one diverged
    ran = fake_trial(monkeypatch, losses)
    search.Search().run()
    assert len(ran) == 8 + 11 + 2 and "cosine_1e-3+rslora" in ran
    table = search.search_table(folder).set_index("name")
    assert table["status"][BASE] == "failed: RuntimeError: boom" and table["status"]["cosine_4e-3"] == "diverged"
    losses[BASE] = 2.16
    ran.clear()
    search.Search().run()
    assert ran == [BASE] and search.search_table(folder).set_index("name")["status"][BASE] == "done"


def test_search_refuses_results_of_another_recipe(home, folder, monkeypatch):
    fake_trial(monkeypatch, {})
    finished = search.Search()
    finished.run_trial(1, finished.plan(1)[0])
    path = folder / "exp_004_recipe.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.0002', '"learning_rate": 0.0003'))
    with pytest.raises(ValueError, match="experiment.learning_rate: checkpoint 0.0003, this run 0.0002"):
        search.Search().run()


def test_search_with_workers_reports_a_child_that_dies(home, folder, small_grid, monkeypatch, capsys):
    """Children that only write their result; one prints a line and dies."""
    code = """if 1:
        import json, sys
        if sys.argv[1] == "exp_004_recipe":
            print("no such GPU")
            sys.exit(7)
        result = {"name": sys.argv[1], "round": 1, "changes": {}, "validation_loss": 2.0, "identity": json.loads(sys.argv[2])}
        json.dump(result, open(sys.argv[3], "w"))"""
    searching = search.Search()

    def child_command(number, trial):
        identity = json.dumps(searching.describe(number, trial)["identity"])
        return [sys.executable, "-c", code, trial.name, identity, str(folder / f"{trial.name}.json")]

    monkeypatch.setattr(search, "child_command", child_command)
    searching.run(workers=2)
    assert "exp_004_recipe FAILED: exit status 7\nno such GPU" in capsys.readouterr().out
    assert "no such GPU" in (home / "logs" / "search_exp_004_recipe.log").read_text()
    table = search.search_table(folder).set_index("name")
    assert table["status"].to_dict() == {"cosine_4e-3": "done", "exp_004_recipe": "failed: no such GPU", "cosine_4e-3+lora_plus_16": "done",
                                         "cosine_4e-3+dora_r7": "done", "cosine_4e-3@0.67x": "done", "cosine_4e-3@1.5x": "done"}


def test_child_command_names_a_trial_that_main_runs(home, monkeypatch):
    ran = fake_trial(monkeypatch, {})
    command = search.child_command(1, get_experiment("exp_004"))
    assert command[:3] == [sys.executable, "-m", "medqa_lib.search"]
    monkeypatch.setattr(sys, "argv", ["search", *search.child_command(1, search_plan.plan_round(1, {})[3])[3:]])
    search.main()
    assert ran == ["cosine_5e-4"]


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_main_refuses_fewer_workers_than_one(monkeypatch, capsys, workers):
    monkeypatch.setattr(sys, "argv", ["search", "--workers", workers])
    monkeypatch.setattr(search, "Search", lambda: pytest.fail("searched"))
    with pytest.raises(SystemExit):
        search.main()
    assert f"--workers is {workers}; expected 1 or more" in capsys.readouterr().err


def test_search_table_and_best_trial_read_what_lies_in_the_folder(folder):
    write_trial(folder, "b", 1, 2.5, changes={"learning_rate": 0.001, "lora.r": 16, "lora.target_modules": ["q_proj", "o_proj"]},
                tinyllama_share=0.004, training_path="fast")
    write_trial(folder, "a", 2, 2.1)
    write_trial(folder, "c", 1, None, error="Traceback\nRuntimeError: out of luck\n")
    write_trial(folder, "d", 1, 2.4)
    table = search.search_table(folder)
    assert list(table["name"]) == ["d", "b", "c", "a"] and list(table["round"]) == [1, 1, 1, 2]
    assert list(table["status"]) == ["done", "done", "failed: RuntimeError: out of luck", "done"]
    assert table["changes"][1] == "learning_rate 0.001, r 16, target_modules q/o"
    assert search.best_trial(folder)["name"] == "a"


def test_best_trial_of_an_empty_folder_says_how_to_search(tmp_path):
    assert len(search.search_table(tmp_path)) == 0
    with pytest.raises(ValueError, match="python -m medqa_lib.search"):
        search.best_trial(tmp_path)
