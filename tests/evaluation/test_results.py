"""A run's folder is written, read back and recognised; what it was made on is told."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from medqa_lib import prompts
from medqa_lib.config import PROFILES
from medqa_lib.evaluation import results
from medqa_lib.standin import model_path

METRICS = {"rouge2": 0.5, "n_test": 1}


def save(folder, **identity):
    scores = pd.DataFrame({"question_id": ["0012"], "group": ["7"], "rouge2": [0.5]})
    losses = pd.DataFrame({"step": [0], "split": ["validation"], "loss": [2.0]})
    samples = [{"question": "What is gout?", "answer": "It is gout."}]
    return results.save_run(folder, {"identity": identity}, METRICS, scores, losses, samples)


def test_save_run_reads_back_what_it_wrote(tmp_path):
    run = save(tmp_path / "exp", model="m")
    assert (run.name, run.metrics, run.log) == ("exp", METRICS, "")
    assert run.scores.to_dict("records") == [{"question_id": "0012", "group": "7", "rouge2": 0.5}]
    assert run.samples["answer"].tolist() == ["It is gout."]
    (tmp_path / "exp" / "log.txt").write_text("step 1: loss 2.0\n")
    assert results.load_run(tmp_path / "exp").log == "step 1: loss 2.0\n"
    assert list(results.load_runs(tmp_path)) == ["exp"]


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"a": ', b"null", b"\x00\xff\x00", b"\x80" * 99])
@pytest.mark.parametrize("name", ["config.json", "scores.csv", "loss.csv", "samples.json", "metrics.json"])
def test_a_damaged_file_is_named_and_its_run_is_not_finished(tmp_path, capsys, name, content):
    run = save(tmp_path / "exp", model="m")
    path = run.folder / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(results.UnfinishedRun, match=name):
        results.load_run(run.folder)
    assert results.load_runs(tmp_path) == {} and results.find_finished(run.folder, {"model": "m"}) is None
    assert name in capsys.readouterr().out or (name, content) == ("metrics.json", None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_run_whose_loss_is_not_finite_is_not_finished(tmp_path, capsys, value):
    run = save(tmp_path / "exp")
    results.write_json_atomically(run.folder / "metrics.json", METRICS | {"validation_loss": value})
    assert results.load_runs(tmp_path) == {} and "validation_loss" in capsys.readouterr().out


def test_a_run_that_lost_rows_of_its_scores_is_not_finished(tmp_path):
    run = save(tmp_path / "exp")
    results.write_json_atomically(run.folder / "metrics.json", METRICS | {"n_test": 2})
    with pytest.raises(results.UnfinishedRun, match="1 of 2"):
        results.load_run(run.folder)


def identity_of(model):
    return results.run_identity(None, dataclasses.replace(PROFILES["smoke"], model=str(model)), {})


def test_identity_follows_a_local_models_weights_and_not_its_place(tmp_path):
    source = Path(model_path(PROFILES["smoke"]))
    here, there = (shutil.copytree(source, tmp_path / place / "my-llama") for place in ("a", "b"))
    first = identity_of(here)
    assert identity_of(there) == first and str(tmp_path) not in json.dumps(first)
    for folder in (here, there):  # as a slow tokenizer has it
        (folder / "merges.txt").write_bytes(b"1 2")
    first = identity_of(here)
    for name, change in (("model.safetensors", -1), ("generation_config.json", None), ("merges.txt", None)):
        content = (there / name).read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1]) if change else content.replace(b"1", b"3")
        (there / name).write_bytes(changed)
        assert results.identity_differences(first, identity_of(there))[0].startswith("weights")
        (there / name).write_bytes(content)
    assert identity_of(there) == first


def test_identity_holds_the_hubs_commit(dead_hub):
    folder = dead_hub / "models--me--my-llama" / "snapshots" / ("ab" * 20)
    shutil.copytree(model_path(PROFILES["smoke"]), folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("ab" * 20)
    assert identity_of("me/my-llama")["weights"] == "ab" * 20


@pytest.mark.parametrize("what", ["labels", "generation", "metrics"])
def test_another_version_of_the_project_does_not_reuse_a_run(tmp_path, monkeypatch, what):
    before = identity_of("smoke-llama")
    save(tmp_path / "exp", **before)
    old = results.VERSIONS[what]
    monkeypatch.setitem(results.VERSIONS, what, 99)
    with pytest.raises(ValueError, match=f"versions.{what}: checkpoint {old}, this run 99"):
        results.find_finished(tmp_path / "exp", identity_of("smoke-llama"))


def test_another_prompt_does_not_reuse_a_run(monkeypatch):
    before = identity_of("smoke-llama")
    monkeypatch.setattr(prompts, "TEMPLATE", "Question: {question}\nAnswer: ")
    assert len(results.identity_differences(before, identity_of("smoke-llama"))) == 1


def test_find_finished_recognises_its_own_run_only(tmp_path):
    assert results.find_finished(tmp_path / "exp", {"model": "m"}) is None
    save(tmp_path / "exp", model="m", data={"test": "a"})
    assert results.find_finished(tmp_path / "exp", {"model": "m", "data": {"test": "a"}}).name == "exp"
    with pytest.raises(ValueError, match=r"data\.test.*'a'.*'b'"):
        results.find_finished(tmp_path / "exp", {"model": "m", "data": {"test": "b"}})


def test_describe_origin_names_all_that_differ():
    config = {"identity": {"model": "m"}, "date": "2026-01-02"}
    runs = [SimpleNamespace(config={**config, "gpu": gpu}, metrics={"n_test": 1747}) for gpu in "ABA"]
    assert results.describe_origin(runs) == "m, n = 1,747 test questions, GPU A / B, 2026-01-02"
