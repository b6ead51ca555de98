"""A run's folder is written, read back and recognised; what it was made on is told."""

from types import SimpleNamespace

import pandas as pd
import pytest

from medqa_lib.evaluation import results


def save(folder, **identity):
    scores = pd.DataFrame({"question_id": ["0012"], "group": ["7"], "rouge2": [0.5]})
    losses = pd.DataFrame({"step": [0], "split": ["validation"], "loss": [2.0]})
    samples = [{"question": "What is gout?", "answer": "It is gout."}]
    return results.save_run(folder, {"identity": identity}, {"rouge2": 0.5}, scores, losses, samples)


def test_save_run_reads_back_what_it_wrote(tmp_path):
    run = save(tmp_path / "exp", model="m")
    assert (run.name, run.metrics, run.log) == ("exp", {"rouge2": 0.5}, "")
    assert run.scores.to_dict("records") == [{"question_id": "0012", "group": "7", "rouge2": 0.5}]
    assert run.samples["answer"].tolist() == ["It is gout."]
    (tmp_path / "exp" / "log.txt").write_text("step 1: loss 2.0\n")
    assert results.load_run(tmp_path / "exp").log == "step 1: loss 2.0\n"
    assert list(results.load_runs(tmp_path)) == ["exp"]


@pytest.mark.parametrize("name", ["config.json", "scores.csv", "loss.csv", "samples.json", "metrics.json"])
def test_load_run_names_the_missing_file(tmp_path, name):
    run = save(tmp_path / "exp")
    (run.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        results.load_run(run.folder)


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
