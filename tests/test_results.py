"""Numbers that results.py derives from runs."""

from types import SimpleNamespace

from medqa_lib import results


def test_describe_gpu_time_by_hand():
    times = {"base": {"answer_time_s": 600.0}, "exp_004": {"train_time_s": 1200.0, "answer_time_s": 600.0}, "line_base_cut": {}}
    runs = {name: SimpleNamespace(metrics=metrics, config={"gpu": "NVIDIA T4"}) for name, metrics in times.items()}
    said = results.describe_gpu_time(runs, dollars_per_hour=6)
    assert "1 runs trained for at least 20 minutes" in said
    assert "answered for 20: at least 0.67 GPU hours, or $4.00 at an assumed $6 an hour." in said
    assert "since" not in said and said.endswith("What was lost between a checkpoint and a stop is not counted.")
    assert results.describe_gpu_time({"base": SimpleNamespace(config={"gpu": "none (CPU)"})}) == "No GPU was used."


def test_describe_origin_names_all_that_differ():
    runs = [SimpleNamespace(config={"identity": {"model": "m"}, "gpu": gpu, "date": "2026-01-02"}, metrics={"n_test": 1747})
            for gpu in ("A", "B", "A")]
    assert results.describe_origin(runs) == "m, n = 1,747 test questions, GPU A / B, 2026-01-02"
